"""Odd photos and folders of photos: what is said or made of them. See :mod:`.odd_registry`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from far_train.data.images import load_photo

from .icc import grey_profile, rgb_profile
from .odd_registry import Found, Place, Registry, mask, photo
from .tiny_sam import save_tiny, tiny_sam

odd = Registry()


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
        ["PLACE/a.png: its color profile can't be used (cannot open profile from string); its colors are read as sRGB"],
    )


@odd("a photo in Adobe RGB without a profile")
def _(place: Place) -> Found:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (32, 32)).save(place / "a.jpg", exif=exif)
    notes = [place.plain(n) for n in load_photo(place / "a.jpg").notes]
    return notes, ["PLACE/a.jpg: is marked as Adobe RGB but has no profile; export it as sRGB"]


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
        "PLACE/photos/a.png: its alpha channel hides 0.00% of the frame, too little for a mask: ignored",
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
        "subfolder, which is not searched); x.doc (not a picture); z.mask.png (a mask without its photo)",
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
        "PLACE/photos: not read: out.preview.jpg (a contact sheet written by FaR)",
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
            "far_train: error: PLACE/out: holds c.png, which belong to no photo in PLACE/photos; delete them with "
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
            "PLACE/out/b.png: is from an earlier run, but its photo is now skipped; moved to PLACE/out/leftovers",
            "skipped: PLACE/photos/b.jpg: the mask is empty: it is black all over; save the subject as white (255)",
            "1 of 2 photos → PLACE/out; look at PLACE/out.preview.jpg",
        ],
        ["a.mask.png", "a.png", "leftovers/b.mask.png", "leftovers/b.png"],
    )


@odd("masks edited by hand, and subjects extracted again")
def _(place: Place) -> Found:
    for name in "ab":
        photo(place / f"photos/{name}.jpg", mask())
    argv = ["extract", "--photos", place / "photos", "--out", place / "out"]
    place.run(*argv)
    mask((20, 20, 50, 50)).save(place / "out/b.mask.png")
    return place.run(*argv)[0], "PLACE/out: these masks of an earlier run were replaced by different ones: b.png"


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


@pytest.mark.parametrize("name", odd.cases)
def test_odd_input(name: str, tiny_folder: Path, tmp_path: Path, caplog, capsys):
    odd.check(name, Place(tmp_path, tiny_folder, caplog, capsys))
