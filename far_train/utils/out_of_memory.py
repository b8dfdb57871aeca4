"""Out of memory: how to recognize it, and how to go on with smaller batches or on the CPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .errors import OutOfMemory

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_RAN_OUT = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cusolver_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's CPU allocator and CUDA's libraries raise a plain
    RuntimeError. cuBLAS that can't make its handle ("not initialized") most often lacks the memory for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MEMORY_RAN_OUT)


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def empty_cache() -> None:
    """Return memory that PyTorch caches to the device, after something failed for want of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def skip_without_memory(what: str) -> Iterator[None]:
    """Leave out, with a warning, what a training can do without."""
    try:
        yield
    except (MemoryError, RuntimeError, OutOfMemory) as e:
        if not out_of_memory(e):
            raise
        log.warning("Memory ran out (%s): %s are left out.", reason_of(e), what)


def in_batches(
    compute: Callable[[range], list[T]],
    count: int,
    size: int,
    what: str,
    on_smaller: Callable[[int], None] = lambda size: None,
) -> list[T]:
    """``compute`` of the indices below ``count``, ``size`` at once, and fewer from where memory runs out.

    ``on_smaller(size)`` is told of it, for later calls. Raises OutOfMemory, naming ``what``, when not even one at a
    time fits.
    """
    done: list[T] = []
    while len(done) < count:
        batch = range(len(done), min(len(done) + size, count))
        try:
            done += compute(batch)
            continue
        except (MemoryError, RuntimeError) as e:
            if not out_of_memory(e):
                raise
            reason = reason_of(e)
        empty_cache()  # here, since the traceback of an exception holds the tensors of what failed
        if len(batch) == 1:
            raise OutOfMemory(
                f"{what} don't fit into memory, even one at a time ({reason}). Close other programs, or choose a "
                "smaller size"
            )
        size = len(batch) // 2
        log.warning("Memory ran out (%s): continuing with %s in batches of %d.", reason, what, size)
        on_smaller(size)
    return done


def with_less_memory(vae: nn.Module, compute: Callable[[], T]) -> T:
    """``compute()`` of a VAE where it is; where memory runs out there, the VAE moves to the CPU, and stays there."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e) or vae.device.type == "cpu":
            raise
        reason = reason_of(e)
    nn.Module.to(vae, device="cpu")
    empty_cache()
    log.warning("Memory ran out (%s): the VAE continues on the CPU, which is slower.", reason)
    return compute()
