"""The command line: settings from files and flags, and one clear line for what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from far_train import __version__
from far_train.cli import main as cli_main
from far_train.cli.main import PROGRAM, main
from far_train.cli.parsing import Command
from far_train.data.settings import FusionConfig
from far_train.models.settings import SampleConfig
from far_train.training.settings import TrainConfig
from far_train.utils.errors import Interrupted

from .command_line import refused

ROOT = Path(__file__).parents[1]

# ---- help and flags


@pytest.mark.parametrize("command", PROGRAM.commands, ids=lambda c: c.name)
def test_help_names_every_input_and_setting(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    settings = dataclasses.fields(command.settings) if command.settings else ()
    for name in [a.name for a in command.arguments] + [f.name for f in settings]:
        assert f"--{name.replace('_', '-')}" in text, name
    assert command.run.__doc__


def test_help_tells_a_default_once():
    subparsers = next(a for a in PROGRAM.parser()._actions if a.dest == "command").choices
    texts = {(name, action.dest): action.help for name, sub in subparsers.items() for action in sub._actions}
    assert [place for place, text in texts.items() if text.count("default:") > 1] == []
    assert texts["train", "steps"].endswith("; default: 500 per concept, at most 2500")
    assert texts["train", "batch_size"].endswith(" (default: 2)")


def test_help_and_version_of_the_whole(capsys):
    for argv, words in ((["--help"], [c.name for c in PROGRAM.commands]), (["--version"], [__version__])):
        with pytest.raises(SystemExit) as end:
            main(argv)
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(w in text for w in words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["COMMAND"]),
        (["fusee"], ["invalid choice", "fuse"]),
        (["fuse", "--sizes", "64"], ["--sizes: unknown argument of 'fuse'; did you mean --size?"]),
        (["scenes", "--strength", "1"], ["--strength: unknown argument of 'scenes'"]),
        (["fuse", "--confg=a.yaml"], ["did you mean --config?"]),
        (["inspect", "stray"], ["stray: unknown argument", "--help"]),
        (["fuse", "--size", "big"], ["size: expected int, got 'big'"]),
        (["fuse", "--concept", "<a>", "dog"], ["--concept", "3"]),
        (["export", "--rank", "x"], ["--rank", "int", "'x'"]),
        (["train", "--kv-lr"], ["--kv-lr", "expected one argument"]),
        (["fuse", "--layout-weights", "solo"], ["layout_weights: expected KEY=NUMBER, got 'solo'"]),
        (["fuse", "--layout-weights", "=1"], ["layout_weights: expected KEY=NUMBER, got '=1'"]),
        (["generate", "--concept-strength", "<a>=x"], ["concept_strength: expected KEY=NUMBER"]),
        (["extract", "--out", "x"], ["--photos: is needed; folder of photos"]),
        (["fuse", "--out", "x"], ["--concept: is needed"]),
        (["train", "--base", "x", "--dataset", "y", "--out", ""], ["--out: is needed"]),
        (["inspect"], ["--weights: is needed"]),
    ],
)
def test_bad_command_lines(capsys, argv, words):
    refused(capsys, argv, *words)


def slow_imports(*argv: str) -> tuple[int, str, set[str]]:
    """Exit status and standard error of a command in a process of its own, and which slow packages it imported."""
    names = "'torch', 'scipy', 'diffusers', 'transformers', 'PIL'"
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('far_train', run_name='__main__', alter_sys=True)\n"
        f"finally:\n    print('imported', *{{{names}}} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, *argv]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = ended.stdout.splitlines()[-1].split()
    assert last[0] == "imported"
    return ended.returncode, ended.stderr, set(last[1:])


@pytest.mark.parametrize("argv", [("--help",), ("queue", "--help"), ("train", "--help")])
def test_help_loads_no_model_code(argv):
    """Torch and diffusers take seconds to import: the commands do so only when they run."""
    assert slow_imports(*argv) == (0, "", set())


@pytest.mark.parametrize("grid", [(), ("--grid", "Draw.seed=1..2")])
def test_a_workflow_is_queued_without_model_code(tmp_path, grid):
    workflow = str(ROOT / "workflows" / "api" / "3 Draw two dogs.json")
    status, said, slow = slow_imports("queue", workflow, "--host", "127.0.0.1:9", "--out", str(tmp_path), *grid)
    assert status == 2 and "no ComfyUI answers at http://127.0.0.1:9" in said and slow == set()


# ---- settings files


@pytest.fixture
def seen(monkeypatch) -> dict:
    """What each command is given, instead of doing it."""
    given: dict = {}

    def noting(command: Command) -> Command:
        return dataclasses.replace(command, run=lambda *call: given.update({command.name: call}))

    replace_commands(monkeypatch, noting)
    return given


def replace_commands(monkeypatch, change) -> None:
    changed = tuple(change(command) for command in PROGRAM.commands)
    monkeypatch.setattr(cli_main, "PROGRAM", dataclasses.replace(PROGRAM, commands=changed))


TRAIN = ["train", "--base", "b", "--dataset", "d", "--out", "o"]


@pytest.mark.parametrize(("suffix", "dump"), [("json", json.dumps), ("yaml", yaml.safe_dump)])
def test_flags_override_the_file(seen, tmp_path, suffix, dump):
    path = tmp_path / f"settings.{suffix}"
    path.write_text(dump({"steps": 5, "kv_lr": 1e-6, "base": "of the file", "resume": True, "sample_prompts": ["x"]}))
    assert main(["train", "--config", str(path), "--steps", "7", "--dataset", "d", "--out", "o"]) == 0
    inputs, settings = seen["train"]
    assert settings == TrainConfig(steps=7, kv_lr=1e-6, sample_prompts=("x",))
    assert inputs == {"base": "of the file", "dataset": "d", "out": "o", "resume": True}


def test_flags_of_all_kinds(seen):
    flags = ["--gradient-checkpointing", "--min-snr-gamma", "none", "--sample-prompts", "a dog", "a cat"]
    assert main([*TRAIN, *flags, "--localization", "none", "--device", "cpu"]) == 0
    assert seen["train"][1] == TrainConfig(
        gradient_checkpointing=True,
        min_snr_gamma=None,
        sample_prompts=("a dog", "a cat"),
        localization="none",
        device="cpu",
    )
    assert main([*TRAIN, "--no-gradient-checkpointing"]) == 0 and seen["train"][1] == TrainConfig()
    argv = ["fuse", "--concept", "<a>", "dog", "A", "--concept", "<b>", "dog", "B", "--out", "o"]
    assert main([*argv, "--layout-weights", "solo=1", "pair=2.5", "--size", "512"]) == 0
    inputs, settings = seen["fuse"]
    assert inputs == {"concept": [["<a>", "dog", "A"], ["<b>", "dog", "B"]], "out": "o"}
    assert settings == FusionConfig(layout_weights={"solo": 1.0, "pair": 2.5}, size=512)
    argv = ["generate", "--base", "b", "--out", "o", "--prompt", "a", "--prompt", "b", "--count", "3"]
    assert main([*argv, "--strength", "-1", "--concept-strength", "<a=b>=0.5", "--device", "cpu"]) == 0
    inputs, settings = seen["generate"]
    assert (inputs["prompt"], inputs["count"], inputs["device"]) == (["a", "b"], 3, "cpu")
    assert settings == SampleConfig(strength=-1, concept_strength={"<a=b>": 0.5})


def test_a_file_may_have_sections(seen, tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(
        "base: shared.safetensors\ndevice: cpu\n"
        "train:\n  steps: 9\n  device: cuda\n  dataset: d\n  out: run\n"
        "fuse: {size: 64, out: d, concept: [{token: <a>, noun: dog, folder: A}]}\n"
        "generate: {prompt: [a dog], out: pictures, weights: run/weights.safetensors}\ninspect:\n"
    )
    for name in ("train", "fuse", "generate"):
        assert main([name, "--config", str(path)]) == 0
    assert seen["train"] == (
        {"base": "shared.safetensors", "dataset": "d", "out": "run"},
        TrainConfig(steps=9, device="cuda"),
    )
    assert seen["fuse"][0] == {"out": "d", "concept": [{"token": "<a>", "noun": "dog", "folder": "A"}]}
    assert seen["fuse"][1] == FusionConfig(size=64)
    assert seen["generate"][0]["base"] == "shared.safetensors" and seen["generate"][0]["device"] == "cpu"
    assert main(["inspect", "--config", str(path), "--weights", "w"]) == 0  # an empty section


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stpes: 5", ["stpes: unknown setting in 'train'; did you mean 'steps'?"]),
        ("train: {stpes: 5}", ["did you mean 'steps'?"]),
        ("bsae: sd.safetensors", ["bsae: unknown setting in 'train'; did you mean 'base'?"]),
        ("stpes: 5\ntrain: {}", ["stpes: unknown setting in 'train'"]),
        ("train: 5", ["'train'", "must hold a mapping"]),
        ("steps: many", ["steps: expected int or nothing, got 'many'"]),
        ("steps: 0", ["steps: 0 is out of range"]),
        ("kv_lr: .nan", ["kv_lr: nan is not a finite number"]),
        ("base: 5", ["base: expected a text, got 5"]),
        ("base: [a, b]", ["base: expected a text"]),
        ("resume: maybe", ["resume: expected true or false, got 'maybe'"]),
        ("- steps", ["must hold a mapping"]),
        ("steps: [", ["is not valid YAML"]),
    ],
)
def test_bad_settings_files(seen, capsys, tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    refused(capsys, ["train", "--config", path, "--dataset", "d", "--out", "o", "--base-config", "x"], *words)
    assert seen == {}


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("generate", "count: many", ["count: expected a whole number, got 'many'"]),
        ("generate", "prompt: 5", ["prompt: expected a list, got 5"]),
        ("generate", "width: 8", ["width: 8 is out of range"]),
        ("export", "weights: x\nsize: 5", ["size: unknown setting in 'export'; known settings: weights, out"]),
        ("fuse", "concept: [[<a>, dog]]\nout: o", ["concept: expected token, noun, folder in each entry"]),
        ("fuse", "concept: [{token: <a>}]\nout: o", ["concept: expected token, noun, folder in each entry"]),
        ("fuse", "concept: word\nout: o", ["concept: expected token, noun, folder in each entry"]),
    ],
)
def test_bad_inputs_in_settings_files(capsys, tmp_path, command, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    refused(
        capsys, [command, "--config", path, *(["--base", "b", "--out", "o"] if command == "generate" else [])], *words
    )


def test_an_empty_value_in_a_file_is_not_given(seen, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base_config:\nsteps:\n")
    assert main([*TRAIN, "--config", str(path)]) == 0
    assert seen["train"] == ({"base": "b", "dataset": "d", "out": "o"}, TrainConfig())


def test_a_missing_settings_file(capsys):
    refused(capsys, ["train", "--config", "none.yaml"], "config: none.yaml: can't be read")


# ---- interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped at step 3")])
def test_an_interruption_is_no_error(monkeypatch, capsys, error):
    def stop(inputs, settings):
        raise error

    replace_commands(monkeypatch, lambda command: dataclasses.replace(command, run=stop))
    assert main(["inspect", "--weights", "w"]) == 130
    text = capsys.readouterr().err
    assert text.startswith("far_train: ") and "error" not in text


def test_the_module_runs_from_a_shell(tmp_path):
    argv = [sys.executable, "-m", "far_train", "inspect", "--weights", str(tmp_path / "none")]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("far_train: error: weights: can't read") and ended.stderr.count("\n") == 1
