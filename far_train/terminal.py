"""Long work in a terminal: progress bars, and Ctrl-C that asks to stop."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def make_output_steady() -> None:
    """Let nothing that is only said fail a command whose work is done: neither a character that the terminal's or the
    log's encoding lacks, nor a pipe that its reader has closed, nor a full disk below a log."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, io.RawIOBase) and not isinstance(raw, _Steady):
            steady = io.TextIOWrapper(_Steady(raw), stream.encoding, "replace", write_through=True)
            setattr(sys, name, steady)


class _Steady(io.RawIOBase):
    """A stream of bytes that drops what can't be written."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._raw.write(rest) or 0 :]
        except (OSError, ValueError):  # the reader is gone, the disk full, the stream closed
            pass
        return len(data)


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
