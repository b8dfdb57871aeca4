"""Odd masks, and odd inputs of fusion: what is said or made of them. See :mod:`.odd_registry`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from far_train.data.folders import describe_unread
from far_train.data.images import load_photo

from .odd_registry import SIDE, Found, Place, Registry, mask, photo
from .tiny_sam import save_tiny, tiny_sam

odd = Registry()


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
            return said, f"far_train: error: concept <rex>, PLACE/subjects/a.png: {words}, or remove this photo"
        return said, f"concept <rex>, PLACE/subjects/a.png: {words}; the photo is skipped."


for name, (wrong, words) in WRONG_MASKS.items():
    mask_case(name, wrong, words)


@odd("a class picture with a mask white all over")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask())
    photo(place / "dogs/a.png", mask(outside=255))
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--prior", "dog", place / "dogs"]
    said = place.run(*argv, "--size", 64, "--count", 1, "--out", place / "data")[0]
    return said, (
        "PLACE/dogs/a.png: the mask covers 100.00% of the frame, more than max_area (95.00%); the mask is ignored."
    )


@odd("a small subject that min_area allows")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask((5, 5, 15, 15)))
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--size", 64, "--count", 1, "--min-area", 0.01]
    return place.run(*argv, "--out", place / "data")[-1], (
        "1 composites and 0 regularization images → PLACE/data; look at PLACE/data/contact-sheet.jpg"
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
        "Layout 'beside_prior' (40% of the composites) is skipped: there are no regularization images with masks that "
        "show the whole subject.",
        "<rex>: photos that crop the subject at a side are used for 'original' only: PLACE/subjects/left.png.",
        "<rex>: subjects cropped at the bottom are placed on the lower edge: PLACE/subjects/low.png.",
        "1 regularization image(s) crop their subject, so it is not placed beside yours.",
    ]


@odd("no backgrounds")
def _(place: Place) -> Found:
    photo(place / "subjects/a.png", mask())
    argv = ["fuse", "--concept", "<rex>", "dog", place / "subjects", "--size", 64, "--count", 1]
    return place.run(*argv, "--out", place / "data")[1], (
        "No background pictures are given: 57% of the backgrounds are photos with their subject filled in, which "
        "leaves a blurred outline; the others are plain colors. Empty scenes work better (--backgrounds; 'far_train "
        "scenes' or FaR Empty Scenes draws some)."
    )


@pytest.mark.parametrize("name", odd.cases)
def test_odd_input(name: str, tiny_folder: Path, tmp_path: Path, caplog, capsys):
    odd.check(name, Place(tmp_path, tiny_folder, caplog, capsys))


@pytest.mark.parametrize("suffix", [".mask.PNG", ".MASK.PNG", ".Mask.png"])
def test_a_mask_file_is_read_whatever_its_case(tmp_path, suffix):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.jpg")
    Image.new("L", (40, 30), 255).save(tmp_path / f"dog{suffix}", format="PNG")
    assert load_photo(tmp_path / "dog.jpg").mask.mean() == 1 and not describe_unread(tmp_path)
    (tmp_path / f"dog{suffix}").rename(tmp_path / "dog.mAsk.png")
    assert "dog.mAsk.png (let its name end in .mask.png)" in describe_unread(tmp_path)
