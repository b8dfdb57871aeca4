"""Which device to compute on, and in which precision."""

from __future__ import annotations

import torch

from .errors import ConfigError


def choose_device(name: str = "auto", precision: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device of this name and the precision of the frozen model on it.

    ``auto`` is bf16 on CUDA cards that compute in it, fp16 on older ones, which only emulate it, and fp32 elsewhere.
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
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            with torch.cuda.device(device):  # the question is about the current one
                precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
