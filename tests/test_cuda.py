"""What only a CUDA device can show. Skipped, and said so, where there is none; one test wants a second device."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from far_train.models.apply import applied_weights
from far_train.models.loading import load_base
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.training.memory_plan import MemoryPlan
from far_train.training.metrics import NAMES, Readback
from far_train.training.recipe import TrainingRun, train
from far_train.training.settings import TrainConfig
from far_train.utils.out_of_memory import out_of_memory

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
QUICK = TrainConfig(steps=3, batch_size=2, prior_batch_size=2, sample_every=0, device="cuda")


def open_run(tiny_folder: Path, fusion, folder: Path, **settings) -> TrainingRun:
    return TrainingRun(load_base(tiny_folder), fusion, QUICK.replace(**settings), folder)


def read_back(device: torch.device) -> list[float]:
    """Metrics that are computed behind long work on ``device`` and copied in the background."""
    readback, work = Readback(device), torch.randn(4096, 4096, device=device)
    for _ in range(50):
        work = work @ work / 4096
    values = work.abs().sum().clamp(max=0) + torch.arange(float(len(NAMES)), device=device)
    readback.put(1, values)
    return [v for k, v in readback.drain()[0][1].items() if k != "finite"]


def test_metrics_are_read_when_they_are_there():
    assert read_back(torch.device("cuda")) == list(range(len(NAMES)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device, and there is one")
def test_metrics_of_a_device_that_is_not_the_current_one(tiny_folder: Path, fusion, tmp_path: Path):
    torch.cuda.set_device(0)
    assert read_back(torch.device("cuda:1")) == list(range(len(NAMES)))
    run = open_run(tiny_folder, fusion, tmp_path, device="cuda:1")
    assert run.train_step()["finite"]
    run.close()


def test_an_allocation_that_fails_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert out_of_memory(caught.value)


def test_a_step_that_runs_out_of_memory_is_taken_with_less_at_once(tiny_folder: Path, fusion, tmp_path: Path):
    run = open_run(tiny_folder, fusion, tmp_path, memory="fast", cuda_graph="off")  # a graph would keep what it needs
    run.train_step()  # sets up the libraries' workspaces, which stay
    fallback = run.state.oom_fallback
    held = {}
    for plan in (MemoryPlan(1, checkpointing=True), MemoryPlan(4, checkpointing=False)):
        fallback.use(plan)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run.train_step()
        held[plan] = torch.cuda.max_memory_reserved()
    least, most = held.values()
    try:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((least + 0.5 * (most - least)) / total)
        assert run.train_step()["finite"]
        assert fallback.plan.micro_batch < 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        run.close()


def test_captured_runs_leave_no_memory_behind(tiny_folder: Path, fusion, tmp_path: Path):
    left = []
    for i in range(4):
        run = open_run(tiny_folder, fusion, tmp_path / str(i), cuda_graph="on")
        for _ in range(2):
            run.train_step()
        run.close()
        del run
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_reserved())
    assert left[3] <= left[1]


def test_the_first_step_is_the_cpus(tiny_folder: Path, fusion, tmp_path: Path):
    """Same samples and noise; the loss of the first step, before anything is learned."""
    losses = {}
    for name, settings in {
        "cpu": {"device": "cpu"},
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
    }.items():
        run = open_run(tiny_folder, fusion, tmp_path / name, **settings)
        losses[name] = run.train_step()["loss"]
        run.close()
    assert losses["fp32"] == pytest.approx(losses["cpu"], rel=1e-2)
    assert losses["bf16"] == pytest.approx(losses["cpu"], rel=5e-2)
    assert losses["fp16"] == pytest.approx(losses["cpu"], rel=2e-2)


def test_a_compiled_run_compiles_all_and_samples(tiny_folder: Path, fusion, tmp_path: Path):
    counters.clear()
    torch._dynamo.reset()
    base = load_base(tiny_folder)
    train(base, fusion, QUICK.replace(compile=True, sample_every=2, sample_steps=1, steps=4), tmp_path)
    assert 0 < counters["stats"]["unique_graphs"] <= 12
    assert not counters["unimplemented"] and not counters["graph_break"]


def test_a_learned_word_is_drawn_in_fp16(tiny_folder: Path, fusion, tmp_path: Path):
    base = load_base(tiny_folder)
    weights = train(base, fusion, QUICK, tmp_path)
    assert base.device.type == "cpu" and base.unet.dtype == torch.float32  # as it was
    with applied_weights(weights, base) as vocabulary, base.placed("cuda", torch.float16):
        picture = draw_pictures(base, vocabulary, ["a <red-ball> ball"], SampleConfig(sampling_steps=2))
    assert bool(picture.isfinite().all())


GRAPHED = {
    "defaults": {},
    "kv": {"trainable": "kv"},
    "micro-batches": {"micro_batch": 3},
    "lean": {"memory": "lean"},
    "fp16": {"precision": "fp16"},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize("settings", GRAPHED.values(), ids=GRAPHED)
def test_a_hundred_captured_steps_are_the_eager_ones(tiny_folder: Path, fusion, tmp_path: Path, settings, caplog):
    losses = {}
    for mode in ("on", "off"):
        run = open_run(tiny_folder, fusion, tmp_path / mode, **{"precision": "fp32", "cuda_graph": mode, **settings})
        losses[mode] = [run.train_step()["loss"] for _ in range(100)]
        run.close()
    tolerance = 2e-2 if settings.get("precision") == "fp16" else 1e-3
    assert losses["on"] == pytest.approx(losses["off"], rel=tolerance)
    assert "can't be captured" not in caplog.text


def test_a_captured_run_samples_saves_and_resumes(tiny_folder: Path, fusion, tmp_path: Path, caplog):
    settings = {"cuda_graph": "on", "sample_every": 2, "sample_steps": 1, "save_every": 1, "steps": 6}
    whole = train(load_base(tiny_folder), fusion, QUICK.replace(**settings), tmp_path / "whole")
    short = open_run(tiny_folder, fusion, tmp_path / "run", **settings)
    for _ in range(3):
        short.train_step()
    short.save_checkpoint()
    short.close()
    resumed = train(load_base(tiny_folder), fusion, QUICK.replace(**settings), tmp_path / "run", resume=True)
    for name in whole.shapes():
        assert torch.allclose(whole.delta(name).float(), resumed.delta(name).float(), atol=1e-4), name
    assert "can't be captured" not in caplog.text and len(list((tmp_path / "whole" / "samples").iterdir())) > 2


def test_a_captured_step_that_runs_out_of_memory_is_captured_anew(tiny_folder: Path, fusion, tmp_path: Path):
    run = open_run(tiny_folder, fusion, tmp_path, memory="fast", cuda_graph="on")
    passes = run.state.graphed_passes
    calls, capture = [], passes._capture

    def once_full(compute, inputs):
        calls.append(len(inputs["latents"]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(compute, inputs)

    passes._capture = once_full
    assert run.train_step()["finite"] and run.train_step()["finite"]
    assert calls == [4, 2] and run.state.oom_fallback.plan == MemoryPlan(2, checkpointing=False)
    run.close()
