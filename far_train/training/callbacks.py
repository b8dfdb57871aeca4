"""How a training talks to whoever started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Callbacks:
    """How a training talks to its caller: all are optional, none may change what is learned.

    ``on_phase(name, done, total)`` reports progress before the first step, ``on_step(step, metrics)`` each step,
    ``on_samples(step, prompts, pictures [n, H, W, 3])`` sample pictures; ``should_stop()`` is asked between steps.
    """

    on_phase: Callable[[str, int, int], None] = lambda phase, done, total: None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    on_samples: Callable[[int, Sequence[str], Tensor], None] = lambda step, prompts, pictures: None
    should_stop: Callable[[], bool] = lambda: False
