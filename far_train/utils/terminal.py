"""Long work in a terminal: progress bars, and Ctrl-C that asks to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def replace_unknown_characters() -> None:
    """Let no character that the terminal's or a log's encoding lacks fail a command whose work is done."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a host's or a test's own stream may lack it
            stream.reconfigure(errors="replace")


class ProgressBars:
    """One bar per phase, for callbacks of the form (phase, done, total)."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._bar is None or phase != self._phase:
            self.close()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def note(self, **values: Any) -> None:
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def phase(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self(name, done, total)


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    bars = ProgressBars()
    try:
        yield bars
    finally:
        bars.close()


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the current step; a second one stops at once."""
    asked = threading.Event()

    def ask(_signal: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        tqdm.write("Stopping after this step; press Ctrl-C again to stop at once without saving.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
