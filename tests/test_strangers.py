"""Files that strangers made: a named error or a correct load, and nothing else happens."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from far_train.data.sam import load_sam
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights
from far_train.training.checkpoints import load_checkpoint
from far_train.utils.errors import BaseModelError, CheckpointError, SubjectError, UnreadableFile, WeightsError
from far_train.utils.files import MAX_HEADER, read_tensors

from .test_checkpoints import save_checkpoint, training
from .test_weights import make_weights

ROOT = Path(__file__).parents[1]


def fuzz(folder: Path, seed: int, count: int) -> dict:
    """Read ``count`` mutated files in a process of its own; how they ended, by kind of file."""
    command = [sys.executable, ROOT / "tests" / "torture" / "strangers.py", folder, seed, 0, count]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(map(str, command), cwd=ROOT, env=env, capture_output=True, text=True, timeout=60 + 3 * count)
    current = folder / "current"
    assert done.returncode == 0, (current.read_text() if current.exists() else "at the start", done.stderr[-3000:])
    result = json.loads((folder / "result.json").read_text())
    print(f"\n{count} mutated files, slowest {result['slowest']} s")
    for kind, outcomes in result["outcomes"].items():
        print(f"  {kind}: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))
    assert result["wrong"] == []
    return result["outcomes"]


def check(outcomes: dict) -> None:
    """The fuzzing reached every reader, and both its ends."""
    assert len(outcomes) == 9
    total = {name: sum(o.get(name, 0) for o in outcomes.values()) for name in ("loaded", "WeightsError")}
    assert all(total.values()), outcomes


def test_mutated_files_load_or_are_named(tmp_path: Path):
    check(fuzz(tmp_path, 0, 120))


@pytest.mark.torture
def test_a_thousand_mutated_files(tmp_path: Path):
    check(fuzz(tmp_path, 1, 1000))


# ---- what the fuzzing found, and what it can only find by chance


def with_metadata(base, path: Path, **change) -> Path:
    """A FaR file whose metadata has these fields; a str that isn't JSON takes the place of all of it."""
    weights = make_weights(base)
    weights.save(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["far"]) | change
    save_file(load_file(path), path, {"far": about.get("all") or json.dumps(about)})
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "many"},
        {"prediction_type": ["epsilon"]},
        {"config": None},
        {"size": float("inf")},
        {"base_digest": 3},
        {"all": "[" * 100_000 + "]" * 100_000},
        {"all": '{"config": [' + "[]," * 400_000 + "[]]}"},
        {"all": '{"schema": ' + "9" * 5000 + "}"},
        {"all": "[]"},
    ],
)
def test_metadata_of_wrong_types(base, tmp_path: Path, change: dict):
    with pytest.raises(WeightsError, match=r"the metadata of .*w\.safetensors can't be read"):
        FarWeights.load(with_metadata(base, tmp_path / "w.safetensors", **change))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 2, dtype=torch.float8_e4m3fn), torch.zeros(0, 8), torch.zeros(2, 2).int()]
)
def test_tensors_of_wrong_kinds(base, tmp_path: Path, bad: torch.Tensor):
    weights = make_weights(base)
    weights.deltas[next(iter(weights.deltas))] = bad
    weights.save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="no proper tensor"):
        FarWeights.load(tmp_path / "w.safetensors")


def test_concepts_of_different_numbers_of_vectors(base, tmp_path: Path):
    weights = make_weights(base)
    weights.embeddings["<red-ball>"] = {"clip_h": torch.zeros(2, 32)}
    weights.save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="differ in shape"):
        FarWeights.load(tmp_path / "w.safetensors")


def test_a_huge_header_is_not_read(tmp_path: Path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(2 * MAX_HEADER)
    with pytest.raises(UnreadableFile, match="header"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": 10**6}),
        ("unet", {"block_out_channels": [2**40] * 4}),
        ("unet", {"norm_num_groups": 0}),
        ("vae", {"layers_per_block": [10**9]}),
        ("text_encoder", {"num_hidden_layers": 10**8}),
        ("text_encoder", {"hidden_act": "__import__('os')"}),
    ],
)
def test_configs_that_would_build_for_ever(tiny_folder: Path, tmp_path: Path, part: str, change: dict):
    folder = tmp_path / "base"
    folder.mkdir()
    for entry in tiny_folder.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / part).unlink()
    (folder / part).mkdir()
    for file in (tiny_folder / part).iterdir():
        (folder / part / file.name).symlink_to(file)
    config = json.loads((tiny_folder / part / "config.json").read_text())
    (folder / part / "config.json").unlink()
    (folder / part / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BaseModelError, match="base: .*"):
        load_base(folder)


def test_a_base_with_values_that_are_not_finite(base, tiny_folder: Path, tmp_path: Path):
    from far_train.mini.tiny import single_file_state
    from far_train.models.loading import read_configs

    states = {k: {n: t.clone() for n, t in m.state_dict().items()} for k, m in base.parts.items()}
    states["unet"]["conv_in.weight"][0, 0, 0, 0] = float("nan")
    state = single_file_state(read_configs(tiny_folder), states)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "sd.safetensors")
    with pytest.raises(BaseModelError, match=r"sd\.safetensors.*conv_in\.weight holds values that are not finite"):
        load_base(tmp_path / "sd.safetensors", config=tiny_folder)


def test_a_sam_that_unpacks_to_more_than_its_size(tmp_path: Path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in plain.infolist():
                bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(SubjectError, match=r"bomb\.pth.*compressed"):
        load_sam(tmp_path / "bomb.pth")


def test_a_checkpoint_under_another_steps_name(tmp_path: Path):
    save_checkpoint(tmp_path, 3, *training(), keep=2).rename(tmp_path / "checkpoint-00000004.safetensors")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        load_checkpoint(tmp_path, *training())
