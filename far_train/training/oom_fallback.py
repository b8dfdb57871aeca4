"""Computing less of a training step at once where memory runs out: the same step, in more passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ..models.layers import set_checkpointing
from ..utils.errors import OutOfMemory
from ..utils.out_of_memory import give_back, out_of_memory, reason_of

log = logging.getLogger(__name__)

T = TypeVar("T")


class OomFallback:
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
                reason = reason_of(e)
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
