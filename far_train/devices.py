"""Which device to compute on, and in which precision."""

from __future__ import annotations

import torch

from .errors import ConfigError


def choose_device(name: str = "auto", precision: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device of this name and the precision of the frozen model on it: bf16 where the card has it, else fp32.

    Raises ConfigError for a device that isn't there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"device: '{name}' can't be used here ({str(e).splitlines()[0]}); try auto or cpu") from e
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
