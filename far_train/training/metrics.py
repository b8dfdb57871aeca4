"""The metrics of each step: read off the device without waiting for it, written, and watched for divergence."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import TrainingDiverged
from .run_folder import MetricsLog

log = logging.getLogger(__name__)

NAMES = ("loss", "denoising", "refinement", "prior", "grad_norm")
DEPTH = 2  # steps that the host may be ahead of a GPU


class Readback:
    """Metrics of past steps on their way to the host.

    On a GPU the host queues a step while the one before still runs; asking for its loss would stop that. So values are
    copied in the background, and come out ``DEPTH`` steps later. On the CPU they come out at once.
    """

    def __init__(self, device: torch.device):
        self._depth = DEPTH if device.type == "cuda" else 0
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: Tensor) -> None:
        """Queue the ``values`` of a step, one for each of ``NAMES``."""
        event, source = None, values
        if source.is_cuda:
            values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(source.device))  # which need not be the current device's
        self._queue.append((step, values, event))

    def take(self, *, all: bool = False) -> list[tuple[int, dict[str, Any]]]:
        """Steps with their metrics, oldest first: those that are old enough, or ``all`` that are queued."""
        taken = []
        while len(self._queue) > (0 if all else self._depth):
            step, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            metrics = dict(zip(NAMES, values.tolist()))
            taken.append((step, {**metrics, "finite": math.isfinite(metrics["grad_norm"])}))
        return taken


class StepReports:
    """Passes on the metrics of the steps that a readback gives out: to metrics.jsonl, if any, and to a callback.

    Raises TrainingDiverged after ``patience`` steps in a row that were not finite.
    """

    def __init__(
        self,
        readback: Readback,
        history: MetricsLog | None,
        on_step: Callable[[int, dict[str, Any]], None],
        patience: int,
    ):
        self._readback, self._history, self._on_step, self._patience = readback, history, on_step, patience
        self._failures = 0
        self.start_clock()

    def start_clock(self) -> None:
        """The next step begins now: what was done since the last one is no part of its time."""
        self._last = time.perf_counter()

    def pass_on(self, *, all: bool = False) -> None:
        """Report the steps that have arrived, or ``all`` that were taken."""
        for step, metrics in self._readback.take(all=all):
            if metrics["finite"]:
                self._failures = 0
            else:
                self._failures += 1
                log.warning("Step %d: the gradient is not finite; the step is skipped.", step)
            if self._failures == self._patience:
                raise TrainingDiverged(
                    f"the loss was not finite for {self._patience} steps up to step {step}; the last checkpoint is "
                    "kept. Lower its learning rates, or use precision fp32"
                )
            last, self._last = self._last, time.perf_counter()
            metrics["seconds"] = round(self._last - last, 4)
            if self._history:
                self._history.add(step, metrics)
            self._on_step(step, metrics)
