"""Photos in the host's folders, and pieces of prompts that load, save and fuse them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node

SIZES = {"a": (120, 160), "b": (160, 100), "c": (96, 96)}  # height, width


def subject(height: int, width: int, colour: tuple[int, int, int] = (230, 30, 30)) -> tuple[np.ndarray, np.ndarray]:
    """A coloured disc on greenish ground and its mask, uint8."""
    rows, columns = np.indices((height, width))
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (0.3 * min(height, width)) ** 2
    picture = np.where(inside[..., None], np.array(colour), np.array((128, 150, 128))).astype(np.uint8)
    return picture, (255 * inside).astype(np.uint8)


def photo_folder(comfy: ComfyServer, name: str, masks: bool = True, sizes: dict = SIZES) -> Path:
    """Photos of mixed sizes in a folder of the host's input folder."""
    folder = comfy.folder("input") / name
    folder.mkdir(exist_ok=True)
    for stem, size in sizes.items():
        picture, mask = subject(*size)
        Image.fromarray(picture).save(folder / f"{stem}.png")
        if masks:
            Image.fromarray(mask).save(folder / f"{stem}.mask.png")
    return folder


def pictures(comfy: ComfyServer, output: dict) -> list[np.ndarray]:
    """The saved pictures of a SaveImage node, in order."""
    return [np.asarray(Image.open(comfy.file(item)).convert("RGB")) for item in output["images"]]


def saved(image: list, mask: list) -> dict:
    """Nodes 90 to 92: save images and masks where a test can read them."""
    return {
        "90": node("SaveImage", images=image, filename_prefix="image"),
        "91": node("MaskToImage", mask=mask),
        "92": node("SaveImage", images=["91", 0], filename_prefix="mask"),
    }


def refusal(comfy: ComfyServer, prompt: dict) -> tuple[str, str]:
    """The id of the node at which a prompt fails, and its words."""
    with pytest.raises(ExecutionFailed) as failed:
        comfy.run(prompt)
    (error,) = failed.value.errors
    return error.node_id, error.message


def concept(images: list, masks: list, **changes) -> dict:
    return node(
        "FaR_Concept",
        **{"images": images, "masks": masks, "token": "<red-disc>", "noun": "disc", "invert_mask": False} | changes,
    )


def preview_of(node_id: str = "2") -> dict:
    """An output node that makes the host run the concept of ``node_id``."""
    return node(
        "FaR_ConceptFusion",
        concepts=[node_id, 0],
        size=64,
        count=2,
        fusion_seed=0,
        flip=0.5,
        original=1.0,
        solo=0.0,
        pair=0.0,
        triple=0.0,
        beside_prior=0.0,
    )


def extraction(folder: str, min_area: float = 0.03, points: str = "", **changes) -> dict:
    return {
        "1": node("FaR_LoadPhotos", folder=folder, max_side=1024),
        "2": node("FaR_LoadSAM", model_name="tiny.safetensors"),
        "3": node(
            "FaR_ExtractSubject",
            **{
                "images": ["1", 0],
                "names": ["1", 2],
                "sam_model": ["2", 0],
                "box_format": "x0, y0, x1, y1",
                "points": points,
                "min_area": min_area,
            }
            | changes,
        ),
        **saved(["3", 0], ["3", 1]),
        "4": node("PreviewAny", source=["3", 2]),
        "5": node("PreviewImage", images=["3", 3]),
    }
