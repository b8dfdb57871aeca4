"""Figures in words, for people who wait."""

from __future__ import annotations

import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size_in_words(size: float) -> str:
    """Bytes: 640 MB, 6.1 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def rate(seconds: float) -> str:
    """Of something that takes so many seconds: 2.5 steps/s, or 4.0 s/step."""
    return f"{1 / seconds:.1f} steps/s" if 0 < seconds < 1 else f"{seconds:.1f} s/step"


class Countdown:
    """How far work that counts is, in words: 12 of 32, 2 min left. ``clock`` gives seconds.

    The pace is that since the first call: what was done before it took no time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def words(self, done: int, total: int) -> str:
        now = self._clock()
        first, began = self._first = self._first or (done, now)
        if not first < done < total:
            return f"{done} of {total}"
        return f"{done} of {total}, {duration((now - began) / (done - first) * (total - done))} left"
