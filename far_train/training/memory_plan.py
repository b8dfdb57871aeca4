"""How a step fits into the memory there is: how many samples run at once, and whether the UNet is checkpointed."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..utils.out_of_memory import out_of_memory
from .settings import TrainConfig

log = logging.getLogger(__name__)

STATM = Path("/proc/self/statm")
MARGIN = 0.9  # share of the free memory that a plan may use; the rest is for fragments and for the desktop


@dataclass(frozen=True)
class MemoryPlan:
    """``micro_batch`` samples run at once; ``checkpointing`` trades time for memory in the UNet."""

    micro_batch: int
    checkpointing: bool


def plan_memory(
    config: TrainConfig, samples: int, device: torch.device, one_sample: Callable[[bool], None]
) -> MemoryPlan:
    """The fastest plan for a step of ``samples`` that fits the device; what the config sets is kept.

    On a CUDA card with ``memory`` "auto" it is measured: ``one_sample(checkpointing)`` takes a step of one sample.
    """
    if config.memory == "auto" and device.type == "cuda":
        return choose_plan(config, samples, lambda on: _peak(device, lambda: one_sample(on)), lambda: _free(device))
    lean = config.gradient_checkpointing or config.memory == "lean"
    return MemoryPlan(min(config.micro_batch or samples, samples), lean)


def choose_plan(
    config: TrainConfig, samples: int, peak: Callable[[bool], float], free: Callable[[], int]
) -> MemoryPlan:
    """The fastest plan, given the ``peak(checkpointing)`` of one sample and the ``free()`` memory after it, in bytes.

    Several samples without checkpointing are best; fewer at once come before checkpointing, which computes the forward
    pass twice.
    """
    whole = min(config.micro_batch or samples, samples)
    fitting = 0
    for checkpointing in (True,) if config.gradient_checkpointing else (False, True):
        need = peak(checkpointing)  # first: what the trial leaves behind, such as libraries' workspaces, isn't free
        fitting = min(whole, int(MARGIN * free() / need))
        if fitting:
            break
    parts = math.ceil(samples / max(fitting, 1))
    plan = MemoryPlan(math.ceil(samples / parts), checkpointing)
    if plan != MemoryPlan(whole, config.gradient_checkpointing):
        how = "with" if plan.checkpointing else "without"
        log.info("To fit the memory, %d of %d samples run at once, %s checkpointing.", plan.micro_batch, samples, how)
    return plan


def _free(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _peak(device: torch.device, work: Callable[[], None]) -> float:
    """Bytes that ``work`` needs at its peak, beyond what is there; infinite if it did not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        work()
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        return math.inf
    return max(torch.cuda.max_memory_allocated(device) - before, 1)


class PeakMemory:
    """The most memory that this process has held.

    On a CUDA device what PyTorch has allocated there; on a CPU under Linux what is resident, looked at a hundred times
    a second. Elsewhere it is unknown.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._watches = device.type == "cpu" and STATM.exists()

    def __enter__(self) -> PeakMemory:
        if self._watches:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def restart(self) -> None:
        """Forget what was before."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._highest = 0

    def peak(self) -> int | None:
        """Bytes, or None where it can't be known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._highest or None

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.01):
            self._highest = max(self._highest, int(STATM.read_text().split()[1]) * page)
