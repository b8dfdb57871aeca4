"""The live table of a fleet: a line for what happened, and below, in a terminal, one for each job at work."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..utils.wording import duration
from .fleet_jobs import Job
from .fleet_steps import DONE, FAILED, RUN, RUNNING, STOPPED, read_state

MOST_LINES = 24  # of jobs at work
TAIL = 4096  # bytes of a metrics file that hold its last line


class Table:
    """Tells how the jobs below ``out`` are doing, as their folders have it."""

    def __init__(self, jobs: Sequence[Job], out: Path, stream: TextIO | None = None):
        self.jobs, self.out = {job.name: job for job in jobs}, out
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._open = dict(self.jobs)  # not ended yet
        self._ended: Counter[str] = Counter()
        self._drawn = 0  # lines of the live part
        self._told: dict[str, tuple[Any, ...]] = {}
        self._next = 0.0

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=self._stream, flush=True)

    def done_before(self, names: Sequence[str]) -> None:
        """These jobs had nothing left to do."""
        for name in names:
            del self._open[name]
        self._ended[DONE] += len(names)
        if names:
            self.say(f"{len(names)} of {len(self.jobs)} jobs are done already")

    def ended(self, name: str, state: Mapping[str, Any]) -> None:
        """A job has ended with this state."""
        self._open.pop(name, None)
        self._ended[state["state"]] += 1
        error = f": {state['error']}" if state.get("error") else ""
        self.say(f"{name}: {state['state']}, {duration(seconds_of(state))}{error}")

    def refresh(self) -> None:
        """Look at the jobs' folders, at most a twentieth of the time."""
        began = time.monotonic()
        if began < self._next:
            return
        states = {name: read_state(self.out / name) for name in self._open}
        working = {name: state for name, state in states.items() if state.get("state") == RUNNING}
        if self._live:
            lines = [self._line(name, state) for name, state in list(working.items())[:MOST_LINES]]
            self._draw([*lines, self._summary(len(working))])
        else:
            for name, state in working.items():
                now = (state.get("step"), state.get("attempts"))
                if self._told.get(name) != now:
                    self._told[name] = now
                    self.say(f"{name}: {state.get('step')} on {state.get('machine')}")
        self._next = time.monotonic() + 20 * (time.monotonic() - began)

    def close(self) -> None:
        self._clear()
        self._stream.flush()

    def _line(self, name: str, state: Mapping[str, Any]) -> str:
        text = f"{state.get('step')}"
        if text == "train":
            last = last_metrics(self.out / name / RUN / "metrics.jsonl")
            if last:
                job = self.jobs[name]
                config = job.settings("train")
                total = config.steps_for(len(job.concepts)) if job.concepts or config.steps else None
                text += f" {last['step']}" + (f" of {total}" if total else "")
                text += f", loss {last['loss']:.4f}" if isinstance(last.get("loss"), float) else ""
        return f"  {name}: {text} on {state.get('machine')}"

    def _summary(self, working: int) -> str:
        counts = [(self._ended[state], state) for state in (DONE, FAILED, STOPPED)]
        counts += [(working, "at work"), (len(self._open) - working, "waiting")]
        return ", ".join(f"{count} {what}" for count, what in counts if count)

    def _draw(self, lines: Sequence[str]) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._clear()
        self._stream.write("".join(f"{line[:width]}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0


def seconds_of(state: Mapping[str, Any]) -> float:
    """What a job has cost; what was lost with a machine isn't in it."""
    return sum(step.get("seconds", 0.0) for step in state.get("steps", {}).values())


def last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl, which may be growing; nothing if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
