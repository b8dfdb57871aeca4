"""Boxes through links, from the host's own nodes and from other packs."""

from __future__ import annotations

import numpy as np
import pytest

from .comfy_server import ComfyServer
from .graphs import node
from .photos import extraction, photo_folder, pictures

pytestmark = pytest.mark.usefixtures("sam_file")


def test_boxes_of_either_type_can_be_linked(comfy: ComfyServer):
    """The host's own nodes send BOUNDING_BOX, other packs BBOX: both do the same as four numbers written down."""
    photo_folder(comfy, "boxed", masks=False)
    written = comfy.run(extraction("boxed", 0.0, '{"1": {"box": [40, 20, 90, 80]}, "2": {"box": [40, 20, 90, 80]}, '
                                   '"3": {"box": [40, 20, 90, 80]}}'))  # fmt: skip
    senders = ["FaRTest_BoundingBox", "FaRTest_BBox"]
    senders += [name for name in ("PrimitiveBoundingBox",) if name in comfy.object_info()]  # newer hosts have it
    for sender in senders:
        prompt = extraction("boxed", 0.0, box=["8", 0]) | {"8": node(sender, x=40, y=20, width=50, height=60)}
        linked = comfy.run(prompt)
        assert linked["4"]["text"] == written["4"]["text"]
        for a, b in zip(pictures(comfy, linked["92"]), pictures(comfy, written["92"])):
            assert np.array_equal(a, b)


def test_a_photo_in_which_a_detector_found_nothing_is_named(comfy: ComfyServer):
    photo_folder(comfy, "detected", masks=False)
    prompt = extraction("detected", 0.0, box=["8", 0])
    prompt["8"] = node("FaRTest_BoundingBox", x=40, y=20, width=50, height=60, frames="1, 2, 0")
    told = comfy.run(prompt)["3"]["text"][0].splitlines()
    assert "photo 3 (c): no box was given; SAM looked in the middle of the photo" in told[:-1]


def test_a_number_chooses_the_box_where_photos_have_no_mask(comfy: ComfyServer):
    """FaR Load Photos sends an empty mask for each; the middle of a photo is no answer to 'subject number' 2."""
    photo_folder(comfy, "numbered", masks=False)
    box = node("FaRTest_BoundingBox", x=40, y=20, width=50, height=60, frames="1, 2, 0")
    for index, used in ((1, "ab"), (2, "b")):
        prompt = extraction("numbered", 0.0, box=["8", 0], index=index) | {"8": box}
        without = comfy.run(prompt)["4"]["text"]
        prompt["3"]["inputs"]["masks"] = ["1", 1]
        assert comfy.run(prompt)["4"]["text"] == without
        lines = dict(zip("abc", without[0].splitlines(), strict=True))
        assert [name for name in lines if "score" in lines[name]] == list(used)
        assert f"photo 3 (c): index: there is no box {index} of 0" in lines["c"]
