"""What a training shows on its node while it goes on, and what it says when it stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..far_train.evaluation.sheets import loss_curves, picture_grid
from ..far_train.training.checkpoints import newest_step
from ..far_train.training.run_folder import CHECKPOINTS, METRICS_FILE, read_metrics
from ..far_train.utils.wording import Countdown, duration, rate, size_in_words
from . import host_memory, host_ui

log = logging.getLogger(__name__)

PREVIEW_SECONDS = 6.0  # between live pictures; a curve takes a tenth of a second to draw
FIRST_PREVIEW = 1.5  # seconds after the first step, so that one sees early that it learns, and how long it will take


class LiveView:
    """What a training shows on its node: progress, a line of text, and loss curve and samples in turn.

    ``note``: a line that stands beside the others: which run this is, where that isn't plain.
    """

    def __init__(self, node_id: str | None, folder: Path, steps: int, note: str = ""):
        self.progress = host_ui.Progress(steps, node_id)
        self.node_id, self.folder, self.steps, self.note = node_id, folder, steps, note
        self.saved = newest_step(folder / CHECKPOINTS)
        if self.saved:
            self.note = f"resumes from step {self.saved}"
        self.phase = ""
        self.metrics: list[dict[str, Any]] | None = None
        self.samples: Image.Image | None = None
        self.shows_samples = False
        self.began = self.next_picture = time.monotonic()

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase:
            self.phase = phase
            self._show(f"{phase} ({total} pictures)")
        self.progress.update(done, total)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self.metrics is None:  # the first step of this session; a resumed run has earlier ones on disk
            self.metrics = [m for m in metrics_of(self.folder) if m["step"] < step]
            self.began, self.first = now, step
            if self.saved and self.saved != step - 1:  # its newest checkpoint is damaged
                self.note = f"resumes from step {step - 1}"
            self.next_picture = now + FIRST_PREVIEW
        self.metrics.append({"step": step, **metrics})
        picture = None
        if now > self.next_picture:
            self.shows_samples = self.samples is not None and not self.shows_samples
            picture = self.samples if self.shows_samples else preview(lambda: loss_curves(self.metrics))
            self.next_picture = time.monotonic() + PREVIEW_SECONDS
            pace = (now - self.began) / max(step - self.first, 1)
            line = f"step {step} of {self.steps}, loss {metrics['loss']:.4f}, {rate(pace)}, "
            line += f"{duration(pace * (self.steps - step))} left"
            if memory := host_memory.gpu_memory_in_use():
                line += ", {} of {} GPU memory in use".format(*map(size_in_words, memory))
            self._show(line)
        self.progress.update(step, self.steps, picture)

    def on_samples(self, step: int, prompts: Sequence[str], pictures: Tensor) -> None:
        self.samples = preview(lambda: picture_grid(pictures, prompts))
        self.progress.update(step, self.steps, self.samples)
        self.shows_samples, self.next_picture = True, time.monotonic() + PREVIEW_SECONDS

    def on_note(self, text: str) -> None:
        """Say something that stays beside the lines to come."""
        self.note = f"{self.note}\n{text}".strip()
        host_ui.log_and_show(text, self.node_id)

    def on_cancel(self) -> None:
        """Say where the run stands, which is saved."""
        step = newest_step(self.folder / CHECKPOINTS)
        if step:
            host_ui.log_and_show(f"stopped at step {step} of {self.steps} and saved; press Run to resume", self.node_id)
        else:
            host_ui.log_and_show("stopped before the first step; press Run to start over", self.node_id)

    def _show(self, line: str) -> None:
        host_ui.log_and_show(f"{self.note}\n{line}" if self.note else line, self.node_id)


class DrawingView:
    """What a node shows while it works through pictures: the newest, how many are done, and how long the others take.

    ``what``: which work that is, where a node does several in turn.
    """

    def __init__(self, node_id: str | None, what: str):
        self.progress = host_ui.Progress(1, node_id)
        self.node_id, self.what, self.countdown = node_id, what, Countdown()

    def update(self, done: int, total: int, picture: Image.Image | None = None) -> None:
        host_ui.show_text(f"{self.what}: {self.countdown.words(done, total)}", self.node_id)
        self.progress.update(done, total, picture)


def preview(draw: Callable[[], Image.Image]) -> Image.Image | None:
    """The picture, or None where it can't be drawn: what only informs must not end a training of hours."""
    try:
        return draw()
    except Exception as e:
        log.warning("A preview could not be drawn (%s: %s); the training goes on.", type(e).__name__, e)
        return None


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured so far, by step."""
    path = folder / METRICS_FILE
    return read_metrics(path) if path.exists() else []
