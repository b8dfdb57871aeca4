"""A training step as one CUDA graph.

A small model's step is thousands of short kernels: launched one by one from Python, they leave a fast card idle most of
the time. Captured once, they are replayed by a single launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps before the capture: libraries set up their workspaces in them
AHEAD = 4  # steps that Python may run ahead of the device; a rate that follows the clock allows only a few


class CapturedStep:
    """Takes training steps by replaying one CUDA graph; the first few run eagerly and count as well.

    ``take(stay)`` takes a step: it must read nothing back, draw from the device's default generator, and find what
    changes from step to step in tensors that keep their place. Those are the learning rate, which becomes a scalar on
    the device in all of ``optimizer``'s groups, and ``stay``, the share of the averaged weights that stays.
    """

    def __init__(
        self, take: Callable[[Tensor], dict[str, Tensor]], optimizer: torch.optim.Optimizer, device: torch.device
    ):
        self._take, self._device = take, device
        self._aside = torch.cuda.Stream(device)  # one for all: cached memory belongs to a stream
        self._rate, self._stay = torch.zeros((), device=device), torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._graph: torch.cuda.CUDAGraph | None = None
        self._figures: dict[str, Tensor] = {}
        self._taken = 0

    def __call__(self, rate: float, stay: float) -> dict[str, Tensor]:
        """Take a step and return its figures, scalars on the device that later steps leave alone."""
        self._rate.fill_(rate)
        self._stay.fill_(stay)
        self._taken += 1
        if self._taken <= WARM_UP:
            return self._run_eagerly()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._aside):
                self._figures = self._take(self._stay)
        self._graph.replay()
        if self._taken % AHEAD == 0:
            torch.cuda.synchronize(self._device)
        return {name: value.clone() for name, value in self._figures.items()}

    def _run_eagerly(self) -> dict[str, Tensor]:
        """On a stream of its own, as the capture will be."""
        current = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")  # that it isn't captured yet
            figures = self._take(self._stay)
        current.wait_stream(self._aside)
        return figures
