"""Odd datasets, runs, weights and bases: what is said or made of them. See :mod:`.odd_registry`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from far_train.mini.tiny import random_states, single_file_state, tiny_configs
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights

from .odd_registry import SIDE, Found, Place, Registry, photo
from .test_weights import make_low_rank

ROOT = Path(__file__).resolve().parents[1]
odd = Registry()


# ---- datasets


@odd("a caption of 100 words, with composites deleted")
def _(place: Place) -> Found:
    data = place.dataset()
    (data / "composites/0000.png").unlink()
    words = "a photo of a <rex> dog " + "very " * 94 + "old"
    (data / "composites/0002.txt").write_text(words)
    said = place.train()
    return (said, (place / "run").exists()), (
        [
            "PLACE/data: 1 of 4 composites were deleted (0000).",
            f"far_train: error: PLACE/data/composites/0002.txt: caption: {words!r} has 101 tokens, 75 fit; shorten it",
        ],
        False,
    )


@odd("a caption in cp1252")
def _(place: Place) -> Found:
    data = place.dataset()
    (data / "composites/0002.txt").write_bytes("a photo of a <rex> dog in a café".encode("cp1252"))
    return place.train(), [
        "far_train: error: PLACE/data/composites/0002.txt: can't be read as UTF-8 (byte 32); save it as UTF-8 text"
    ]


@odd("a caption in UTF-16")
def _(place: Place) -> Found:
    data = place.dataset()
    (data / "composites/0002.txt").write_bytes("a photo of a <rex> dog".encode("utf-16-le"))
    return place.train(), [
        "far_train: error: PLACE/data/composites/0002.txt: can't be read as UTF-8 (it looks like UTF-16); save it as "
        "UTF-8 text"
    ]


@odd("a composite saved as JPEG")
def _(place: Place) -> Found:
    data = place.dataset()
    Image.open(data / "composites/0001.png").save(data / "composites/0001.jpg")
    (data / "composites/0001.png").unlink()
    return place.train(), [
        "far_train: error: PLACE/data/composites/0001.jpg: not listed in dataset.json (0001.png is missing); restore "
        "a composite's name and format (PNG), and move other pictures out of the folder"
    ]


@odd("a picture added to the composites")
def _(place: Place) -> Found:
    data = place.dataset()
    photo(data / "composites/mine.png")
    return place.train(), [
        "far_train: error: PLACE/data/composites/mine.png: not listed in dataset.json; restore a composite's name and "
        "format (PNG), and move other pictures out of the folder"
    ]


# ---- runs and weights


@odd("a finished run, resumed")
def _(place: Place) -> Found:
    place.dataset()
    place.train()
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (place / "run").rglob("*") if p.is_file()}
    place.train("--resume")
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (place / "run").rglob("*") if p.is_file()}
    return sorted(p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)), []


@odd("a run resumed after one picture changed")
def _(place: Place) -> Found:
    data = place.dataset()
    place.train()
    photo(place / "new.png", seed=5)
    Image.open(place / "new.png").resize((2 * SIDE, 2 * SIDE)).save(data / "composites/0003.png")
    return place.train("--resume"), [
        "far_train: error: PLACE/run: the run to resume differs in dataset (its content changed); undo that or choose "
        "another folder. In PLACE/data: changed: composites/0003.png"
    ]


@odd("the same weights saved twice")
def _(place: Place) -> Found:
    weights = make_low_rank(load_base(place.base))
    files = [place / f"{i}.safetensors" for i in range(8)]
    for file in files:
        weights.save(file)
    return len({file.read_bytes() for file in files}), 1


@odd("a LoRA for every tool")
def _(place: Place) -> Found:
    """What each of them makes of it: test_lora_files.py, host/test_weights.py."""
    make_low_rank(load_base(place.base)).save(place / "w.safetensors")
    place.run("export", "--weights", place / "w.safetensors", "--out", place / "out")
    names = load_file(place / "out/loras/w.safetensors").keys()
    layers = FarWeights.load(place / "w.safetensors").low_rank_deltas
    assert all(n.startswith("lora_unet_") for n in names)
    return (len(names), {n.partition(".")[2] for n in names}), (
        3 * len(layers),
        {"lora_down.weight", "lora_up.weight", "alpha"},
    )


@odd("an export over another one")
def _(place: Place) -> Found:
    make_low_rank(load_base(place.base)).save(place / "w.safetensors")
    argv = ["export", "--weights", place / "w.safetensors", "--out", place / "out"]
    place.run(*argv)
    return (place.run(*argv)[0], place.run(*argv, "--rank", 1)[0]), (
        "changes of the model → PLACE/out/loras/w.safetensors",
        "Written over other files of these names: PLACE/out/loras/w.safetensors",
    )


@odd("an output that lacks letters, and one that is closed")
def _(place: Place) -> Found:
    make_low_rank(load_base(place.base)).save(place / "w.safetensors")
    argv = [sys.executable, "-m", "far_train", "export", "--weights", place / "w.safetensors", "--out", place / "out"]
    found = []
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for variables, unbuffered in (({"PYTHONIOENCODING": "cp1252"}, ""), (ascii_only, "1")):
        env = os.environ | variables | {"PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, timeout=120)
        first = place.plain(ended.stdout.decode("ascii").splitlines()[0])
        found.append((ended.returncode, first, ended.stderr))
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(argv, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    found.append((ended.returncode, "", ended.stderr))
    said = (0, "changes of the model ? PLACE/out/loras/w.safetensors", b"")
    return found, [said] * 2 + [(1, "", b"")]  # as a shell's own commands end


# ---- bases


@odd("a base in scaled fp8")
def _(place: Place) -> Found:
    configs = tiny_configs()
    state = single_file_state(configs, random_states(configs))
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    weight = state[f"{key}.weight"]
    scale = weight.abs().max() / 448
    state |= {f"{key}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{key}.scale_weight": scale}
    save_file(state, place / "fp8.safetensors")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    loaded = load_base(place / "fp8.safetensors", config=configs).unet.get_parameter(name)
    return float((loaded - weight).abs().max() / weight.abs().max()) < 0.04, True


@odd("a base that is a UNet alone")
def _(place: Place) -> Found:
    configs = tiny_configs()
    state = single_file_state(configs, random_states(configs))
    alone = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    save_file(alone, place / "unet.safetensors")
    return place.refusal(lambda: load_base(place / "unet.safetensors", config=configs)), (
        "base: unet.safetensors is a UNet alone: it holds no VAE and no text encoder; give the whole checkpoint"
    )


@pytest.mark.parametrize("name", odd.cases)
def test_odd_input(name: str, tiny_folder: Path, tmp_path: Path, caplog, capsys):
    odd.check(name, Place(tmp_path, tiny_folder, caplog, capsys))
