"""Loss scaling: dynamic in fp16, where small gradients would vanish, and a constant 1 in other precisions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .checkpoints import LOSS_SCALE

FP16_INITIAL_SCALE = 2.0**12  # each overflow halves it


class LossScaler(torch.amp.GradScaler):
    """PyTorch's scaler, which also skips a step whose gradient isn't finite without asking the host.

    That is of use in every precision; only fp16 needs a scale other than 1, and only there it changes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.is_dynamic = dtype == torch.float16
        self.initial_scale = FP16_INITIAL_SCALE if self.is_dynamic else 1.0
        super().__init__(device.type, self.initial_scale)

    def update_scale(self) -> None:
        """Adapt the scale after a step."""
        self.update(None if self.is_dynamic else self.initial_scale)

    def saved(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds of it: scale and growth counter, [2]. Empty where the scale is constant."""
        if not self.is_dynamic:
            return {}
        state = self.state_dict()
        values = torch.tensor([state["scale"], float(state["_growth_tracker"])])
        return {LOSS_SCALE: nn.Parameter(values, requires_grad=False)}

    def restore(self, saved: Mapping[str, nn.Parameter]) -> None:
        """Take over what :meth:`saved` gave, with the values of a checkpoint."""
        if self.is_dynamic:
            scale, growth = saved[LOSS_SCALE].tolist()
            self.load_state_dict({**self.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
