"""A grid of runs on the real host: pictures by value, going on, and failures in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from far_train.cli.main import main

from .comfy_server import ComfyServer
from .graphs import node

COLOURS = {"255": (0, 0, 255), "65280": (0, 255, 0), "16711680": (255, 0, 0)}


@pytest.fixture
def file(tmp_path) -> Path:
    picture = node("EmptyImage", width=64, height=32, batch_size=2, color=0) | {"_meta": {"title": "Field"}}
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps({"1": picture, "2": node("SaveImage", images=["1", 0], filename_prefix="field")}))
    return path


def test_a_grid_on_the_host(comfy: ComfyServer, file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["queue", str(file), "--host", comfy.url, "--out", str(out), "--grid", "Field.width=64,96"]
    assert main([*argv, "--grid", "Field.color=255,65280"]) == 0
    capsys.readouterr()
    assert main([*argv, "--grid", f"Field.color={','.join(COLOURS)}"]) == 0
    told = capsys.readouterr().out
    assert "4 of 6 runs are in" in told and told.count("done: ") == 2 and "6 of 6 runs → " in told
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/run.json")]
    assert len(runs) == 6 and all(len(run["saved"]) == 2 and not run["shown"] for run in runs)
    for path in out.glob("*/run.json"):
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
        for picture in map(Image.open, path.parent.glob("*.png")):
            assert picture.width == values["Field.width"]
            assert picture.convert("RGB").getpixel((9, 9)) == COLOURS[str(values["Field.color"])]
    assert Image.open(out / "contact-sheet.jpg").width > 3 * 256


def test_a_value_that_the_host_refuses(comfy: ComfyServer, file, tmp_path, capsys):
    argv = ["queue", str(file), "--host", comfy.url, "--out", str(tmp_path / "out"), "--grid", "Field.height=32,-5"]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "'Field', height: Value -5 smaller than min of 1" in captured.err and "1 of 2 runs → " in captured.out


def test_a_run_that_fails_on_the_host(comfy: ComfyServer, file, tmp_path, capsys):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    workflow["3"] = node("SolidMask", value=0.0, width=64, height=32) | {"_meta": {"title": "Mask"}}
    workflow["4"] = node("FaR_Concept", images=["1", 0], masks=["3", 0], token="<a>", noun="dog", invert_mask=False)
    workflow["5"] = node("FaR_ConceptFusion", concepts=["4", 0], size=64, count=1, fusion_seed=0, flip=0.0)
    workflow["5"]["inputs"] |= dict.fromkeys(("original", "solo", "pair", "triple", "beside_prior"), -1.0)
    file.write_text(json.dumps(workflow))
    argv = ["queue", str(file), "--host", comfy.url, "--out", str(tmp_path / "out"), "--grid", "Mask.value=0.0,1.0"]
    assert main(argv) == 1
    errors = capsys.readouterr().err
    assert "2 of 2 runs failed" in errors
    assert all(f"value={value}: 'FaR_Concept' failed: got 2 photos but 1 mask" in errors for value in ("0.0", "1.0"))
