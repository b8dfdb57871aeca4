"""Metrics of each step: copied to the host without waiting for the device, reported, and checked for divergence."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import TrainingDiverged
from .callbacks import Callbacks
from .run_folder import MetricsLog
from .watch import DivergenceWatch, PaceWatch

log = logging.getLogger(__name__)

# base_denoising: the untouched base's, 0 without output preservation
NAMES = ("loss", "denoising", "refinement", "prior", "base_denoising", "grad_norm")
DEPTH = 2  # steps that the host may be ahead of a GPU


class Readback:
    """Metrics of past steps on their way to the host.

    On a GPU the host queues a step while the one before still runs; reading its loss at once would stall that. So
    values are copied in the background and become available ``DEPTH`` steps later. On the CPU they are available at
    once.
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

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """Remove and return the steps that are at least ``DEPTH`` old, with their metrics, oldest first."""
        return self._pop_until(self._depth)

    def drain(self) -> list[tuple[int, dict[str, Any]]]:
        """Wait for all queued steps; remove and return them, oldest first."""
        return self._pop_until(0)

    def _pop_until(self, left: int) -> list[tuple[int, dict[str, Any]]]:
        taken = []
        while len(self._queue) > left:
            step, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            metrics = dict(zip(NAMES, values.tolist()))
            taken.append((step, {**metrics, "finite": math.isfinite(metrics["grad_norm"])}))
        return taken


class StepReports:
    """Writes the metrics that arrive from a readback to metrics.jsonl, if given, and passes them to the callbacks.

    Raises TrainingDiverged after ``max_non_finite`` steps in a row whose gradient was not finite, or when
    ``divergence`` calls the run broken. Steps that have become slow are told by ``on_note``.
    """

    def __init__(
        self,
        readback: Readback,
        history: MetricsLog | None,
        callbacks: Callbacks,
        *,
        max_non_finite: int,
        divergence: DivergenceWatch,
        pace: PaceWatch,
    ):
        self._readback, self._history, self._callbacks = readback, history, callbacks
        self._max_non_finite, self._divergence, self._pace = max_non_finite, divergence, pace
        self._non_finite = 0
        self.start_clock()

    def start_clock(self) -> None:
        """The next step begins now; the time since the last one, as for samples or a checkpoint, is not counted."""
        self._last = time.perf_counter()

    def report(self) -> None:
        """Report the steps that have arrived, without waiting for more."""
        self._report(self._readback.take())

    def flush(self) -> None:
        """Wait for all steps taken so far, and report them."""
        self._report(self._readback.drain())

    def _report(self, steps: list[tuple[int, dict[str, Any]]]) -> None:
        for step, metrics in steps:
            if metrics["finite"]:
                self._non_finite = 0
                self._divergence.add(metrics["denoising"], metrics["base_denoising"])
            else:
                self._non_finite += 1
                log.warning("Step %d: the gradient is not finite; the step is skipped.", step)
            if self._non_finite == self._max_non_finite:
                raise TrainingDiverged(f"the loss was not finite for {self._max_non_finite} steps up to step {step}")
            last, self._last = self._last, time.perf_counter()
            metrics["seconds"] = round(self._last - last, 4)
            if self._history:
                self._history.add(step, metrics)
            self._callbacks.on_step(step, metrics)
            if self._divergence.broken:
                raise TrainingDiverged(f"the loss up to step {step} is {self._divergence.words()}")
            if note := self._pace.add(step, metrics["seconds"]):
                self._callbacks.on_note(note)
