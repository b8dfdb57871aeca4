"""What goes wrong in a training in the graph doesn't take the host with it, and the next run passes."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_train.models.weights import FarWeights
from far_train.training.run_folder import read_metrics

from ..tiny_encoders import write_encoder
from ..tiny_sam import save_tiny, tiny_sam
from .comfy_server import ComfyServer, ExecutionFailed, default_packs
from .faults import FAULTS, fault, held_bytes, wait_reached
from .find_host import REPO, Host
from .graphs import node
from .listener import Listener
from .test_evaluate import judged
from .test_fusion import drawing_priors
from .test_mini import line
from .test_training import run_folder, steps_of, training

PRIORS = {"prior_pictures": 1, "prior_steps": 2}


@pytest.fixture(scope="module")
def frail(host: Host) -> Iterator[ComfyServer]:
    """A host whose pack can be made to fail."""
    with ComfyServer(host, {**default_packs(), "far_test_faults": FAULTS}) as server:
        yield server


@pytest.fixture(scope="module")
def learned(frail: ComfyServer) -> FarWeights:
    """What a training that nothing disturbs learns."""
    return finished(frail, prompt_of(frail, "undisturbed"), "undisturbed")


def prompt_of(comfy: ComfyServer, name: str, priors: int = 2, options: dict | None = None) -> dict[str, Any]:
    """Four steps with a checkpoint after the second and sample pictures after the third."""
    options = {"save_every": 2, "sample_every": 3, **PRIORS, **(options or {})}
    prompt = training(comfy, name, steps=4, sample_prompt="a <red-ball> ball", options=options)
    prompt["2"] = node("FaRTest_Dataset", count=3, fusion_seed=0, priors=priors)
    return prompt


def finished(comfy: ComfyServer, prompt: dict, name: str) -> FarWeights:
    """Run to the end; what was learned."""
    comfy.run(prompt)
    assert steps_of(run_folder(comfy, name)) == [1, 2, 3, 4]
    return FarWeights.load(run_folder(comfy, name) / "weights.safetensors")


def same(a: FarWeights, b: FarWeights) -> bool:
    return a.digest() == b.digest()


@pytest.mark.parametrize("phase", ["priors", "encoding", "step", "save", "sampling"])
def test_a_cancel_in_every_phase(frail: ComfyServer, learned: FarWeights, phase: str):
    """Cancelled in the middle of the phase; queued again it goes on, and learns what it would have learned."""
    name, priors = f"cancel-{phase}", 0 if phase == "priors" else 2
    prompt = prompt_of(frail, name, priors)
    before = held_bytes(frail)
    fault(frail, phase)
    prompt_id = frail.queue(prompt)
    wait_reached(frail)
    with Listener(frail) as seen:
        entry = frail.cancel(prompt_id)
        seen.catch_up()
    assert [(e.kind, e.node_type) for e in frail.errors(entry)] == [("interrupted", "FaR_Train")]
    fault(frail, None)
    assert held_bytes(frail) == before
    folder = run_folder(frail, name)
    done = {"step": 1, "save": 2, "sampling": 3}.get(phase, 0)
    saved = sorted(p.name for p in folder.glob("checkpoints/*"))
    assert saved[-1:] == ([f"checkpoint-{done:08d}.safetensors"] if done else [])
    stands = f"stopped at step {done} of 4 and saved; press Run to resume"
    assert seen.texts[-1] == ("4", stands if done else "stopped before the first step; press Run to start over")
    assert not (folder / "weights.safetensors").exists()
    again = finished(frail, prompt, name)
    if phase == "priors":  # with class pictures of its own it learns something else than ``learned``
        assert not run_folder(frail, f"{name}-2").exists()
    else:
        assert same(again, learned)


@pytest.mark.parametrize("phase", ["encoding", "step"])
def test_a_cancelled_dry_run_is_no_error(frail: ComfyServer, phase: str):
    prompt = prompt_of(frail, f"dry-{phase}")
    prompt["4"]["inputs"]["dry_run"] = True
    fault(frail, phase)
    prompt_id = frail.queue(prompt)
    wait_reached(frail)
    entry = frail.cancel(prompt_id)
    fault(frail, None)
    assert [(e.kind, e.node_type) for e in frail.errors(entry)] == [("interrupted", "FaR_Train")]
    assert not run_folder(frail, f"dry-{phase}").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory", "OutOfMemory.*even one sample at a time"),
        ("memory while encoding", "can't allocate memory"),
        ("disk", "OutputError.*free space"),
        ("crash", "ZeroDivisionError"),
    ],
)
def test_a_failure_ends_the_run_and_not_the_host(frail: ComfyServer, learned: FarWeights, name: str, message: str):
    run = name.replace(" ", "-")
    prompt = prompt_of(frail, run)
    before = held_bytes(frail)
    fault(frail, name)
    with Listener(frail) as seen:
        with pytest.raises(ExecutionFailed, match=f"(?s)node 4 .FaR_Train.*{message}"):
            frail.run(prompt)
        seen.catch_up()
    fault(frail, None)
    node_id, words = seen.texts[-1]
    assert node_id == "4" and re.search(message.removeprefix("OutOfMemory.*").removeprefix("OutputError.*"), words)
    assert held_bytes(frail) == before
    assert same(finished(frail, prompt, run), learned)


@pytest.mark.parametrize(
    ("name", "told"), [("memory once", "gradient checkpointing"), ("preview", "preview could not be drawn")]
)
def test_a_failure_that_the_run_gets_over(frail: ComfyServer, name: str, told: str):
    before, logged = held_bytes(frail), len(frail.log())
    fault(frail, name)
    try:
        weights = finished(frail, prompt_of(frail, f"over-{name.replace(' ', '-')}"), f"over-{name.replace(' ', '-')}")
    finally:
        fault(frail, None)
    assert weights.provenance.steps == 4 and told in frail.log()[logged:]
    assert held_bytes(frail) == before


@pytest.mark.parametrize("what", ["run", "output"])
def test_a_deleted_folder(frail: ComfyServer, learned: FarWeights, what: str):
    """Taken away in the middle of a step. Whatever becomes of that run, the next one passes."""
    prompt = prompt_of(frail, f"deleted-{what}", options={"save_every": 1})
    fault(frail, "step")
    prompt_id = frail.queue(prompt)
    while not frail.get("/far_test/state")["reached"]:
        time.sleep(0.05)
    shutil.rmtree(run_folder(frail, f"deleted-{what}") if what == "run" else frail.base / "output")
    frail.post("/far_test/fault", {})
    frail.cancel(prompt_id)
    (frail.base / "output").mkdir(exist_ok=True)
    assert same(finished(frail, prompt_of(frail, f"after-{what}"), f"after-{what}"), learned)


def test_two_runs_queued_back_to_back(frail: ComfyServer, learned: FarWeights):
    ids = [frail.queue(prompt_of(frail, f"queued-{i}")) for i in range(2)]
    assert [frail.wait(i)["status"]["status_str"] for i in ids] == ["success"] * 2
    for i in range(2):
        assert same(FarWeights.load(run_folder(frail, f"queued-{i}") / "weights.safetensors"), learned)


def test_the_pack_loaded_twice(host: Host, learned: FarWeights):
    """A user has it in two folders: the host takes each node once, and trains."""
    with ComfyServer(host, {**default_packs(), "ComfyUI-FaR-copy": REPO}) as server:
        assert "IMPORT FAILED" not in server.start_log() and "Traceback" not in server.start_log()
        server.run(mini_training(server, "twice"))
        assert len(read_metrics(run_folder(server, "twice") / "metrics.jsonl")) == 2


def test_pictures_on_disk_are_used_without_a_base(frail: ComfyServer):
    """A mask that somebody paints is read; nothing else is computed, and no base is built for it."""
    prompt = drawing_priors(frail, seed=31)
    folder = Path(frail.run(prompt)["40"]["text"][0].rpartition(" in ")[2]) / "disc"
    Image.new("L", (64, 64), 255).save(folder / "0000.mask.png")
    fault(frail, "base")
    try:
        assert "2 regularization images, 1 of them with a mask" in frail.run(prompt)["40"]["text"][0]
        (folder / "0001.png").unlink()
        with pytest.raises(ExecutionFailed, match="FaR_ClassPrior.*ZeroDivisionError"):
            frail.run(prompt)
    finally:
        fault(frail, None)


# ---- soak


def mini_training(comfy: ComfyServer, name: str, seed: int = 0) -> dict[str, Any]:
    """The small model that comes with the pack learns a drawn dog for two steps."""
    return line(comfy, name, train_seed=seed)


def resident(comfy: ComfyServer) -> int:
    lines = Path(f"/proc/{comfy._process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def soak(comfy: ComfyServer, count: int) -> None:
    """``count`` trainings of the small model, all queued at once; memory after each of them."""
    if not Path("/proc").is_dir():
        pytest.skip("a process's memory is read from /proc, which this system lacks")
    fault(comfy, None)
    comfy.run(mini_training(comfy, "warm"))
    before = held_bytes(comfy)
    ids = [comfy.queue(mini_training(comfy, f"soak-{i}", seed=i)) for i in range(count)]
    sizes = []
    for i in ids:
        assert comfy.wait(i, 600)["status"]["status_str"] == "success"
        sizes.append(resident(comfy))
    assert held_bytes(comfy) == before
    assert all((run_folder(comfy, f"soak-{i}") / "weights.safetensors").exists() for i in range(count))
    settled = np.array(sizes[count // 3 :]) / 2**20  # allocators and caches fill up first
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    print(f"\n{count} runs; RSS {sizes[0] / 2**20:.0f} → {sizes[-1] / 2**20:.0f} MB, {slope:+.2f} MB a run at the end")
    assert slope * len(settled) < 0.05 * settled.mean(), sizes


def test_five_runs_queued_at_once(frail: ComfyServer):
    soak(frail, 5)


@pytest.mark.torture
def test_fifty_runs_queued_at_once(frail: ComfyServer):
    soak(frail, 50)


# ---- how long a cancel takes


@pytest.mark.torture
def test_how_soon_a_cancel_is_acknowledged(frail: ComfyServer):
    """Twelve cancels at any moment of a long training of the small model, from the request to the end of the run."""
    fault(frail, None)
    waited, step = [], 0.0
    for k in range(12):
        name = f"patience-{k}"
        prompt_id = frail.queue(line(frail, name, steps=10_000, train_seed=k))
        metrics, deadline = run_folder(frail, name) / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or len(read_metrics(metrics)) < 3:
            assert time.monotonic() < deadline, "the training didn't begin"
            time.sleep(0.05)
        began, before = time.monotonic(), len(read_metrics(metrics))
        time.sleep(1.5 + 0.1 * k)
        asked = time.monotonic()
        step = max(step, (asked - began) / max(len(read_metrics(metrics)) - before, 1))
        frail.cancel(prompt_id)
        waited.append(time.monotonic() - asked)
        assert not (run_folder(frail, name) / "weights.safetensors").exists()
        assert list(run_folder(frail, name).glob("checkpoints/checkpoint-*.safetensors"))
    print(f"\n{len(waited)} cancels: {min(waited):.2f} to {max(waited):.2f} s, a step takes up to {step:.2f} s")
    assert max(waited) <= step + 1


def test_the_hosts_models_make_room_for_an_encoder(frail: ComfyServer):
    """In FaR Evaluate, and in the check of a training, where there is a SAM as well."""
    folder = frail.folder("models/clip_vision/tiny-dino")
    write_encoder(folder, "dinov2")
    save_tiny(frail.folder("models/sams") / "tiny.safetensors", tiny_sam(3))
    fault(frail, "placements")
    try:
        frail.run(judged(encoder="tiny-dino", masks=["12", 1]))
        assert "Dinov2Model" in frail.get("/far_test/state")["reached"]
        fault(frail, "placements")
        frail.run(training(frail, "roomy", steps=1, options={"check_with": "tiny-dino"}))
        assert frail.get("/far_test/state")["reached"][:1] == ["Dinov2Model"]
        assert (run_folder(frail, "roomy") / "check.json").exists()
    finally:
        fault(frail, None)
        shutil.rmtree(folder)  # an encoder makes other trainings be checked
