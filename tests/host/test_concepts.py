"""FaR_Concept in the real host: masks as LoadImage and other stock nodes send them, names that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .comfy_server import ComfyServer, PromptRejected
from .graphs import node
from .photos import concept, photo_folder, preview_of, refusal, subject


@pytest.fixture(scope="module")
def loaded(comfy: ComfyServer) -> None:
    """input/opaque.png, and input/cut_out.png with transparent surroundings."""
    picture, alpha = subject(100, 120)
    Image.fromarray(picture).save(comfy.folder("input") / "opaque.png")
    Image.fromarray(np.dstack([picture, alpha])).save(comfy.folder("input") / "cut_out.png")


def test_load_image_without_alpha(comfy: ComfyServer, loaded: None):
    """Its mask is 64×64 zeros."""
    prompt = {"1": node("LoadImage", image="opaque.png"), "2": concept(["1", 0], ["1", 1]), "3": preview_of()}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "the photo's mask is empty" in words and "Load Image" in words


def test_load_image_with_alpha(comfy: ComfyServer, loaded: None):
    """Its mask is 1 − alpha."""
    prompt = {"1": node("LoadImage", image="cut_out.png"), "2": concept(["1", 0], ["1", 1]), "3": preview_of()}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "photo 1" in words and "switch invert_mask on" in words
    prompt["2"] = concept(["1", 0], ["1", 1], invert_mask=True)
    outputs = comfy.run(prompt)
    assert outputs["2"]["text"] == ["<red-disc> disc: 1 photo"]


def test_masks_of_stock_nodes(comfy: ComfyServer, loaded: None):
    Image.fromarray(subject(100, 120)[1]).save(comfy.folder("input") / "mask.png")
    prompt = {
        "1": node("LoadImage", image="opaque.png"),
        "4": node("LoadImage", image="mask.png"),
        "5": node("ImageToMask", image=["4", 0], channel="red"),
        "2": concept(["1", 0], ["5", 0]),
        "3": preview_of(),
        "7": concept(["1", 0], ["5", 0], token="<whole-disc>", concepts=["2", 0]),
        "8": preview_of("7"),
    }
    outputs = comfy.run(prompt)
    assert "2 concepts: <red-disc> disc, <whole-disc> disc" in outputs["8"]["text"][0]
    prompt["6"] = node("SolidMask", value=1.0, width=120, height=100)
    prompt["7"]["inputs"]["masks"] = ["6", 0]
    node_id, words = refusal(comfy, prompt)
    assert node_id == "8" and "concept <whole-disc>, photo 1: the mask covers 100.00% of the frame" in words
    prompt["6"]["inputs"]["width"] = 100
    node_id, words = refusal(comfy, prompt)
    assert node_id == "7" and "photo 1: its mask is 100×100 pixels, but the photo 120×100" in words


def test_photos_without_masks_are_left_out_by_number(comfy: ComfyServer):
    folder = photo_folder(comfy, "one_missing")
    (folder / "b.mask.png").unlink()
    prompt = {
        "1": node("FaR_LoadPhotos", folder="one_missing", max_side=1024),
        "2": concept(["1", 0], ["1", 1]),
        "3": preview_of(),
    }
    outputs = comfy.run(prompt)
    assert outputs["2"]["text"] == ["skipped, since their masks are empty: photo 2\n<red-disc> disc: 2 photos"]


def test_photos_are_called_by_their_files(comfy: ComfyServer):
    """Here and in what Concept Fusion says; from Extract Subject, which skips two of three, as from Load Photos."""
    folder = photo_folder(comfy, "named")
    Image.new("L", (160, 120)).save(folder / "a.mask.png")
    Image.new("L", (100, 160), 255).save(folder / "b.mask.png")
    prompt = {
        "1": node("FaR_LoadPhotos", folder="named", max_side=1024),
        "2": concept(["1", 0], ["1", 1], names=["1", 2]),
        "3": preview_of(),
    }
    outputs = comfy.run(prompt)
    skipped, doubted, *_ = outputs["2"]["text"][0].splitlines()
    assert skipped == "skipped, since their masks are empty: a" and doubted.startswith("b: the mask covers more than")
    assert "concept <red-disc>, b: the mask covers 100.00% of the frame" in outputs["3"]["text"][0]

    Image.fromarray(subject(20, 160)[1]).crop((0, 0, 160, 120)).save(folder / "a.mask.png")  # too small
    chosen = {"box_format": "x0, y0, x1, y1", "points": "", "min_area": 0.03}
    prompt["4"] = node("FaR_ExtractSubject", images=["1", 0], masks=["1", 1], names=["1", 2], **chosen)
    prompt["2"] = concept(["4", 0], ["4", 1], names=["4", 4], invert_mask=True)
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and words.startswith("c: its mask marks the frame")
    prompt["2"] = concept(["4", 0], ["4", 1], names=["1", 2])
    warning, text = comfy.run(prompt)["2"]["text"][0].splitlines()
    assert warning.startswith("got 1 photo but 3 names;") and text == "<red-disc> disc: 1 photo"


def test_batches_meet_batches(comfy: ComfyServer, loaded: None):
    prompt = {
        "1": node("LoadImage", image="opaque.png"),
        "4": node("RepeatImageBatch", image=["1", 0], amount=3),
        "5": node("LoadImage", image="cut_out.png"),
        "6": node("InvertMask", mask=["5", 1]),
        "7": node("MaskToImage", mask=["6", 0]),
        "8": node("RepeatImageBatch", image=["7", 0], amount=3),
        "9": node("ImageToMask", image=["8", 0], channel="red"),
        "2": concept(["4", 0], ["9", 0]),
        "3": preview_of(),
    }
    assert comfy.run(prompt)["2"]["text"] == ["<red-disc> disc: 3 photos"]
    prompt["2"] = concept(["4", 0], ["6", 0])
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "3 photos but 1 mask;" in words


def test_bad_names_are_refused_with_a_suggestion(comfy: ComfyServer, loaded: None):
    prompt = {
        "1": node("LoadImage", image="cut_out.png"),
        "3": preview_of(),
        "2": concept(["1", 0], ["1", 1], token="Red Disc", invert_mask=True),
    }
    with pytest.raises(PromptRejected, match="write it as <red-disc>"):
        comfy.queue(prompt)
    prompt["2"] = concept(["1", 0], ["1", 1], noun="<disc>", invert_mask=True)
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "is not a class noun" in words
    prompt["2"] = concept(["1", 0], ["1", 1], invert_mask=True)
    prompt["4"] = concept(["1", 0], ["1", 1], invert_mask=True, concepts=["2", 0])
    prompt["5"] = preview_of("4")
    node_id, words = refusal(comfy, prompt)
    assert node_id == "4" and "give each its own" in words
