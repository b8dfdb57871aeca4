"""How a training step fits into memory: how many samples run at once, and whether the UNet is checkpointed."""

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
from .step_graph import uses_cuda_graph

log = logging.getLogger(__name__)

STATM = Path("/proc/self/statm")
# Memory that PyTorch holds for a captured step, relative to what an eager one allocates at its peak: 1.05 (SDXL), 1.3
# and 1.5 (SD 2.1, 768 and 512 px) measured with plenty of memory. Too little costs a fallback, too much some speed.
GRAPH_OVERHEAD = 1.3
MARGIN = 0.9  # part of the free memory that a plan may use; the rest is for fragmentation and for the desktop


@dataclass(frozen=True)
class MemoryPlan:
    """``micro_batch`` samples run at once; ``checkpointing`` trades time for memory in the UNet."""

    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True)
class Trial:
    """What a step of one sample showed, in bytes.

    ``peak``: memory that it needed beyond what was in use before, infinite if it did not fit. ``free``: memory that
    was free *after* it, since a first step leaves behind what stays, such as the workspaces of libraries.
    """

    peak: float
    free: int


def plan_memory(
    config: TrainConfig, samples: int, device: torch.device, one_sample: Callable[[bool], None]
) -> MemoryPlan:
    """The fastest plan for a step of ``samples`` that fits the device; what the config sets is kept.

    With ``memory`` "auto" on a CUDA device it is measured: ``one_sample(checkpointing)`` takes a step of one sample.
    """
    if config.memory == "auto" and device.type == "cuda":
        graph = uses_cuda_graph(config, device)
        return choose_plan(config, samples, lambda on: measure(device, lambda: one_sample(on)), graph)
    checkpointing = config.gradient_checkpointing or config.memory == "lean"
    return MemoryPlan(min(config.micro_batch or samples, samples), checkpointing)


def choose_plan(
    config: TrainConfig, samples: int, trial_of: Callable[[bool], Trial], graph: bool = False
) -> MemoryPlan:
    """The fastest plan for a step of ``samples``, given ``trial_of(checkpointing)`` of an eager step.

    ``graph``: the step will be captured in a CUDA graph, which keeps the memory of all its passes for itself.

    Many samples at once without checkpointing are fastest. A smaller micro-batch comes before checkpointing, which
    computes the forward pass twice.
    """
    whole = min(config.micro_batch or samples, samples)
    fitting = 0
    for checkpointing in (True,) if config.gradient_checkpointing else (False, True):
        trial = trial_of(checkpointing)
        held = trial.peak * (GRAPH_OVERHEAD if graph else 1)
        fitting = min(whole, int(MARGIN * trial.free / held))
        if fitting:
            break
    parts = math.ceil(samples / max(fitting, 1))
    plan = MemoryPlan(math.ceil(samples / parts), checkpointing)
    if plan != MemoryPlan(whole, config.gradient_checkpointing):
        how = "with" if plan.checkpointing else "without"
        log.info("To fit the memory, %d of %d samples run at once, %s checkpointing.", plan.micro_batch, samples, how)
    return plan


def measure(device: torch.device, work: Callable[[], None]) -> Trial:
    """Run ``work`` on a CUDA device and say what it needed and what it left."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        work()
        peak = max(torch.cuda.max_memory_allocated(device) - before, 1)
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        peak = math.inf
    torch.cuda.empty_cache()
    return Trial(peak, free=torch.cuda.mem_get_info(device)[0])


class PeakMemory:
    """The peak memory of this process.

    On a CUDA device it is what PyTorch holds there, which includes the memory of captured graphs. On a CPU under Linux
    it is the resident memory, sampled a hundred times a second. Elsewhere it is unknown.
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
        """Start measuring anew."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        self._highest = 0

    def peak(self) -> int | None:
        """Bytes, or None if unknown."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self._highest or None

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.01):
            self._highest = max(self._highest, int(STATM.read_text().split()[1]) * page)
