"""Watching a run while it goes on: whether it has diverged, and whether its steps have become slow.

Both are pure functions of what the steps report; neither reads a clock or the device.
"""

from __future__ import annotations

from collections import deque
from statistics import median

BASE_LIMIT = 1.2  # times the base's error; runs that learn stay below 1, those of far too high rates reach 1.3 to 3
OWN_LIMIT = 4.0  # times the error at the run's beginning
WINDOW = 31  # steps, of whose ratios the median counts
FEW = 7  # steps after which a run is suspected

SETTLING_STEPS = 5  # not timed: they compile, capture and fill caches
PACE_WINDOW = 21  # steps, both at the beginning and now
SLOWER = 3.0  # times as long
NOTICEABLE = 0.25  # seconds; below it nobody waits for a step


class DivergenceWatch:
    """Tells a run that has diverged although its loss is finite.

    The loss depends more on a step's timesteps than on what is learned, so like is compared with like. With output
    preservation each step knows the error of the untouched base on the same noisy images. A run that learns is below
    it, all the more since around the subjects it learns what the base predicts. A run is broken when the median of the
    last ``WINDOW`` steps is above ``BASE_LIMIT`` times the base's error, and suspect when that of the last ``FEW`` is.

    Without output preservation (``with_base`` False) a run is broken when the median error of ``WINDOW`` steps is above
    ``OWN_LIMIT`` times that of its first ``WINDOW``, and never suspect: over few steps, the timesteps alone make such
    factors. A run that is broken from its first steps on isn't noticed then.
    """

    def __init__(self, with_base: bool):
        self.with_base = with_base
        self._limit = BASE_LIMIT if with_base else OWN_LIMIT
        self._first: list[float] = []
        self._ratios: deque[float] = deque(maxlen=WINDOW)

    def add(self, error: float, base_error: float) -> None:
        """Take in a step's denoising loss and, with output preservation, the base's."""
        if not self.with_base:
            if len(self._first) < WINDOW:
                self._first.append(error)
                return
            base_error = median(self._first)
        if base_error > 0:
            self._ratios.append(error / base_error)

    @property
    def broken(self) -> bool:
        return len(self._ratios) == WINDOW and median(self._ratios) > self._limit

    @property
    def suspect(self) -> bool:
        return self.with_base and len(self._ratios) >= FEW and self._lately() > self._limit

    def words(self) -> str:
        """How far the run is off, as the end of a sentence about its loss."""
        whose = "the untouched base model's on the same images" if self.with_base else "its first steps'"
        return f"{self._lately():.1f} times {whose}"

    def _lately(self) -> float:
        return median(list(self._ratios)[-FEW:])


class PaceWatch:
    """Tells once when a run's steps have become several times slower than its first ones.

    The median of the last ``PACE_WINDOW`` steps is compared with that of the first ``PACE_WINDOW`` of this session,
    after ``SETTLING_STEPS``. ``on_gpu``: where the steps run, which decides what the likely cause is.
    """

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self._seen = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=PACE_WINDOW)
        self._told = False

    def add(self, step: int, seconds: float) -> str | None:
        """Take in how long ``step`` took; returns what to tell the user, if anything."""
        self._seen += 1
        if self._seen <= SETTLING_STEPS:
            return None
        if len(self._first) < PACE_WINDOW:
            self._first.append(seconds)
            return None
        self._last.append(seconds)
        now, before = median(self._last), median(self._first)
        if self._told or len(self._last) < PACE_WINDOW or now < max(SLOWER * before, NOTICEABLE):
            return None
        self._told = True
        since = step - PACE_WINDOW + 1 + next(i for i, s in enumerate(self._last) if s >= SLOWER * before)
        cause = (
            "the GPU's memory is full and pages into system memory, or another program uses the GPU: close other "
            "programs, or stop, set micro_batch to 1 or switch gradient_checkpointing on, and resume"
            if self.on_gpu
            else "another program uses the processor, or memory is full: close other programs"
        )
        return f"steps take {now:.1f} s since step {since}, {before:.1f} s before. Likely {cause}"
