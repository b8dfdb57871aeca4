"""How a training reports to its caller, and how the caller stops it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..utils.errors import Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """Functions that a training calls. All are optional; none may change what is learned.

    ``on_phase(name, done, total)`` reports progress before the first step and after the last one,
    ``on_step(step, metrics)`` each step, ``on_samples(step, prompts, pictures [n, H, W, 3])`` sample pictures.
    ``on_note(text)`` gets what the user should know meanwhile; by default it is logged. ``on_check(prompts,
    pictures)``, if given, gets pictures that are drawn once the weights are saved: ``recipe.CHECK_PICTURES`` of all
    concepts together and of each alone. ``should_stop()`` is asked between steps, and between pictures of a phase.
    """

    on_phase: Callable[[str, int, int], None] = lambda phase, done, total: None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    on_samples: Callable[[int, Sequence[str], Tensor], None] = lambda step, prompts, pictures: None
    on_note: Callable[[str], None] = log.warning
    on_check: Callable[[Sequence[str], Tensor], None] | None = None
    should_stop: Callable[[], bool] = lambda: False

    def check_stop(self, phase: str) -> None:
        """Raise Interrupted if the caller wants to stop."""
        if self.should_stop():
            raise Interrupted(f"stopped in the phase '{phase}'; resume the run to go on")

    def progress_of(self, phase: str) -> Callable[[int, int], None]:
        """An ``on_progress(done, total)`` that reports a phase, and raises Interrupted to stop it."""

        def on_progress(done: int, total: int) -> None:
            self.on_phase(phase, done, total)
            self.check_stop(phase)

        return on_progress
