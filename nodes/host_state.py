"""The weights of the host's models as plain tensors, whatever form the host keeps them in.

Models that the host loads dynamically (0.33 and newer on CUDA) need nothing of their own: their weights stay on the
CPU, as views of the file, and where the host has put a patched copy in one's place, its backup is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..far_train.models.quantised import FIX
from ..far_train.utils.errors import BaseModelError


def read_weights(
    patcher: Any, prefix: str | None = None, ends: tuple[str, ...] = ("",), patched: bool = True
) -> dict[str, Tensor]:
    """Copies in fp32 on the CPU of a patcher's weights, with its patches; nothing is loaded, moved or changed.

    Whole numbers stay what they are: only who made them knows what they stand for. Raises BaseModelError for tensors of
    another pack's class.
    """
    weights = {}
    with torch.inference_mode(False), torch.no_grad():
        for key, entry in _key_patches(patcher, prefix).items():
            if not key.endswith(ends):
                continue
            (weight, convert), patches = entry[0], entry[1:]
            weight = _multiplied_out(key, weight, convert)
            weights[key] = comfy.lora.calculate_weight(patches, weight, key) if patches and patched else weight
    return weights


def weight_shapes(patcher: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a patcher's weights; of those with two numbers in a byte, what they are multiplied out."""
    return {key: tuple(entry[0][0].shape) for key, entry in _key_patches(patcher, prefix).items()}


def check_weights_are_all(called: str, patcher: Any) -> None:
    """Refuse a MODEL, CLIP or VAE, ``called`` so, that is changed while it computes and not in its weights.

    LoRAs in bypass mode and those of hooks are. A training would leave them out. Raises BaseModelError.
    """
    changes = list(getattr(patcher, "injections", ()))
    changes += [f"a wrapper of {key}" for key in getattr(patcher, "weight_wrapper_patches", ())]
    changes += ["hooks"] if getattr(patcher, "forced_hooks", None) else []
    if changes:
        raise BaseModelError(
            f"{called} is changed by {changes[0]}, not in its weights, so FaR can't train on it; use Load LoRA "
            "(Model and CLIP), without bypass and hooks"
        )


def _multiplied_out(key: str, weight: Tensor, convert: Any) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        weight = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
        return weight.dequantize().float() if isinstance(weight, QuantizedTensor) else weight.float()
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise BaseModelError(f"{key} is a {type(weight).__name__} of another pack, which FaR doesn't read; {FIX}")
    dtype = torch.float32 if weight.is_floating_point() else weight.dtype
    return convert(weight.to("cpu", dtype, copy=True), inplace=True)


def _key_patches(patcher: Any, prefix: str | None) -> Mapping[str, list]:
    """The host's own table of weights and patches; of a MODEL in scaled fp8, for which the host has none, the same."""
    try:
        return patcher.get_key_patches(prefix)
    except AttributeError:  # quantised layers list tensors (scales, notes) that they have no attribute of
        entries = {}
        for key in patcher.model_state_dict(prefix):
            try:
                weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
            except AttributeError:
                continue
            kept = patcher.backup.get(key)
            first = (weight if kept is None else kept.weight, convert or (lambda value, **_: value))
            entries[key] = [first, *patcher.patches.get(key, ())]
        return entries
