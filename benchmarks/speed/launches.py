"""What a step costs a GPU and its host: time that kernels run, and calls that launch them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

# The runtime's and the driver's calls that start work on the device. A graph of thousands of kernels is one of them.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")


class Event(Protocol):
    """What is read of a profiler's averaged event."""

    key: str
    count: int
    self_device_time_total: float


@dataclass(frozen=True)
class Launches:
    """``gpu_seconds`` that kernels and copies ran, and the ``count`` of launches from the host."""

    gpu_seconds: float
    count: int


def profile_step(take_step: Callable[[], object]) -> Launches:
    """Profile one step on the current CUDA device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        take_step()
        torch.cuda.synchronize()
    return read_events(recorded.key_averages())


def read_events(events: Iterable[Event]) -> Launches:
    """Sum up a profiler's events; times are in microseconds there."""
    events = list(events)
    return Launches(
        sum(event.self_device_time_total for event in events) / 1e6,
        sum(event.count for event in events if event.key.startswith(LAUNCHES)),
    )
