"""The plan by which a step fits into memory: from known figures, and from a trial on a pretended GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from far_train.training.memory_plan import MARGIN, MemoryPlan, Trial, choose_plan, plan_memory
from far_train.training.settings import TrainConfig

GB = 2**30


def plan(samples: int, free: float, fast: float, lean: float, graph: bool = False, **settings) -> MemoryPlan:
    """The plan for ``free`` GB, where one sample takes ``fast`` or, checkpointed, ``lean`` GB of an eager step."""
    trials = {False: Trial(fast * GB, int(free * GB / MARGIN)), True: Trial(lean * GB, int(free * GB / MARGIN))}
    return choose_plan(TrainConfig(**settings), samples, trials.__getitem__, graph)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (40, MemoryPlan(4, False)),  # all at once
        (6.1, MemoryPlan(4, False)),
        (5, MemoryPlan(2, False)),  # three fit, but two halves are as many parts and more even
        (2, MemoryPlan(1, False)),
        (1.1, MemoryPlan(4, True)),  # checkpointing only where not even one fits without
        (0.6, MemoryPlan(2, True)),
        (0.01, MemoryPlan(1, True)),  # nothing is known to fit: the least there is
    ],
)
def test_the_fastest_plan_that_fits(free: float, expected: MemoryPlan):
    assert plan(4, free, 1.5, 0.25) == expected


def test_a_captured_step_is_left_more_room():
    assert plan(4, 6.1, 1.5, 0.25, graph=True) == MemoryPlan(2, False)  # 1.3 × as much: 1.95 GB a sample
    assert plan(4, 7.9, 1.5, 0.25, graph=True) == MemoryPlan(4, False)


def test_one_sample_that_does_not_fit_is_checkpointed():
    assert plan(4, 1.1, math.inf, 0.25) == MemoryPlan(4, True)


def test_what_the_user_sets_is_kept():
    assert plan(8, 40, 1.5, 0.25, micro_batch=3) == MemoryPlan(3, False)
    assert plan(8, 40, 1.5, 0.25, gradient_checkpointing=True) == MemoryPlan(8, True)
    cpu = torch.device("cpu")

    def never(checkpointing: bool) -> None:
        raise AssertionError("nothing is measured on a CPU")

    assert plan_memory(TrainConfig(), 4, cpu, never) == MemoryPlan(4, False)
    assert plan_memory(TrainConfig(memory="lean"), 4, cpu, never) == MemoryPlan(4, True)
    assert plan_memory(TrainConfig(micro_batch=9), 4, cpu, never) == MemoryPlan(4, False)


# ---- the trial


@pytest.fixture
def fake_cuda(monkeypatch) -> SimpleNamespace:
    """A CUDA device of 1000 bytes whose counters the test sets; ``log`` are the questions in their order."""
    device = SimpleNamespace(in_use=0, peak=0, log=[])

    def free(_: object) -> tuple[int, int]:
        device.log.append("free")
        return 1000 - device.in_use, 1000

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: device.in_use)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: device.peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    return device


def test_free_memory_is_asked_for_after_the_trial(fake_cuda):
    """What the trial leaves behind, such as libraries' workspaces, is not free."""

    def one_sample(checkpointing: bool) -> None:
        fake_cuda.log.append(f"sample {checkpointing}")
        fake_cuda.in_use, fake_cuda.peak = 700, 100

    plan = plan_memory(TrainConfig(), 4, torch.device("cuda"), one_sample)
    assert plan == MemoryPlan(2, False)  # two captured samples of 130 bytes in nine tenths of 300
    assert fake_cuda.log == ["sample False", "free"]


def test_a_trial_that_does_not_fit_is_checkpointed(fake_cuda):
    def one_sample(checkpointing: bool) -> None:
        if not checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fake_cuda.peak = 150

    assert plan_memory(TrainConfig(), 4, torch.device("cuda"), one_sample) == MemoryPlan(4, True)
