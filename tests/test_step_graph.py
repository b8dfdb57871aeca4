"""The step behind a CUDA graph: a stand-in refuses what a capture forbids, so that it works where a GPU is there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from far_train.models.base import BaseModel
from far_train.models.loading import load_base
from far_train.training.memory_plan import MemoryPlan
from far_train.training.recipe import TrainingRun
from far_train.training.settings import TrainConfig
from far_train.training.step import graph_passes
from far_train.training.step_graph import GraphedPasses, uses_cuda_graph
from far_train.utils.errors import ConfigError

from .capture_stand_in import NotCapturable, StandInGraph
from .test_recipe import state_of

QUICK = TrainConfig(steps=6, batch_size=3, prior_batch_size=2, sample_every=0, device="cpu", precision="fp32")
QUICK = QUICK.replace(lora_lr=1e-3, kv_lr=1e-4, refinement_ramp=0.5)


def opened(base: BaseModel, fusion, folder: Path, graph: StandInGraph | None = None, **settings) -> TrainingRun:
    run = TrainingRun(base, fusion, QUICK.replace(**settings), folder)
    if graph:
        run.state.graphed_passes = graph_passes(run.state, graph)
        run.state.oom_fallback.on_change = run.state.graphed_passes.release
    return run


# ---- the stand-in itself refuses what CUDA refuses


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("forbidden", "words"),
    [
        (lambda x: x * float(x.sum()), "makes the host wait"),
        (lambda x: x * x[x > 0].sum(), "makes the host wait"),
        (lambda x: x * torch.tensor([2.0, 3.0]), "values of the host"),
        (lambda x: x * torch.arange(2), "without a device"),
    ],
)
def test_what_a_capture_forbids_is_noticed(forbidden, words: str):
    with pytest.raises(NotCapturable, match=words):
        StandInGraph()(lambda inputs: forbidden(inputs["x"]), {"x": torch.ones(2)})


@pytest.mark.parametrize("changing", ["number", "tensor", "shape"])
def test_what_a_replay_would_not_see_is_noticed(changing: str):
    state = {"number": 1.0, "tensor": torch.ones(2), "shape": torch.ones(3)}

    def compute(inputs):
        return inputs["x"] * state["number"] + state["tensor"] + state["shape"].sum()

    replay = StandInGraph()(compute, {"x": torch.ones(2)})
    assert replay().tolist() == [5.0, 5.0]
    state[changing] = {"number": 2.0, "tensor": torch.ones(2), "shape": torch.ones(4)}[changing]
    with pytest.raises(NotCapturable, match="differs from the capture"):
        replay()


# ---- captured passes


def test_captured_passes_add_to_gradients_that_stay_where_they_are():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def compute(inputs):
        loss = (weight * inputs["x"]).sum()
        loss.backward()
        return loss.detach()[None]

    graph = StandInGraph()
    passes = GraphedPasses(compute, [weight], CPU, graph)
    assert passes({"x": torch.tensor([1.0, 1.0])}).tolist() == [3.0]
    address = weight.grad.data_ptr()
    figures = passes({"x": torch.tensor([2.0, 0.0])})
    assert weight.grad.tolist() == [3.0, 1.0] and weight.grad.data_ptr() == address
    passes({"x": torch.tensor([9.0, 9.0])})
    assert figures.tolist() == [2.0]  # a later call leaves earlier figures alone
    assert (graph.captures, graph.replays) == (1, 3)
    passes({"x": torch.tensor([[1.0, 1.0]])})  # another shape
    assert graph.captures == 2
    passes.release()
    passes({"x": torch.tensor([1.0, 1.0])})
    assert graph.captures == 3


def test_what_can_not_be_captured_runs_eagerly_and_says_so_once(caplog):
    calls = []

    def refuse(compute, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    passes = GraphedPasses(lambda inputs: calls.append(1) or inputs["x"] * 2, [], CPU, refuse)
    assert [float(passes({"x": torch.tensor(float(i))})) for i in range(3)] == [0.0, 2.0, 4.0]
    assert len(calls) == 3 and caplog.text.count("can't be captured") == 1 and "not permitted" in caplog.text


def test_out_of_memory_in_a_capture_is_passed_on():
    def full(compute, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    passes = GraphedPasses(lambda inputs: inputs["x"], [], CPU, full)
    with pytest.raises(torch.OutOfMemoryError):
        passes({"x": torch.ones(1)})


# ---- whole steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable": "kv", "vectors_per_token": 2},
        {"micro_batch": 2},  # 2 + 2 + 1 samples: two graphs
        {"memory": "lean", "fp8_base": True},
        {"refinement_weight": 0.0, "prior_batch_size": 0},
        {"localization": "none", "per_mention": False, "min_snr_gamma": None},
        {"precision": "fp16", "batch_size": 1, "prior_batch_size": 0},  # few samples: a CPU takes long for them
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()) or "defaults",
)
def test_graph_and_eager_learn_the_same(base: BaseModel, tiny_folder: Path, fusion, tmp_path: Path, settings: dict):
    before = state_of(base)
    eager = opened(base, fusion, tmp_path / "eager", **settings)
    expected = [eager.train_step() for _ in range(2)]
    expected_rows = [p.detach().clone() for p in eager.state.adapter.named_parameters().values()]
    eager.close()
    graph = StandInGraph()
    run = opened(load_base(tiny_folder), fusion, tmp_path / "graph", graph, **settings)
    got = [run.train_step() for _ in range(2)]
    tolerance = 2e-2 if settings.get("precision") == "fp16" else 1e-3
    for name in ("loss", "denoising", "refinement", "prior", "grad_norm"):
        assert [m[name] for m in got] == pytest.approx([m[name] for m in expected], rel=tolerance, abs=1e-5), name
    for mine, theirs in zip(run.state.adapter.named_parameters().values(), expected_rows):
        assert torch.allclose(mine.detach(), theirs, rtol=tolerance, atol=1e-3 * float(theirs.abs().max()))
    run.close()
    shapes = 2 if "micro_batch" in settings else 1
    assert graph.captures == shapes and graph.replays == 2 * (3 if "micro_batch" in settings else 1)
    assert all(torch.equal(before[k], v) for k, v in state_of(base).items())


def test_every_family_can_be_captured(family_base: BaseModel, fusion, tmp_path: Path):
    eager = opened(family_base, fusion, tmp_path / "eager")
    expected = [eager.train_step()["loss"] for _ in range(2)]
    eager.close()
    graph = StandInGraph()
    run = opened(family_base, fusion, tmp_path / "graph", graph)
    assert [run.train_step()["loss"] for _ in range(2)] == pytest.approx(expected, rel=1e-3)
    run.close()
    assert (graph.captures, graph.replays) == (1, 2)


def test_a_captured_run_is_sampled_saved_and_resumed(tiny_folder: Path, fusion, tmp_path: Path):
    def finished(folder: Path, stop: int | None) -> list[Tensor]:
        graph, settings = StandInGraph(), {"steps": 3, "sample_every": 2, "sample_steps": 1, "save_every": 1}
        run = opened(load_base(tiny_folder), fusion, folder, graph, **settings)
        if stop:
            run.callbacks = run.callbacks.__class__(should_stop=lambda: run.state.step == stop)
            with pytest.raises(Exception, match="resume"):
                run.fit()
            run.close()
            run = TrainingRun(load_base(tiny_folder), fusion, QUICK.replace(**settings), folder, resume=True)
            run.state.graphed_passes = graph_passes(run.state, graph)
        run.fit()
        assert graph.captures > 1  # once more after each drawing
        values = [p.detach().clone() for p in run.state.adapter.named_parameters().values()]
        run.close()
        return values

    whole, resumed = finished(tmp_path / "whole", None), finished(tmp_path / "resumed", 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_memory_that_runs_out_makes_other_graphs(tiny_folder: Path, fusion, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)

    class Tight(StandInGraph):
        """Refuses graphs of more than two samples."""

        def __call__(self, compute, inputs):
            if len(inputs["latents"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(compute, inputs)

    roomy = opened(load_base(tiny_folder), fusion, tmp_path / "roomy", StandInGraph())
    tight = opened(load_base(tiny_folder), fusion, tmp_path / "tight", Tight())
    expected, got = ([run.train_step()["loss"] for _ in range(2)] for run in (roomy, tight))
    assert got == pytest.approx(expected, rel=1e-4)
    assert tight.state.oom_fallback.plan == MemoryPlan(2, checkpointing=False)
    roomy.close()
    tight.close()
    assert "continuing with micro_batch 2" in caplog.text


# ---- the setting


def test_graphs_are_for_cuda_devices():
    cuda = torch.device("cuda:1")
    chosen = {c: uses_cuda_graph(TrainConfig(cuda_graph=c), cuda) for c in ("auto", "on", "off")}
    assert chosen == {"auto": True, "on": True, "off": False}
    assert not uses_cuda_graph(TrainConfig(), CPU) and not uses_cuda_graph(TrainConfig(cuda_graph="off"), CPU)
    with pytest.raises(ConfigError, match="cuda_graph: on needs a CUDA device"):
        uses_cuda_graph(TrainConfig(cuda_graph="on"), CPU)


def test_a_run_refuses_what_its_device_can_not_do(base: BaseModel, fusion, tmp_path: Path):
    with pytest.raises(ConfigError, match="cuda_graph"):
        TrainingRun(base, fusion, QUICK.replace(cuda_graph="on"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
