"""Several processes on one training (``torchrun``): each takes its share of every step, one of them writes.

The batch of a step is drawn as a whole in every process, by the same counters; a process then works on every
``size``-th sample. Gradients are shares of the whole step's, so their sum is what one process would have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from ..utils.devices import choose_device
from ..utils.errors import ProcessFailed

PATIENCE = timedelta(hours=6)  # the others wait while one process draws class pictures or samples
FAILED = 2  # a vote above yes


@dataclass(frozen=True)
class World:
    """This process among all that train together; alone, it is process 0 of 1."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and reports."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all processes, in place. Tensors on a GPU are added there, without the host."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether a flag is up in any process: what one decides, all do at the same step.

        Raises ProcessFailed where another process has failed: it would be waited for in vain.
        """
        if self.size == 1:
            return flag
        worst = self._vote(int(flag))
        if worst == FAILED:
            raise ProcessFailed("another process of this training failed; its own message says why")
        return bool(worst)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error in here ends the other processes too, at their next :meth:`any`."""
        try:
            yield
        except ProcessFailed:
            raise
        except BaseException:
            if self.size > 1:
                with suppress(RuntimeError):  # the others may be gone
                    self._vote(FAILED)
            raise

    def _vote(self, value: int) -> int:
        votes = torch.tensor(value)  # on the CPU, so that no GPU waits
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return int(votes)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the processes that ``torchrun`` started with this one; alone, nothing happens.

    On GPUs each process takes the one of its local rank; the host's own decisions travel over the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield World.current()
        return
    kind = choose_device(device)[0].type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World.current()
    finally:
        distributed.destroy_process_group()
