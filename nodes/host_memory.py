"""The host's device and memory: make room, free it, and take tensors out of inference mode."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from torch import Tensor


def compute_device() -> torch.device:
    """The device on which the host computes."""
    return comfy.model_management.get_torch_device()


def gpu_memory_in_use() -> tuple[int, int] | None:
    """Bytes in use on the GPU, by everyone, and in all; None where the host computes on the CPU."""
    device = compute_device()
    if device.type == "cpu":
        return None
    total = int(comfy.model_management.get_total_memory(device))
    return total - int(comfy.model_management.get_free_memory(device)), total


def unload_models() -> None:
    """Take the host's models off the device and give back what nobody holds."""
    comfy.model_management.unload_all_models()
    empty_cache()


def empty_cache() -> None:
    """Give back memory that nobody holds."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """The host runs nodes in inference mode, in which nothing can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def training_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that can be used in training, which the graph's inference tensors can't."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True)


@contextmanager
def on_compute_device(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Have a module, such as a SAM of any pack, on the compute device for a while; the host's models make room."""
    before = next(module.parameters()).device
    device = compute_device()
    if device != before:
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        comfy.model_management.free_memory(2 * size, device)
    try:
        # Other packs make theirs in inference mode; moved outside of it, such parameters can't be used any more.
        with torch.inference_mode():
            module.to(device)
        yield module
    finally:
        with torch.inference_mode():
            module.to(before)
        if device != before:
            comfy.model_management.soft_empty_cache()
