"""Computing less of a step at once where memory runs out: the same step, in more passes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .backbone import set_checkpointing
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
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MEMORY_RAN_OUT)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def give_back() -> None:
    """Return cached memory to the device, after what failed for want of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def skip_without_memory(what: str) -> Iterator[None]:
    """Leave out, with a warning, what a training can do without."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        log.warning("Memory ran out (%s): %s are left out.", _reason(e), what)


def in_batches(compute: Callable[[range], list[T]], count: int, size: int, what: str) -> list[T]:
    """``compute`` of the indices below ``count``, ``size`` at once, and fewer from where memory runs out.

    Raises OutOfMemory, naming ``what``, when not even one at a time fits.
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
            reason = _reason(e)
        give_back()  # here, since the traceback of an exception holds the tensors of what failed
        if len(batch) == 1:
            raise OutOfMemory(
                f"{what} don't fit into memory, even one at a time ({reason}). Close other programs, or choose a "
                "smaller size"
            )
        size = len(batch) // 2
        log.warning("Memory ran out (%s): continuing with %s in batches of %d.", reason, what, size)
    return done


def with_less_memory(vae: nn.Module, compute: Callable[[], T]) -> T:
    """``compute()`` of a VAE where it is; where memory runs out there, the VAE moves to the CPU, and stays there."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e) or vae.device.type == "cpu":
            raise
        reason = _reason(e)
    nn.Module.to(vae, device="cpu")
    give_back()
    log.warning("Memory ran out (%s): the VAE continues on the CPU, which is slower.", reason)
    return compute()


class Thrift:
    """How much of a step is computed at once: ``micro_batch`` samples (None: all), ``checkpointing`` in the UNet.

    Starts as the settings say and becomes thriftier, for the rest of the run, whenever memory runs out: first by
    gradient checkpointing, then by halving the samples at once. The step stays the same but for rounding.
    """

    def __init__(self, unet: nn.Module, micro_batch: int | None, checkpointing: bool):
        self._unet = unet
        self.micro_batch = micro_batch
        self.checkpointing = checkpointing
        set_checkpointing(unet, checkpointing)

    def run(self, compute: Callable[[int], T], samples: int) -> T:
        """``compute(samples at once)``, from the start again with less at once where memory runs out.

        Raises OutOfMemory when not even one sample at a time fits.
        """
        while True:
            size = min(self.micro_batch or samples, samples)
            try:
                return compute(size)
            except (MemoryError, RuntimeError) as e:
                if not out_of_memory(e):
                    raise
                reason = _reason(e)
            # Only here, since an exception's traceback holds the tensors of the step that failed.
            self._spend_less(size, reason)

    def _spend_less(self, size: int, reason: str) -> None:
        give_back()
        if not self.checkpointing:
            self.checkpointing = True
            set_checkpointing(self._unet, True)
            log.warning("Memory ran out (%s): going on with gradient checkpointing, which takes longer.", reason)
        elif size > 1:
            self.micro_batch = size // 2
            log.warning("Memory ran out (%s): going on with %d samples at once.", reason, self.micro_batch)
        else:
            raise OutOfMemory(
                f"a training step doesn't fit into memory, even one sample at a time ({reason}); what is done is kept "
                "in the last checkpoint. Close other programs, or train at a smaller size"
            )
