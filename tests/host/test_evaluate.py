"""FaR_Evaluate in the real host: with the oracle, with encoders on disk, with masks and with segment-anything."""

from __future__ import annotations

from typing import Any

import pytest

from ..tiny_encoders import write_encoder
from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node
from .photos import pictures

ORACLE = "FaR mini oracle (built in)"


def judged(picture_of: str = "rex", encoder: str = ORACLE, **inputs: Any) -> dict[str, Any]:
    """Photos of two subjects as concepts, and other photos of one of them judged by FaR_Evaluate (20)."""
    prompt = {"1": node("FaR_LoadSAM", model_name="FaR mini SAM (built in)")}
    before: dict[str, Any] = {}
    for i, (subject, noun) in enumerate((("rex", "dog"), ("bolt", "robot"))):
        photos, cut, concept = (str(number + i) for number in (10, 12, 14))
        prompt |= {
            photos: node("FaR_MiniPhotos", subject=subject, count=3),
            cut: node("FaR_ExtractSubject", images=[photos, 0], names=[photos, 1], sam_model=["1", 0],
                      box_format="x0, y0, x1, y1", points="", min_area=0.0),
            concept: node("FaR_Concept", images=[cut, 0], masks=[cut, 1], token=f"<{subject}-{noun}>", noun=noun,
                          invert_mask=False, **before),
        }  # fmt: skip
        before = {"concepts": [concept, 0]}
    images = ["12", 0] if picture_of == "rex" else ["13", 0]
    wired = {"images": images, "concepts": ["15", 0], "encoder": encoder, "presence": 0.6}
    return prompt | {
        "20": node("FaR_Evaluate", **wired | inputs),
        "21": node("PreviewAny", source=["20", 0]),
        "22": node("SaveImage", images=["20", 1], filename_prefix="plot"),
        "23": node("SaveImage", images=["20", 2], filename_prefix="seen"),
        "24": node("MaskToImage", mask=["20", 4]),
        "25": node("SaveImage", images=["24", 0], filename_prefix="masks"),
    }


def rows_of(outputs: dict) -> dict[str, list[str]]:
    """The table's cells by concept."""
    lines = [line for line in outputs["21"]["text"][0].splitlines() if line.startswith("| <")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("who", ["rex", "bolt"])
def test_the_oracle_judges_drawn_subjects_by_itself(comfy: ComfyServer, who: str):
    outputs = comfy.run(judged(who))
    rows = rows_of(outputs)
    present = {name: row[2] for name, row in rows.items()}
    mine = "<rex-dog> dog" if who == "rex" else "<bolt-robot> robot"
    assert present == {name: "100%" if name == mine else "0%" for name in rows} and len(rows) == 2
    assert float(rows[mine][0]) > 0.9 and float(rows[mine][3]) < 0.2
    assert "3 pictures: right 0%" in outputs["21"]["text"][0]  # the other one is missing everywhere
    (plot,), seen = pictures(comfy, outputs["22"]), pictures(comfy, outputs["23"])
    assert plot.shape == (380, 900, 3) and len(seen) == 3
    masks = pictures(comfy, outputs["25"])  # of each picture one for rex and one for bolt
    shares = [float((mask > 127).mean()) for mask in masks]
    here, missing = (shares[0::2], shares[1::2]) if who == "rex" else (shares[1::2], shares[0::2])
    assert len(masks) == 6 and min(here) > 0.05 and max(missing) == 0
    assert outputs["20"]["images"] and "Detect-and-Compare" in outputs["20"]["text"][0]


def test_encoders_on_disk_and_of_the_host(comfy: ComfyServer):
    """Random weights know nothing; but the same photos must be like themselves, and all ways must run."""
    folder = comfy.folder("models/clip_vision") / "tiny-dino"
    folder.mkdir(parents=True)
    write_encoder(folder, "dinov2")
    for inputs in (
        {"encoder": "tiny-dino", "masks": ["12", 1]},
        {"encoder": "automatic", "sam_model": ["1", 0]},
        {"encoder": "automatic", "clip_vision": ["30", 0], "masks": ["12", 1]},
    ):
        prompt = judged(**inputs) | ({"30": node("FaRTest_ClipVision")} if "clip_vision" in inputs else {})
        rows = rows_of(comfy.run(prompt))
        assert 0.5 < float(rows["<rex-dog> dog"][0]) <= 1.0
    with pytest.raises(ExecutionFailed, match="where are the subjects. Connect masks"):
        comfy.run(judged(encoder="tiny-dino"))
    with pytest.raises(ExecutionFailed, match="concepts: expected FAR_CONCEPTS of another node"):
        comfy.run(judged(encoder="tiny-dino", masks=["12", 1], concepts="rex"))
    with pytest.raises(ExecutionFailed, match="got 3 masks for 1 picture"):
        comfy.run(judged(encoder="tiny-dino", masks=["12", 1], images=["31", 0])
                  | {"31": node("EmptyImage", width=64, height=64, batch_size=1, color=0)})  # fmt: skip


def test_without_an_encoder_it_says_how_to_get_one(comfy: ComfyServer):
    for path in (comfy.folder("models/clip_vision")).glob("*/config.json"):
        path.rename(path.with_name("moved.json"))
    with pytest.raises(ExecutionFailed, match="FaR_Evaluate.*no image encoder in models/clip_vision: put DINOv2"):
        comfy.run(judged(encoder="automatic"))
