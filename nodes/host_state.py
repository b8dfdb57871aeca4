"""The weights of the host's models as plain tensors, whatever form the host keeps them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch
from torch import Tensor


def read_weights(patcher: Any, prefix: str | None = None, ends: tuple[str, ...] = ("",), patched: bool = True) -> dict:
    """Copies in fp32 on the CPU of a patcher's weights, with its patches; nothing is loaded, moved or changed."""
    weights = {}
    with torch.inference_mode(False), torch.no_grad():
        for key, entry in _key_patches(patcher, prefix).items():
            if not key.endswith(ends):
                continue
            (weight, convert), patches = entry[0], entry[1:]
            weight = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
            if type(weight) not in (Tensor, torch.nn.Parameter):  # quantised, with its scale inside
                weight = weight.dequantize().float()
            weights[key] = comfy.lora.calculate_weight(patches, weight, key) if patches and patched else weight
    return weights


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
