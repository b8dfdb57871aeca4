"""Odd photos and masks in the graph: what the nodes say of them is what the command line says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .comfy_server import ComfyServer
from .graphs import node
from .test_photos import concept, extraction, photo_folder, preview_of, refusal

pytestmark = pytest.mark.usefixtures("comfy")


def test_what_is_not_read_of_a_folder_is_said(comfy: ComfyServer):
    folder = photo_folder(comfy, "odd", masks=False)
    (folder / "d.heic").write_bytes(b"")
    nearly = Image.open(folder / "a.png").convert("RGBA")
    nearly.putpixel((3, 3), (9, 9, 9, 254))
    nearly.save(folder / "a.png")
    prompt = {
        "1": node("FaR_LoadPhotos", folder="odd", max_side=0),
        "2": node("PreviewImage", images=["1", 0]),
    }
    assert comfy.run(prompt)["1"]["text"][0].splitlines() == [
        f"{folder / 'a.png'}: its alpha channel hides 0.00% of the frame, too little for a mask: ignored",
        f"{folder}: not read: d.heic (HEIC: save as PNG or JPEG)",
        "3 photos, 0 of them with a mask",
    ]


def spoilt(comfy: ComfyServer, name: str, level: int, box: tuple[int, int, int, int]) -> None:
    """Photos with masks, of which the first has but this box of this level."""
    folder = photo_folder(comfy, name)
    picture = np.zeros_like(np.asarray(Image.open(folder / "a.mask.png")))
    picture[box[1] : box[3], box[0] : box[2]] = level
    Image.fromarray(picture).save(folder / "a.mask.png")


def test_own_masks_are_judged_where_subjects_are_extracted(comfy: ComfyServer):
    spoilt(comfy, "tiny_mask", 255, (0, 0, 9, 9))
    prompt = extraction("tiny_mask", masks=["1", 1])
    del prompt["2"], prompt["3"]["inputs"]["sam_model"]
    report = comfy.run(prompt)["4"]["text"][0].splitlines()
    assert report[0].startswith(
        "left out: photo 1 (a): the subject covers 0.42% of the frame, less than min_area (3.00%)"
    )
    assert report[1:] == ["photo 2 (b): own mask", "photo 3 (c): own mask"]


def test_own_masks_are_judged_where_they_are_fused(comfy: ComfyServer):
    """They come there without any extraction, too."""
    spoilt(comfy, "whole_mask", 255, (0, 0, 999, 999))
    prompt = {
        "1": node("FaR_LoadPhotos", folder="whole_mask", max_side=0),
        "2": concept(["1", 0], ["1", 1]),
        "3": preview_of("2"),
    }
    said = comfy.run(prompt)["3"]["text"][0]
    words = (
        "concept <red-disc>, photo 1: the mask covers 100.00% of the frame, more than max_area (95.00%); the photo is"
    )
    assert words in said
    spoilt(comfy, "whole_mask", 255, (40, 40, 49, 49))
    assert "concept <red-disc>, photo 1: the subject covers 0.42% of the frame" in comfy.run(prompt)["3"]["text"][0]
    prompt["3"]["inputs"]["min_area"] = 0.0
    assert "photo 1" not in comfy.run(prompt)["3"]["text"][0]


def test_faint_and_inverted_masks_are_not_taken_for_none(comfy: ComfyServer):
    spoilt(comfy, "faint_mask", 1, (30, 30, 90, 90))
    prompt = extraction("faint_mask", masks=["1", 1])
    del prompt["2"], prompt["3"]["inputs"]["sam_model"]
    assert (
        "photo 1 (a): its mask has only the values 0 and 1 of 255; save the subject as 255" in refusal(comfy, prompt)[1]
    )
    folder = photo_folder(comfy, "faint_mask")
    inverted = 255 - np.asarray(Image.open(folder / "a.mask.png"))
    Image.fromarray(inverted).save(folder / "a.mask.png")
    assert "not the subject; put InvertMask before this node" in refusal(comfy, prompt)[1]
