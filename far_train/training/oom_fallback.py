"""When a training step runs out of memory, compute the same step again in smaller parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ..models.layers import set_checkpointing
from ..utils.errors import OutOfMemory
from ..utils.out_of_memory import empty_cache, out_of_memory, reason_of
from .memory_plan import MemoryPlan

log = logging.getLogger(__name__)

T = TypeVar("T")


class OomFallback:
    """Runs steps by a memory plan, which it tightens for the rest of the run whenever memory runs out.

    As in the plan (:func:`.memory_plan.choose_plan`), smaller micro-batches come before gradient checkpointing, which
    computes the forward pass twice. The step stays the same but for rounding.
    """

    def __init__(self, unet: nn.Module, plan: MemoryPlan):
        self._unet = unet
        self.on_change: Callable[[], None] = lambda: None  # called before another plan is followed
        self.use(plan)

    def use(self, plan: MemoryPlan) -> None:
        """Follow ``plan`` from now on."""
        self.on_change()
        self.plan = plan
        set_checkpointing(self._unet, plan.checkpointing)

    def run(self, compute: Callable[[int], T], samples: int) -> T:
        """``compute(micro_batch)``, started over with a tighter plan when memory runs out.

        Raises OutOfMemory if not even one sample at a time fits.
        """
        while True:
            micro_batch = min(self.plan.micro_batch, samples)
            try:
                return compute(micro_batch)
            except (MemoryError, RuntimeError) as e:
                if not out_of_memory(e):
                    raise
                reason = reason_of(e)
            # Outside of the except block, since the traceback of an exception holds the tensors of the failed step.
            empty_cache()
            self._tighten(micro_batch, reason)

    def _tighten(self, micro_batch: int, reason: str) -> None:
        if micro_batch > 1:
            self.use(MemoryPlan(micro_batch // 2, self.plan.checkpointing))
            log.warning("Memory ran out (%s): continuing with micro_batch %d.", reason, self.plan.micro_batch)
        elif not self.plan.checkpointing:
            self.use(MemoryPlan(1, checkpointing=True))
            log.warning("Memory ran out (%s): continuing with gradient checkpointing, which takes longer.", reason)
        else:
            raise OutOfMemory(
                f"a training step doesn't fit into memory, even one sample at a time ({reason}); what is done is kept "
                "in the last checkpoint. Close other programs, or train at a smaller size"
            )
