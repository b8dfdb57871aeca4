"""The harness itself: the host starts with the test pack, draws a picture, and reports errors with their node."""

from __future__ import annotations

import struct
import time

import pytest

from .comfy_server import ComfyServer, ExecutionFailed, PromptRejected
from .find_host import Host


def drawing(prediction: str = "v_prediction", size: int = 128, **loader) -> dict:
    """An API-format prompt: tiny checkpoint → text → KSampler → VAEDecode → SaveImage."""
    loader = {"weights_seed": 0, "prediction": prediction} | loader
    return {
        "1": {"class_type": "FaRTest_TinyCheckpoint", "inputs": loader},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a dog on a (beach:1.2)"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 7,
                "steps": 3,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2], "samples": ["5", 0]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": f"tiny_{prediction}"}},
    }


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header chunk."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_test_pack_is_loaded_without_complaint(comfy: ComfyServer):
    info = comfy.object_info()["FaRTest_TinyCheckpoint"]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert "IMPORT FAILED" not in comfy.start_log()
    assert "Traceback" not in comfy.start_log()


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_host_draws_with_the_tiny_checkpoint(comfy: ComfyServer, prediction: str):
    outputs = comfy.run(drawing(prediction))
    picture = comfy.file(outputs["7"]["images"][0]).read_bytes()
    assert png_size(picture) == (128, 128)
    assert len(picture) > 5000  # A constant picture (NaNs decode to black) compresses to a few hundred bytes.


def test_the_prediction_type_reaches_the_sampler(comfy: ComfyServer):
    runs = [comfy.run(drawing(kind)) for kind in ("v_prediction", "epsilon")]
    first, second = (comfy.file(run["7"]["images"][0]).read_bytes() for run in runs)
    assert first != second


def test_sd21_sized_blocks_half_precision_and_encoding(comfy: ComfyServer):
    prompt = drawing(res_blocks=2, dtype="fp16")
    prompt["8"] = {"class_type": "VAEEncode", "inputs": {"vae": ["1", 2], "pixels": ["6", 0]}}
    prompt["9"] = {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2], "samples": ["8", 0]}}
    prompt["10"] = {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "round_trip"}}
    outputs = comfy.run(prompt)
    picture = comfy.file(outputs["10"]["images"][0]).read_bytes()
    assert png_size(picture) == (128, 128)
    assert len(picture) > 5000


def test_an_unchanged_prompt_comes_from_the_cache(comfy: ComfyServer):
    comfy.run(drawing())
    entry = comfy.wait(comfy.queue(drawing()))
    assert {"1", "5", "6"} <= comfy.cached(entry)


def test_a_bad_widget_is_refused_with_its_node(comfy: ComfyServer):
    with pytest.raises(PromptRejected, match="node 1 .FaRTest_TinyCheckpoint.*prediction") as refused:
        comfy.queue(drawing("x0"))
    assert "1" in refused.value.node_errors


def test_a_failing_node_is_named(comfy: ComfyServer):
    prompt = drawing(weights_seed=1)
    prompt["7"]["inputs"]["filename_prefix"] = "../outside"  # SaveImage refuses to leave the output folder.
    with pytest.raises(ExecutionFailed, match="node 7 .SaveImage.") as failed:
        comfy.run(prompt)
    assert [error.node_id for error in failed.value.errors] == ["7"]


def test_interrupt_and_restart(host):
    with ComfyServer(host, args=["--preview-method", "none"]) as server:
        prompt = drawing()
        prompt["5"]["inputs"]["steps"] = 10000
        prompt_id = server.queue(prompt)
        server.wait_running(prompt_id)
        deadline = time.monotonic() + 60
        while "model_type" not in server.log() and time.monotonic() < deadline:
            time.sleep(0.1)  # Once the log names the model type, the model is built and the sampler is next.
        server.interrupt(prompt_id)
        entry = server.wait(prompt_id, timeout=60)
        assert [error.kind for error in server.errors(entry)] == ["interrupted"]
        kept = server.folder("output") / "kept.txt"
        kept.write_text("x", encoding="utf-8")
        server.restart()
        assert kept.exists()
        assert server.get("/history") == {}
        assert server.run(drawing())["7"]["images"]


def test_missing_requirements_are_told_with_the_fix(host: Host, tmp_path):
    gone = "import sys\nsys.modules |= dict.fromkeys(('diffusers', 'segment_anything'))\n"
    (tmp_path / "sitecustomize.py").write_text(gone)
    with ComfyServer(host, env={"PYTHONPATH": str(tmp_path)}) as server:
        log = server.start_log()
        assert "IMPORT FAILED" in log and "FaR_Train" not in server.object_info()
    assert "no module diffusers, segment_anything. Install what the pack needs and start again: " in log
    assert f'"{host.python}" -m pip install -r "' in log and "ComfyUI-FaR/requirements.txt" in log
