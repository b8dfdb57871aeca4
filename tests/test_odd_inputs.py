"""A registry of odd inputs that people bring: for each, the smallest one, and exactly what is said or made of it.

A case builds its input below ``place``, runs the real command line or the library's entry, and returns what it found
and what is right. Paths in what is said stand below ``PLACE``. A new oddity becomes a new case.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from far_train.data.images import load_photo
from far_train.mini.tiny import random_states, single_file_state, tiny_configs
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights

from .icc import grey_profile, rgb_profile
from .odd_registry import CASES, SIDE, Found, Place, mask, odd, photo
from .test_weights import make_low_rank
from .tiny_sam import save_tiny, tiny_sam

ROOT = Path(__file__).resolve().parents[1]


# ---- photos


@odd("a photo in Display P3")
def _(place: Place) -> Found:
    pixels = np.array([[(170, 124, 76), (128, 159, 82), (185, 71, 58)]], dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    alpha = np.full((16, 48, 1), 255, dtype=np.uint8)
    alpha[:, :16] = 7
    picture = Image.fromarray(np.concatenate([pixels, alpha], 2))
    picture.save(place / "p3.png", icc_profile=rgb_profile())
    read = load_photo(place / "p3.png")
    colours = (read.image[0, 8::16] * 255).round()
    right = torch.tensor([(178, 122, 66), (120, 160, 70), (200, 60, 50)])
    near, kept = bool(((colours - right).abs() <= 1).all()), (read.mask[:, :16] * 255).unique().tolist()
    return (near, kept, read.notes), (True, [7.0], ())


@odd("a grey photo of gamma 1.0")
def _(place: Place) -> Found:
    Image.new("L", (32, 32), 128).save(place / "grey.png", icc_profile=grey_profile(1.0))
    level = float(load_photo(place / "grey.png").image[0, 0, 0] * 255)
    return abs(level - 188) <= 1, True  # half the light


@odd("a damaged colour profile")
def _(place: Place) -> Found:
    Image.new("RGB", (32, 32), (10, 20, 30)).save(place / "a.png", icc_profile=b"no profile")
    read = load_photo(place / "a.png")
    return ((read.image[0, 0] * 255).tolist(), [place.plain(n) for n in read.notes]), (
        [10, 20, 30],
        [
            "PLACE/a.png: its colour profile can't be used (cannot open profile from string); its colours are read as "
            "sRGB"
        ],
    )


@odd("a photo in Adobe RGB without a profile")
def _(place: Place) -> Found:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (32, 32)).save(place / "a.jpg", exif=exif)
    notes = [place.plain(n) for n in load_photo(place / "a.jpg").notes]
    return notes, ["PLACE/a.jpg: says that its colours are Adobe RGB but has no profile; export it as sRGB"]


@odd("a mask with a colour profile")
def _(place: Place) -> Found:
    photo(place / "a.png")
    mask(inside=200).save(place / "a.mask.png", icc_profile=grey_profile(1.0))
    return float(load_photo(place / "a.png").mask.max() * 255), 200


@odd("an alpha channel that hides one pixel")
def _(place: Place) -> Found:
    picture = Image.open(photo(place / "photos/a.png")).convert("RGBA")
    picture.putpixel((3, 3), (9, 9, 9, 254))
    picture.save(place / "photos/a.png")
    save_tiny(place / "sam.safetensors", tiny_sam())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out", "--min-area", 0, "--max-area", 1]
    said = place.run(*argv, "--sam", place / "sam.safetensors")
    return (said[0], load_photo(place / "out/a.png").mask.mean().item() == 1), (
        "PLACE/photos/a.png: its transparency hides 0.00% of the frame, too little for a mask: not used",
        False,  # SAM's mask and not the frame
    )


@odd("files of other kinds among the photos")
def _(place: Place) -> Found:
    photo(place / "photos/a.jpg", mask())
    for name in ("b.heic", "d.HEIC", "c.gif", "z.mask.png", "notes.txt", "x.doc", ".hidden", "Thumbs.db"):
        (place / f"photos/{name}").write_bytes(b"")
    photo(place / "photos/more/e.jpg")
    said = place.run("extract", "--photos", place / "photos", "--out", place / "out")
    return said, [
        "PLACE/photos: not read: b.heic, d.HEIC (HEIC: save as PNG or JPEG); c.gif (GIF: save as PNG or JPEG); more (a "
        "folder below, whose pictures don't count); x.doc (no picture); z.mask.png (a mask without its photo)",
        "1 of 1 photos → PLACE/out; look at PLACE/out.preview.jpg",
    ]


@odd("a folder of HEIC alone")
def _(place: Place) -> Found:
    (place / "photos/b.heic").write_bytes(b"")
    return place.run("extract", "--photos", place / "photos", "--out", place / "out"), [
        "far_train: error: PLACE/photos: holds no photos; put pictures in it (png, jpg, jpeg, webp, bmp, tif, tiff); "
        "not read: b.heic (HEIC: save as PNG or JPEG)"
    ]


@odd("subjects inside the folder of photos, twice")
def _(place: Place) -> Found:
    photo(place / "photos/a.jpg", mask())
    argv = ["extract", "--photos", place / "photos", "--out", place / "photos/out"]
    place.run(*argv)
    return place.run(*argv), [
        "PLACE/photos: not read: out.preview.jpg (a sheet that FaR made for you to look at)",
        "1 of 1 photos → PLACE/photos/out; look at PLACE/photos/out.preview.jpg",
    ]


@odd("a photo that was deleted between two runs")
def _(place: Place) -> Found:
    for name in "abc":
        photo(place / f"photos/{name}.jpg", mask())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out"]
    place.run(*argv)
    (place / "photos/c.jpg").unlink()
    (place / "photos/c.mask.png").unlink()
    return (place.run(*argv), place.run(*argv, "--keep-others")), (
        [
            "far_train: error: PLACE/out: holds c.png, which come from no photo in PLACE/photos; delete them with "
            "their masks, choose another folder, or give --keep-others to learn them as well"
        ],
        ["2 of 2 photos → PLACE/out; look at PLACE/out.preview.jpg"],
    )


@odd("a mask that was emptied between two runs")
def _(place: Place) -> Found:
    for name in "ab":
        photo(place / f"photos/{name}.jpg", mask())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out"]
    place.run(*argv)
    mask(inside=0).save(place / "photos/b.mask.png")
    said = place.run(*argv)
    left = sorted(p.relative_to(place / "out").as_posix() for p in (place / "out").rglob("*.png"))
    return (said, left), (
        [
            "PLACE/out/b.png: is of an earlier run, and its photo was skipped now; it was moved to PLACE/out/leftovers",
            "skipped: PLACE/photos/b.jpg: the mask is empty: it is black all over; save the subject as white (255)",
            "1 of 2 photos → PLACE/out; look at PLACE/out.preview.jpg",
        ],
        ["a.mask.png", "a.png", "leftovers/b.mask.png", "leftovers/b.png"],
    )


@odd("masks that were mended by hand where subjects are extracted anew")
def _(place: Place) -> Found:
    for name in "ab":
        photo(place / f"photos/{name}.jpg", mask())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out"]
    place.run(*argv)
    mask((20, 20, 50, 50)).save(place / "out/b.mask.png")
    return place.run(*argv)[0], "PLACE/out: other masks took the place of those of an earlier run: b.png"


@odd("a photo of 99 megapixels")
def _(place: Place) -> Found:
    Image.new("L", (11000, 9000)).save(place / "large.png", compress_level=1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shape = load_photo(place / "large.png", 64).image.shape
    return (tuple(shape), [w for w in warned if w.category is Image.DecompressionBombWarning]), ((52, 64, 3), [])


@odd("8 bits kept in 16")
def _(place: Place) -> Found:
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint16)).save(place / "a.png")
    return place.refusal(lambda: load_photo(place / "a.png")), (
        "PLACE/a.png: holds 16-bit pixels from 255 to 255, whose white level is unknown; save it as 8 or 16 bit"
    )


# ---- masks

WRONG_MASKS = {
    "white all over": (mask(outside=255), "the mask covers 100.00% of the frame, more than max_area (95.00%)"),
    "black on white": (
        mask(inside=0, outside=255),
        "the mask marks the frame around the subject and not the subject, so it looks inverted; save it with the "
        "subject white and the rest black",
    ),
    "of 0 and 1": (mask(inside=1), "the mask has only the values 0 and 1 of 255; save the subject as 255"),
    "too faint": (
        Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda v: v // 3),
        "the mask is empty: its brightest value is 84 of 255; save the subject as 255",
    ),
    "a speck": (
        mask((5, 5, 10, 10)),
        "the subject covers 0.61% of the frame, less than min_area (3.00%)",
    ),
    "dust all over": (
        Image.fromarray(np.indices((SIDE, SIDE)).sum(0).astype(np.uint8) % 2 * 255),
        "the subject covers 0.02% of the frame, less than min_area (3.00%)",
    ),
}


def mask_case(name: str, wrong: Image.Image, words: str) -> None:
    @odd(f"extract: a mask {name}")
    def _(place: Place) -> Found:
        photo(place / "photos/a.jpg", wrong)
        photo(place / "photos/b.jpg", mask())
        return place.run("extract", "--photos", place / "photos", "--out", place / "out")[0], (
            f"skipped: PLACE/photos/a.jpg: {words}"
        )

    @odd(f"fuse: a mask {name}")
    def _(place: Place) -> Found:
        photo(place / "subjects/a.png", wrong)
        photo(place / "subjects/b.png", mask())
        argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--size", 64, "--count", 1]
        said = place.run(*argv, "--out", place / "data")[0]
        if "of 255" in words:  # such a file is damaged: nothing of it can be meant
            return said, f"far_train: error: PLACE/subjects/a.png: {words}, or leave this photo out"
        return said, f"PLACE/subjects/a.png: {words}; the photo is left out."


for name, (wrong, words) in WRONG_MASKS.items():
    mask_case(name, wrong, words)


@odd("a class picture with a mask white all over")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask())
    photo(place / "dogs/a.png", mask(outside=255))
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--prior", "dog", place / "dogs"]
    said = place.run(*argv, "--size", 64, "--count", 1, "--out", place / "data")[0]
    return said, (
        "PLACE/dogs/a.png: the mask covers 100.00% of the frame, more than max_area (95.00%); the mask is left out."
    )


@odd("a small subject that min_area allows")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask((5, 5, 15, 15)))
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--size", 64, "--count", 1, "--min-area", 0.01]
    return place.run(*argv, "--out", place / "data")[-1], (
        "1 composites and 0 class pictures → PLACE/data; look at PLACE/data/contact-sheet.jpg"
    )


@odd("an inverted mask as a hint")
def _(place: Place) -> Found:
    photo(place / "photos/a.jpg", mask(inside=0, outside=255))
    save_tiny(place / "sam.safetensors", tiny_sam())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out", "--use-masks", "hint"]
    return "looks inverted" in place.run(*argv, "--sam", place / "sam.safetensors")[-1], True


# ---- fusion


@odd("photos that cut the subject off")
def _(place: Place) -> Found:
    photo(place / "subjects/left.png", mask((0, 10, 30, 50)))
    photo(place / "subjects/low.png", mask((10, 30, 50, 64)))
    photo(place / "subjects/whole.png", mask())
    photo(place / "dogs/right.png", mask((40, 10, 64, 50)))
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--prior", "dog", place / "dogs", "--size", 64]
    said = place.run(*argv, "--count", 1, "--out", place / "data", "--backgrounds", place / "dogs")
    return said[:-1], [
        "Layout 'beside_prior' (40% of the composites) falls away: there are no class pictures with masks that show "
        "the subject whole.",
        "<rex>: photos that cut the subject off at a side serve for 'original' alone: PLACE/subjects/left.png.",
        "<rex>: photos that cut the subject off at the bottom put it on the lower edge: PLACE/subjects/low.png.",
        "1 class picture(s) cut the subject off at a side, so it isn't put beside yours.",
    ]


@odd("no backgrounds")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask())
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--size", 64, "--count", 1]
    return place.run(*argv, "--out", place / "data")[1], (
        "No background pictures are given: 57% of the backgrounds are photos filled in where their subject was, which "
        "looks like fog in its outline, the others plain colours. Better give empty scenes (--backgrounds; 'far "
        "scenes' or FaR Empty Scenes draw some)."
    )


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
        "far_train: error: PLACE/data/composites/0001.jpg: dataset.json doesn't know it (0001.png is missing); give a "
        "composite its old name and format (PNG) again, and move other pictures out of the folder"
    ]


@odd("a picture added to the composites")
def _(place: Place) -> Found:
    data = place.dataset()
    photo(data / "composites/mine.png")
    return place.train(), [
        "far_train: error: PLACE/data/composites/mine.png: dataset.json doesn't know it; give a composite its old name "
        "and format (PNG) again, and move other pictures out of the folder"
    ]


# ---- runs and files


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
    for variables in ({"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        for unbuffered in ("", "1"):
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
    return found, [said] * 4 + [(1, "", b"")]  # as a shell's own commands end


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


@pytest.mark.parametrize("name", CASES)
def test_odd_input(name: str, tiny_folder: Path, tmp_path: Path, caplog, capsys):
    caplog.set_level("INFO")
    found, right = CASES[name](Place(tmp_path, tiny_folder, caplog, capsys))
    assert found == right
