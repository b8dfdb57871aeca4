"""The commands on a tiny base: the full pipeline, and one clear line for each kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from far_train.cli.main import main
from far_train.data.folder_inputs import read_backgrounds
from far_train.data.images import save_pair
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import WIDTH
from far_train.models.layers import attention_projections, kv_weights
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights, Provenance

from .command_line import files, refused

SIZE = 128


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    """Two folders of subjects: photos with masks."""
    folder = tmp_path_factory.mktemp("subjects")
    for i, name in enumerate(("tom", "felix")):
        for k in range(2):
            image = torch.rand(70, 60 + 10 * k, 3, generator=torch.Generator().manual_seed(10 * i + k))
            mask = torch.zeros(image.shape[:2])
            mask[10:60, 15:45] = 1
            save_pair(folder / name / f"{k}.png", image, mask)
    return folder


@pytest.fixture(scope="module")
def dataset(subjects, tmp_path_factory) -> Path:
    """A dataset folder, made by the command itself."""
    out = tmp_path_factory.mktemp("fused") / "cats"
    argv = ["fuse", "--concept", "<tom>", "cat", str(subjects / "tom"), "--concept", "<felix>", "cat"]
    argv += [str(subjects / "felix"), "--prior", "cat", str(subjects / "felix"), "--out", str(out)]
    assert main([*argv, "--size", str(SIZE), "--count", "6"]) == 0
    return out


@pytest.fixture(scope="module")
def weights(tiny_folder, tmp_path_factory) -> Path:
    """FaR weights that fit the tiny base."""
    base = load_base(tiny_folder)
    deltas = {k: 0.01 * torch.ones_like(v) for k, v in kv_weights(base.unet).items()}
    about = Provenance("sd21", base.digest, base.prediction_type, {"<tom>": "cat", "<felix>": "cat"}, 7, SIZE)
    embeddings = {t: {"clip_h": torch.full((1, WIDTH), 0.1)} for t in about.nouns}
    path = tmp_path_factory.mktemp("run") / "weights.safetensors"
    FarWeights(embeddings, deltas, about).save(path)
    return path


# ---- extract


def test_extract_takes_given_masks(subjects, tmp_path, capsys, caplog):
    photos = Path(shutil.copytree(subjects / "tom", tmp_path / "photos"))
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with caplog.at_level(logging.WARNING):
        assert main(["extract", "--photos", str(photos), "--out", str(tmp_path / "out")]) == 0
    assert "2 of 3 photos" in capsys.readouterr().out
    assert "skipped: " in caplog.text and "broken.jpg" in caplog.text
    assert files(tmp_path / "out") == {"0.png", "0.mask.png", "1.png", "1.mask.png"}
    with Image.open(tmp_path / "out.preview.jpg") as sheet:
        assert sheet.width > 512


def test_extract_beside_other_pictures(subjects, tmp_path, monkeypatch):
    """The folder in which one stands has no name to put before .preview.jpg, and a photo without a mask no subject."""
    out = tmp_path / "here"
    out.mkdir()
    Image.new("RGB", (40, 40)).save(out / "another.png")
    monkeypatch.chdir(out)
    assert main(["extract", "--photos", str(subjects / "tom"), "--out", "."]) == 0
    assert (tmp_path / "here.preview.jpg").exists() and "0.mask.png" in files(out)


def test_bad_input_to_extract(capsys, subjects, tmp_path):
    out = tmp_path / "out"
    bare = tmp_path / "bare"
    bare.mkdir()
    extract = ["extract", "--out", out, "--photos"]
    tom = [*extract, subjects / "tom"]
    refused(capsys, [*extract, tmp_path / "none"], "there is no such folder", str(tmp_path / "none"))
    refused(capsys, [*extract, bare], "holds no photos")
    Image.new("RGB", (40, 40)).save(bare / "a.png")
    refused(capsys, [*extract, bare], "a.png: has no mask", "a.mask.png")
    refused(capsys, [*extract, bare, "--sam", tmp_path / "sam.safetensors"], "sam.safetensors")
    refused(capsys, [*tom, "--use-masks", "hint"], "use_masks: 'hint'", "weights as sam")
    Image.new("L", (40, 39), 255).save(bare / "a.mask.png")
    assert main([str(a) for a in [*extract, bare]]) == 2
    assert "a.mask.png: the mask is 40x39 px" in capsys.readouterr().err
    refused(capsys, [*tom, "--box", "1,2,3"], "box")
    refused(capsys, [*tom, "--box", "1,2,3,x"], "box", "X0,Y0,X1,Y1")
    refused(capsys, [*tom, "--points", "1,2"], "points")
    refused(capsys, [*tom, "--prompts", tmp_path / "p.yaml"], "prompts: ", "p.yaml")
    (tmp_path / "boxes.yaml").write_text("one.png: {box: [9, 1, 2, 5]}")
    refused(capsys, [*tom, "--prompts", tmp_path / "boxes.yaml"], "prompts, one.png: box")
    refused(capsys, [*tom, "--prompts", "x", "--box", "1,2,3,4"], "prompts: can't stand beside box")
    refused(capsys, [*tom, "--min-area", "2"], "min_area: 2.0 is out of range")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refused(capsys, [*tom, "--out", tmp_path / "file" / "out"], str(tmp_path / "file"))


# ---- fuse


def test_fuse_makes_a_dataset_and_a_sheet(dataset):
    assert {"dataset.json", "contact-sheet.jpg", "composites/0005.png", "priors/0001.png"} <= files(dataset)
    about = json.loads((dataset / "dataset.json").read_text())["about"]
    assert FusionConfig.from_dict(about["fusion"]) == FusionConfig(size=SIZE, count=6)


def test_fuse_from_a_file_with_backgrounds(subjects, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    Image.new("RGB", (90, 80), "green").save(scenes / "meadow.png")
    (scenes / "meadow.txt").write_text("in a\n  meadow ", encoding="utf-8-sig")
    path = tmp_path / "fuse.json"
    concept = {"token": "<tom>", "noun": "cat", "folder": str(subjects / "tom")}
    settings = {"concept": [concept], "out": str(tmp_path / "set"), "backgrounds": str(scenes), "size": 64, "count": 8}
    path.write_text(json.dumps(settings | {"background_weights": {"scene": 1}, "layout_weights": {"solo": 1}}))
    assert main(["fuse", "--config", str(path), "--count", "3"]) == 0
    assert "3 composites and 0 regularization images" in capsys.readouterr().out
    captions = [p.read_text() for p in (tmp_path / "set" / "composites").glob("*.txt")]
    assert len(captions) == 3 and all(c.endswith(", in a meadow\n") for c in captions)


def test_photos_without_a_mask_are_named_and_skipped(subjects, tmp_path, caplog):
    folder = Path(shutil.copytree(subjects / "tom", tmp_path / "tom"))
    Image.new("RGB", (40, 40)).save(folder / "bare.png")
    argv = ["fuse", "--concept", "<tom>", "cat", str(folder), "--out", str(tmp_path / "set"), "--size", "64"]
    with caplog.at_level(logging.WARNING):
        assert main([*argv, "--count", "1"]) == 0
    assert "bare.png has no mask and is skipped" in caplog.text and "0.png has" not in caplog.text


def test_bad_input_to_fuse(capsys, subjects, tmp_path):
    out = tmp_path / "out"
    tom = [str(subjects / "tom")]

    def fuse(*argv, token="<tom>", noun="cat", folder=tom[0]):
        return ["fuse", "--size", "64", "--count", "2", "--out", out, "--concept", token, noun, folder, *argv]

    refused(capsys, fuse(token="tom"), "token: 'tom' is not a placeholder token", "<tom>")
    refused(capsys, fuse(noun="Cat"), "noun: 'Cat' is not a class noun", "'cat'")
    refused(capsys, fuse("--concept", "<tom>", "cat", *tom), "token: <tom> names two concepts")
    refused(capsys, fuse(folder=tmp_path / "none"), "there is no such folder", str(tmp_path / "none"))
    refused(capsys, fuse("--prior", "cat", tmp_path / "none"), "there is no such folder")
    refused(capsys, fuse("--prior", "a cat!", *tom), "noun: 'a cat!' is not a class noun")
    refused(capsys, fuse("--backgrounds", tmp_path / "none"), "there is no such folder")
    refused(capsys, fuse("--flip", "nan"), "flip: nan is not a finite number")
    refused(capsys, fuse("--layout-weights", "triple=1"), "layout_weights: none of the chosen kinds")
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (40, 40)).save(bare / "a.png")
    refused(capsys, fuse(folder=bare), "concept <tom>: no photo in", "has a mask; run 'extract'")
    (bare / "a.txt").write_bytes(b"\xff\xfe\x00")
    refused(capsys, fuse("--backgrounds", bare), "a.txt: can't be read")
    Image.new("L", (40, 40), 0).save(bare / "a.mask.png")
    refused(capsys, fuse(folder=bare), f"{bare / 'a.png'}: the mask is empty: it is black all over")
    Image.new("L", (40, 30), 255).save(bare / "a.mask.png")
    refused(capsys, fuse(folder=bare), "a.mask.png: the mask is 40x30 px")
    (bare / "a.mask.png").write_bytes((subjects / "tom" / "0.mask.png").read_bytes()[:-20])
    refused(capsys, fuse(folder=bare), "a.mask.png: can't be decoded")
    assert files(tmp_path) == {"bare", "bare/a.png", "bare/a.txt", "bare/a.mask.png"}
    out.write_text("")
    refused(capsys, fuse(), f"{out}: is a file")
    out.unlink()
    shutil.copytree(subjects / "tom", out)
    refused(capsys, fuse(), "is not empty")


# ---- train


def test_bad_input_to_train(capsys, dataset, tiny_folder, tmp_path):
    out = tmp_path / "run"

    def train(folder=dataset, base=tiny_folder, *argv):
        return ["train", "--base", base, "--dataset", folder, "--out", out, "--steps", "1", "--device", "cpu", *argv]

    refused(capsys, train(tmp_path / "none"), "is not a dataset folder", "make one with 'fuse'")
    refused(capsys, train(dataset, tmp_path / "sd.safetensors"), "base: there is no file or folder", "sd.safetensors")
    (tmp_path / "sd.ckpt").write_bytes(b"")
    refused(capsys, train(dataset, tmp_path / "sd.ckpt"), "sd.ckpt is no .safetensors file")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(capsys, train(dataset, tmp_path / "cut.safetensors"), "cut.safetensors", "damaged or incomplete")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(capsys, train(dataset, tmp_path / "other.safetensors"), "holds no Stable Diffusion UNet")
    refused(capsys, train(dataset, tiny_folder, "--prediction-type", "epsilon"), "prediction_type: epsilon")
    refused(capsys, train(dataset, tiny_folder, "--prediction-type", "x0"), "prediction_type: 'x0' is unknown")
    refused(capsys, train(dataset, tiny_folder, "--device", "abacus"), "device: 'abacus' can't be used")
    refused(capsys, train(dataset, tiny_folder, "--attention-cells", "1"), "attention_cells: 1 is out of range")
    assert not out.exists()
    out.write_text("")
    refused(capsys, train(), str(out))


def test_a_dataset_without_its_noun_does_not_start_a_training(capsys, dataset, tiny_folder, tmp_path):
    folder = Path(shutil.copytree(dataset, tmp_path / "cats"))
    caption = folder / "composites" / "0000.txt"
    caption.write_text(caption.read_text().replace("cat", "kitten"))
    argv = ["train", "--base", tiny_folder, "--dataset", folder, "--out", tmp_path / "run"]
    refused(capsys, argv, str(caption), "class noun 'cat' is missing")
    assert not (tmp_path / "run").exists()


# ---- from training to pictures


QUICK = ["--steps", "2", "--sample-every", "0", "--batch-size", "1", "--prior-batch-size", "1", "--device", "cpu"]


def train_to(folder: Path, base: Path, dataset: Path) -> list[str]:
    return ["train", "--base", str(base), "--dataset", str(dataset), "--out", str(folder), *QUICK]


@pytest.fixture(scope="module")
def run(dataset, tiny_folder, tmp_path_factory) -> Path:
    """The folder of a finished training of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "my-cats"
    assert main(train_to(folder, tiny_folder, dataset)) == 0
    return folder


def test_a_dry_run_writes_nothing(dataset, tiny_folder, tmp_path, capsys):
    assert main([*train_to(tmp_path / "run", tiny_folder, dataset), "--dry-run"]) == 0
    assert "steps: 2, " in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_dry_run_counts_from_the_newest_checkpoint(run, dataset, tiny_folder, tmp_path, capsys):
    killed = Path(shutil.copytree(run, tmp_path / "run"))  # in its second step, whose metrics are there
    (newest,) = killed.glob("checkpoints/checkpoint-*.safetensors")
    newest.rename(newest.with_name("checkpoint-00000001.safetensors"))
    assert main([*train_to(killed, tiny_folder, dataset), "--dry-run"]) == 0
    assert "steps: 1, " in capsys.readouterr().out


def test_a_finished_run_is_neither_overwritten_nor_resumed_with_other_settings(run, dataset, tiny_folder, capsys):
    assert {"weights.safetensors", "metrics.jsonl", "run.json", "curves.png"} <= files(run)
    again = train_to(run, tiny_folder, dataset)
    refused(capsys, again, "holds a run already", "--resume")
    assert main([*again, "--resume"]) == 0
    refused(capsys, [*again, "--resume", "--train-seed", "5"], "train_seed (0 then, 5 now)")


def test_a_training_continues_from_weights(run, dataset, tiny_folder, tmp_path, capsys):
    further = train_to(tmp_path / "further", tiny_folder, dataset)
    assert main([*further, "--continue-from", str(run / "weights.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "2 steps" in told and "samples" not in told
    assert "continue_from" in json.loads((tmp_path / "further" / "run.json").read_text())


def test_a_short_run_has_samples_of_its_end(dataset, tiny_folder, tmp_path, capsys):
    short = [a for a in train_to(tmp_path / "run", tiny_folder, dataset) if a not in ("--sample-every", "0")]
    assert main([*short, "--sample-steps", "1", "--sample-prompts", "a <tom> cat"]) == 0
    assert files(tmp_path / "run" / "samples") == {"step-000002-0.png"}
    assert str(tmp_path / "run" / "samples") in capsys.readouterr().out


def test_there_is_no_word_of_success_before_the_first_step(dataset, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("far_train.training.step.run_eagerly", Mock(side_effect=MemoryError))
    assert main(train_to(tmp_path / "run", tiny_folder, dataset)) == 2
    said = capsys.readouterr()
    assert said.out == "" and "doesn't fit into memory" in said.err


def test_weights_are_exported_under_the_name_of_their_run(run, tmp_path, capsys):
    export = ["export", "--weights", str(run / "weights.safetensors"), "--out", str(tmp_path)]
    assert main(export) == 0
    expected = {"loras/my-cats.safetensors", "embeddings/tom.safetensors", "embeddings/felix.safetensors"}
    assert expected <= files(tmp_path) and "embedding:felix" in capsys.readouterr().out


def test_an_export_can_have_a_lower_rank_and_another_name(run, tmp_path):
    export = ["export", "--weights", str(run / "weights.safetensors"), "--out", str(tmp_path)]
    assert main([*export, "--rank", "2", "--name", "small"]) == 0
    with safe_open(tmp_path / "loras" / "small.safetensors", "pt") as file:
        assert all(min(file.get_tensor(k).shape) <= 2 for k in file.keys() if not k.endswith("alpha"))


def test_inspect_describes_weights_as_text_and_as_json(run, tiny_folder, capsys):
    inspect = ["inspect", "--weights", str(run / "weights.safetensors")]
    assert main(inspect) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    layers = len(attention_projections(load_base(tiny_folder).unet))
    assert [lines[0][0], *lines[2:4]] == ["<tom>", ["LoRA", "layers", str(layers)], ["LoRA", "rank", "8"]]
    assert main([*inspect, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["concepts"] == {t: {"noun": "cat", "vectors": 1} for t in ("<tom>", "<felix>")} and about["steps"] == 2


def test_generate_draws_every_prompt_with_the_weights(run, tiny_folder, tmp_path):
    pictures = tmp_path / "pictures"
    generate = ["generate", "--base", str(tiny_folder), "--weights", str(run / "weights.safetensors")]
    generate += ["--prompt", "a <tom> cat", "--prompt", "a cat", "--count", "2", "--out", str(pictures)]
    assert main([*generate, "--sampling-steps", "1", "--device", "cpu"]) == 0
    assert files(pictures) == {f"{i:04d}.{s}" for i in range(4) for s in ("png", "txt")}
    assert (pictures / "0001.txt").read_text() == "a <tom> cat\n" and (tmp_path / "pictures.grid.jpg").exists()
    with Image.open(pictures / "0000.png") as picture:
        assert picture.size == (SIZE, SIZE)


def test_generate_numbers_pictures_and_seeds_on(tiny_folder, tmp_path):
    """The same command again draws other pictures: those that one command for all of them would have drawn."""
    generate = ["generate", "--base", str(tiny_folder), "--prompt", "a cat", "--device", "cpu", "--sampling-steps", "1"]
    generate += ["--sample-seed", "7", "--sample-batch", "1"]
    for _ in range(2):
        assert main([*generate, "--out", str(tmp_path / "twice"), "--count", "1"]) == 0
    assert main([*generate, "--out", str(tmp_path / "once"), "--count", "2"]) == 0
    twice, once = ([(tmp_path / f / f"{i:04d}.png").read_bytes() for i in range(2)] for f in ("twice", "once"))
    assert twice == once and twice[0] != twice[1]


def test_scenes_become_the_backgrounds_of_fuse(subjects, tiny_folder, tmp_path, capsys):
    out = tmp_path / "scenes"
    draw = ["scenes", "--base", str(tiny_folder), "--out", str(out), "--device", "cpu", "--sampling-steps", "1"]
    draw += ["--width", "64", "--height", "64", "--count", "1"]
    assert main([*draw, "--scene", "an empty beach | on the beach", "--scene", "a wall"]) == 0
    assert "2 empty scenes" in capsys.readouterr().out and (tmp_path / "scenes.grid.jpg").exists()
    assert sorted(b.phrase for b in read_backgrounds(out)) == ["", "on the beach"]
    fuse = ["fuse", "--concept", "<tom>", "cat", str(subjects / "tom"), "--backgrounds", str(out), "--size", "64"]
    assert main([*fuse, "--out", str(tmp_path / "set"), "--count", "8"]) == 0
    captions = [p.read_text() for p in (tmp_path / "set").rglob("*.txt")]
    assert any(c.strip().endswith(", on the beach") for c in captions)
    refused(capsys, [*draw, "--scene", "| on the beach"], "scenes: line 1 says nothing before the bar")
    refused(capsys, [*draw, "--count", "0"], "count: 0 is no number of pictures")


def test_bad_input_to_generate(capsys, tiny_folder, weights, tmp_path):
    out = tmp_path / "pictures"
    quick = ["--device", "cpu", "--sampling-steps", "1", "--prompt", "a cat", "--out"]

    def generate(*argv, base=tiny_folder, out=out):
        return ["generate", "--base", base, *quick, out, *argv]

    refused(capsys, generate(base=tmp_path / "none"), "base: there is no file or folder")
    refused(capsys, generate("--weights", tmp_path / "none"), "weights: can't read", str(tmp_path / "none"))
    refused(capsys, generate("--weights", weights, "--concept-strength", "<rex>=1"), "there is no <rex>; known: <tom>")
    refused(capsys, generate("--strength", "0.5"), "strength: changes nothing without FaR weights")
    refused(capsys, generate("--concept-strength", "<tom>=1"), "concept_strength: changes nothing without FaR weights")
    refused(capsys, generate("--count", "0"), "count: 0 is no number of pictures")
    refused(capsys, generate("--guidance", "0"), "guidance: 0.0 is out of range")
    refused(capsys, generate("--device", "abacus"), "device: 'abacus' can't be used")
    assert not out.exists()
    refused(capsys, generate("--width", "100"), "width: 100 px does not fit this base; use a multiple of 64")
    (tmp_path / "file").write_text("")
    refused(capsys, generate(out=tmp_path / "file" / "deep"), str(tmp_path / "file"))


def test_weights_of_another_base_are_refused(capsys, tiny_folder, weights, tmp_path):
    loaded = FarWeights.load(weights)
    other = dataclasses.replace(loaded, provenance=dataclasses.replace(loaded.provenance, prediction_type="epsilon"))
    other.save(tmp_path / "other.safetensors")
    argv = ["generate", "--base", tiny_folder, "--prompt", "a", "--out", tmp_path / "out", "--weights"]
    refused(capsys, [*argv, tmp_path / "other.safetensors"], "weights: trained on a base with epsilon")
    some = dict(list(loaded.deltas.items())[1:])
    dataclasses.replace(loaded, deltas=some).save(tmp_path / "other.safetensors")
    line = refused(capsys, [*argv, tmp_path / "other.safetensors"], "they don't fit this base: it differs in")
    assert next(iter(loaded.deltas)) in line and " more" not in line  # that layer and no other


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_files_that_are_no_weights_are_refused(capsys, tmp_path, weights, command):
    path = tmp_path / "weights.safetensors"
    out = ["--out", tmp_path / "out"] if command == "export" else []
    refused(capsys, [command, "--weights", path, *out], "weights: can't read", str(path))
    path.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, [command, "--weights", path, *out], "weights: can't read", "damaged")
    save_file({"x": torch.zeros(1)}, path)
    refused(capsys, [command, "--weights", path, *out], "is no FaR file")
    refused(capsys, [command, "--weights", tmp_path, *out], "weights: can't read")
    assert not (tmp_path / "out").exists()


def test_bad_input_to_export(capsys, weights, tmp_path):
    export = ["export", "--weights", weights, "--out", tmp_path / "out"]
    refused(capsys, [*export, "--rank", "0"], "rank: 0 is no rank")
    for name in ("../up", ".hidden", "a/b"):
        refused(capsys, [*export, "--name", name], f"name: '{name}' is no plain file name")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    refused(capsys, export, str(tmp_path / "out"))
