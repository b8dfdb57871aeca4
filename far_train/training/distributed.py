"""Training in several processes (``torchrun``): each computes a part of every step, and the main one writes files.

Every process draws the whole batch of a step from the same seeds, then works on every ``size``-th sample. Losses and
gradients are scaled for the whole batch, so their sum over the processes is what a single process would compute.
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

COLLECTIVE_TIMEOUT = timedelta(hours=6)  # the others wait while the main process draws class or sample images
FAILED = 2  # outvotes True in any_process


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes; a process alone is rank 0 of 1."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def size_here(self) -> int:
        """The number of processes on this machine, as torchrun says it; all of them where it isn't said."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one process that writes files and reports progress."""
        return self.rank == 0

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. Tensors on a GPU are summed there, without the host."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. Every process must call this at the same point.

        Raises ProcessFailed if another process has failed, since waiting for it would never end.
        """
        if self.size == 1:
            return flag
        highest = self._vote(int(flag))
        if highest == FAILED:
            raise ProcessFailed("another process of this training failed; its own message says why")
        return bool(highest)

    def barrier(self) -> None:
        """Wait until all processes are here. Raises ProcessFailed."""
        self.any_process(False)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error within this context also ends the other processes, at their next :meth:`any_process`."""
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


@contextmanager
def distributed_context(device: str = "auto") -> Iterator[World]:
    """Join the process group that ``torchrun`` started, and leave it afterwards. Does nothing in a single process.

    Each process uses the GPU of its local rank; decisions of the host are exchanged over the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield World.current()
        return
    kind = choose_device(device)[0].type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World.current()
    finally:
        distributed.destroy_process_group()
