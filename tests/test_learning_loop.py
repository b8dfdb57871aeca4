"""The loop that all trainings of the small models share: it stops, resumes, ends by steps or by the clock, saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.small_models import learning
from benchmarks.small_models.learning import LearnConfig, draw_rows, fit, learning_rate, load_averaged
from far_train.training.run_folder import read_metrics
from far_train.utils.errors import CheckpointError, Interrupted, TrainingDiverged

from .learning_runs import losses, quick


def toy(folder: Path, config: LearnConfig, in_step: Callable[[int], None] = lambda step: None, **options) -> nn.Module:
    """Fit a line by the shared loop; ``in_step(step)`` is called within each step."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def step_loss(step: int):
        in_step(step)
        x = torch.randn(config.batch_size, 3, generator=torch.Generator().manual_seed(step))
        error = (module(x) - x.sum(1, keepdim=True)).square().mean()
        return error, {"error": error}

    return fit(module, step_loss, config, folder, {"model": "toy"}, **options)


def test_a_stopped_run_ends_in_the_same_bits(tmp_path):
    config = quick(steps=20, save_every=6)
    whole = toy(tmp_path / "whole", config)
    calls = iter([*[False] * 9, True])
    with pytest.raises(Interrupted, match="step 9 of 20"):
        toy(tmp_path / "cut", config, should_stop=lambda: next(calls))
    again = toy(tmp_path / "cut", config)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    kept, step = load_averaged(whole, tmp_path / "cut")
    assert step == 20 and torch.equal(kept[0].weight, whole[0].weight)
    sessions = [json.loads(line) for line in (tmp_path / "cut" / "sessions.jsonl").read_text().splitlines()]
    assert [(s["from_step"], s["to_step"]) for s in sessions] == [(0, 9), (9, 20)]


def test_a_run_may_be_extended_but_not_changed(tmp_path):
    toy(tmp_path, quick(steps=4))
    toy(tmp_path, quick(steps=8))
    assert len(losses(tmp_path)) == 8
    with pytest.raises(CheckpointError, match="lr"):
        toy(tmp_path, quick(steps=8, lr=0.5))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_averaged(nn.Linear(1, 1), tmp_path / "nothing")


def test_a_pause_ends_a_session_and_a_loss_that_is_not_finite_ends_a_run(tmp_path):
    with pytest.raises(Interrupted, match="step 0"):
        toy(tmp_path / "late", quick(pause_after=0.0))
    module = nn.Linear(1, 1)
    with pytest.raises(TrainingDiverged, match="up to step 1"):
        fit(module, lambda step: (module.weight.sum() * torch.inf, {}), quick(), tmp_path / "inf", {})


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A stop between two lines of metrics must look at the steps since, too."""
    module, calls = nn.Linear(1, 1), iter([False, False, True])
    with pytest.raises(TrainingDiverged, match="up to step 2"):
        fit(
            module,
            lambda step: (module.weight.sum() * torch.nan, {}),
            quick(log_every=50),
            tmp_path,
            {},
            should_stop=lambda: next(calls),
        )
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_error_between_steps_loses_none_of_them(tmp_path):
    """As when the disk is full for scenes that are still being rendered."""
    calls = iter([None, None, None, OSError("the disk is full")])

    def before_step() -> None:
        if error := next(calls):
            raise error

    with pytest.raises(OSError, match="disk is full"):
        toy(tmp_path, quick(log_every=50), before_step=before_step)
    assert [p.name for p in tmp_path.rglob("checkpoint-*")] == ["checkpoint-00000003.safetensors"]
    assert len(losses(tmp_path)) == 1


def test_minutes_end_a_run_by_the_clock_which_a_resumed_one_reads_on(tmp_path, monkeypatch):
    now = 100.0

    def tick() -> float:
        return now

    def pass_time(step: int) -> None:
        nonlocal now
        now += 10.0  # a step takes ten seconds

    def wait_for_data() -> None:
        nonlocal now
        now += 500.0 * (now in (100.0, 1620.0))  # before the first step of each session

    monkeypatch.setattr(learning.time, "monotonic", tick)
    config = quick(steps=1, warmup=2, lr=1.0, minutes=1.0, save_every=2)
    calls = iter([False, False, True])
    with pytest.raises(Interrupted, match="step 2"):
        toy(tmp_path, config, in_step=pass_time, before_step=wait_for_data, should_stop=lambda: next(calls))
    now += 1000.0  # between two sessions no time counts, nor does waiting for data
    assert now == 1620.0
    toy(tmp_path, config, in_step=pass_time, before_step=wait_for_data)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["seconds"] for row in rows] == [10, 20, 30, 40, 50, 60]
    expected = [0.5 * (1 + np.cos(np.pi * k / 6)) * min(k / 2, 1) for k in range(1, 7)]  # at the end of each step
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_schedule_and_rows():
    config = LearnConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and rates[-1] < 0.001
    assert torch.equal(draw_rows(1, 5, 8, 100), draw_rows(1, 5, 8, 100))
    assert not torch.equal(draw_rows(1, 5, 8, 100), draw_rows(1, 6, 8, 100))
