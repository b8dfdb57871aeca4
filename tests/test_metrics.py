"""Metrics of steps: in order, late on a GPU, and an end after several steps that are not finite."""

from __future__ import annotations

import json
import math

import pytest
import torch

from far_train.evaluation.sheets import loss_curves
from far_train.training.callbacks import Callbacks
from far_train.training.metrics import DEPTH, NAMES, Readback, StepReports
from far_train.training.run_folder import MetricsLog, read_metrics
from far_train.training.watch import DivergenceWatch, PaceWatch
from far_train.utils.errors import TrainingDiverged

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter decides only how far the host may be ahead


def values(loss: float) -> torch.Tensor:
    return torch.tensor([loss, 1.0, 2.0, 3.0, 4.0, loss])


def test_on_the_cpu_values_come_at_once():
    readback = Readback(CPU)
    readback.put(1, values(0.5))
    ((step, metrics),) = readback.take()
    assert step == 1 and metrics == {**dict(zip(NAMES, (0.5, 1.0, 2.0, 3.0, 4.0, 0.5))), "finite": True}
    assert readback.take() == []


def test_on_a_gpu_they_come_later_and_in_order():
    readback, seen = Readback(CUDA), []
    for step in range(1, 6):
        readback.put(step, values(step))
        seen.append([s for s, _ in readback.take()])
    assert seen == [[]] * DEPTH + [[1], [2], [3]]
    assert [s for s, _ in readback.drain()] == [4, 5]


def test_each_step_is_told_and_several_that_are_not_finite_end_the_run():
    readback, told = Readback(CPU), []
    callbacks = Callbacks(on_step=lambda step, metrics: told.append((step, metrics)))
    reports = StepReports(
        readback,
        None,
        callbacks,
        max_non_finite=2,
        divergence=DivergenceWatch(with_base=True),
        pace=PaceWatch(on_gpu=False),
    )
    for step, loss in ((1, 0.5), (2, math.nan), (3, 0.25), (4, math.inf)):
        readback.put(step, values(loss))
        reports.report()
    assert [(step, m["finite"]) for step, m in told] == [(1, True), (2, False), (3, True), (4, False)]
    assert all(m["seconds"] >= 0 for _, m in told)
    readback.put(5, values(math.nan))
    with pytest.raises(TrainingDiverged, match="not finite for 2 steps up to step 5"):
        reports.report()


def test_a_loss_far_above_the_bases_ends_the_run_and_slow_steps_are_told(monkeypatch):
    """A clock that stands still but for the steps: 0.1 s each, and then 4 s."""
    readback, now, told, seen = Readback(CPU), [0.0], [], []
    monkeypatch.setattr("far_train.training.metrics.time.perf_counter", lambda: now[0])
    reports = StepReports(
        readback,
        None,
        Callbacks(on_step=lambda step, _: seen.append(step), on_note=told.append),
        max_non_finite=2,
        divergence=DivergenceWatch(with_base=True),
        pace=PaceWatch(on_gpu=False),
    )
    with pytest.raises(TrainingDiverged, match=r"the loss up to step 216 is 3\.0 times the untouched base model's"):
        for step in range(1, 1000):
            now[0] += 4.0 if step > 100 else 0.1
            readback.put(step, torch.tensor([1.0, 0.6 if step > 200 else 0.15, 0.0, 0.0, 0.2, 1.0]))
            reports.report()
    assert seen[-1] == 216  # the step that decides is reported, too
    assert len(told) == 1 and told[0].startswith("steps take 4.0 s since step 101, 0.1 s before")


def test_the_file_of_metrics_is_json_whatever_a_step_gave(tmp_path):
    """JSON has no NaN: jq and JavaScript refuse a file that holds one."""

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    with MetricsLog(tmp_path / "metrics.jsonl") as history:
        history.add(1, {"loss": math.nan, "grad_norm": -math.inf, "prior": 0.5, "finite": False})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    known = {"step": 1, "loss": None, "grad_norm": None, "prior": 0.5, "finite": False}
    assert json.loads(line, parse_constant=refuse) == known
    loss_curves([*read_metrics(tmp_path / "metrics.jsonl"), {"step": 2, "prior": 0.25}])  # a gap, and no error
