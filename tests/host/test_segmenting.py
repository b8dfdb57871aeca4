"""Several masks and boxes of a photo through links, and one SAM for all nodes, of which nothing stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from ..tiny_sam import save_tiny, tiny_sam
from .comfy_server import ComfyServer, ExecutionFailed, default_packs
from .faults import FAULTS, fault, held_bytes, wait_reached
from .find_host import Host
from .graphs import node
from .photos import extraction, photo_folder, pictures

SQUARES = {"left": (4, 40), "right": (60, 90)}  # columns of the subjects, left to right; the right one is smaller
SIZE = (60, 96)  # height, width


@pytest.fixture(scope="module")
def segmenter(host: Host) -> Iterator[ComfyServer]:
    """A host with a small SAM, whose pack can be made to fail."""
    with ComfyServer(host, {**default_packs(), "far_test_faults": FAULTS}) as server:
        save_tiny(server.folder("models/sams") / "tiny.safetensors", tiny_sam(3))
        photo_folder(server, "one", masks=False, sizes={"a": SIZE})
        photo_folder(server, "two", masks=False, sizes={"a": SIZE, "b": SIZE})
        photo_folder(server, "many", masks=False, sizes={name: SIZE for name in "abcdef"})
        for name, columns in SQUARES.items():
            Image.fromarray(square(columns)).save(server.folder("input") / f"{name}.png")
        yield server


def square(columns: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[10:50, slice(*columns)] = 255
    return mask


def with_masks(folder: str, **changes) -> dict:
    """Two masks in one batch, as an instance segmenter sends them, for the photos of a folder."""
    prompt = extraction(folder, masks=["13", 0], **changes)
    del prompt["2"], prompt["3"]["inputs"]["sam_model"]
    return prompt | {
        "10": node("LoadImage", image="left.png"),
        "11": node("LoadImage", image="right.png"),
        "12": node("ImageBatch", image1=["10", 0], image2=["11", 0]),
        "13": node("ImageToMask", image=["12", 0], channel="red"),
    }


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({}, "left"),
        ({"index": 2}, "right"),
        ({"points": '[{"x": 70, "y": 20}]'}, "right"),
        ({"points": '{"1": {"box": [55, 5, 95, 55]}}'}, "right"),
        ({"negative_points": ["20", 0]}, "left"),
    ],
)
def test_one_of_two_masks_of_a_photo_is_chosen(segmenter: ComfyServer, changes: dict, chosen: str):
    prompt = with_masks("one", **changes)
    if "negative_points" in changes:
        prompt["20"] = node("PrimitiveString", value='[{"x": 70, "y": 20}]')
        prompt["3"]["inputs"]["points"] = '[{"x": 20, "y": 20}]'
    outputs = segmenter.run(prompt)
    (mask,) = pictures(segmenter, outputs["92"])
    assert np.array_equal(mask, square(SQUARES[chosen]))
    told = "photo 1 (a): of several masks the largest is used" in outputs["3"]["text"][0]
    assert told == (not changes)


def test_masks_of_several_photos_are_told_apart_by_boxes_or_refused(segmenter: ComfyServer):
    """In the first photo two were found and in the second none: by their number the masks are one each."""
    joined = {"4": node("PreviewAny", source=["3", 2])}
    boxes = {"14": node("FaRTest_BoundingBox", x=55, y=5, width=40, height=50, frames="2, 0")}
    batch = {"15": node("ImageBatch", image1=["16", 0], image2=["16", 0]), "16": node("LoadImage", image="left.png")}
    prompt = with_masks("two", images=["15", 0], names=["1", 2], box=["14", 0], index=2) | boxes | batch | joined
    outputs = segmenter.run(prompt)
    lines = outputs["4"]["text"][0].splitlines()
    assert lines[0] == "photo 1 (a): own mask"
    assert lines[1] == "skipped: photo 2 (b): index: there is no mask 2 of 0; 0 chooses by box, points or size"
    assert np.array_equal(pictures(segmenter, outputs["92"])[0], square(SQUARES["right"]))
    with pytest.raises(ExecutionFailed, match="got 6 photos but 2 masks; .*connect the detector's bboxes"):
        segmenter.run(with_masks("many"))


@pytest.mark.parametrize("images, index, side", [(["1", 0], 0, 30), (["1", 0], 2, 60), (["21", 0], 0, 30)])
def test_a_detectors_masks_and_boxes_go_together(segmenter: ComfyServer, images: list, index: int, side: int):
    """For a list of photos, where the detector runs once for each, and for a batch; the surest one by default."""
    photo_folder(segmenter, "large", masks=False, sizes={"a": (120, 160), "b": (120, 160)})
    prompt = extraction("large", masks=["20", 0], box=["20", 1], images=images, index=index)
    del prompt["2"], prompt["3"]["inputs"]["sam_model"]
    prompt["20"] = node("FaRTest_Instances", image=images)
    prompt["21"] = node("ImageBatch", image1=["22", 0], image2=["22", 0])
    prompt["22"] = node("LoadImage", image="large/a.png")
    masks = pictures(segmenter, segmenter.run(prompt)["92"])
    assert [int((mask[..., 0] > 127).sum()) for mask in masks] == [side * side] * 2


def two_extractions(seed: float = 0.0) -> dict:
    """Two loaders of one file, each with an Extract Subject of its own. ``seed``: changes what is computed."""
    prompt = extraction("many", seed)
    prompt["22"], prompt["23"] = dict(prompt["2"]), node("FaR_ExtractSubject", **prompt["3"]["inputs"])
    prompt["23"]["inputs"]["sam_model"] = ["22", 0]
    return {name: prompt[name] for name in ("1", "2", "3", "22", "23")}


def test_loaders_of_one_file_share_one_model(segmenter: ComfyServer):
    file = segmenter.folder("models/sams") / "tiny.safetensors"
    size = weights_bytes(file)
    none = held_bytes(segmenter)
    loaders = {name: node("FaR_LoadSAM", model_name="tiny.safetensors") for name in ("2", "22", "32")}
    watched = {f"5{name}": node("PreviewAny", source=[name, 0]) for name in loaders}
    segmenter.run(loaders | watched)
    held = segmenter.get("/far_test/state?memory=1")["bytes"] - none
    assert size <= held < 2 * size  # the model itself, and its few constants
    assert held_bytes(segmenter) == none


def weights_bytes(file: Path) -> int:
    with safe_open(file, "pt") as weights:
        return sum(weights.get_tensor(key).nbytes for key in weights.keys())


@pytest.mark.parametrize("end", ["success", "error", "cancel"])
def test_nothing_stays_in_memory(segmenter: ComfyServer, end: str):
    before = held_bytes(segmenter)
    prompt = two_extractions(0.0)
    if end == "success":
        segmenter.run(prompt)
        assert segmenter.get("/far_test/state?memory=1")["bytes"] > before
    elif end == "error":
        fault(segmenter, "crash while segmenting")
        with pytest.raises(ExecutionFailed, match="FaR_ExtractSubject.*ZeroDivisionError"):
            segmenter.run(prompt)
    else:
        fault(segmenter, "segmenting")
        prompt_id = segmenter.queue(prompt)
        wait_reached(segmenter)
        entry = segmenter.cancel(prompt_id)
        assert [(e.kind, e.node_type) for e in segmenter.errors(entry)] == [("interrupted", "FaR_ExtractSubject")]
    fault(segmenter, None)
    assert held_bytes(segmenter) == before
