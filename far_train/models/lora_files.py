"""One LoRA file for ComfyUI, for kohya's tools and those that read its files, and for diffusers.

All of them read kohya's form: ``lora_unet_down_blocks_0_attentions_0_…_attn2_to_k.lora_down.weight`` [rank, in],
``.lora_up.weight`` [out, rank] and ``.alpha``, and add alpha / rank × up @ down to the matrix. For Stable Diffusion 1.x
and 2.x the names follow diffusers' UNet; for SDXL they follow the original one,
``lora_unet_input_blocks_4_1_…_attn2_to_k``, because kohya's tools train that. Whole differences (``.diff``) are read by
ComfyUI alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..utils.errors import WeightsError
from .families import Family
from .weights import LowRankDelta

BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.1\.(.+)")
MIDDLE = "middle_block.1."


def lora_tensors(deltas: Mapping[str, LowRankDelta], family: Family) -> dict[str, Tensor]:
    """The tensors of a LoRA file for a base of ``family``, in fp16, from the changes by LDM layer name.

    Raises WeightsError for layers that are none of a UNet's attention.
    """
    names = kohya_names(deltas, family)
    tensors = {}
    for name, delta in deltas.items():
        tensors[f"{names[name]}.lora_down.weight"] = delta.down.to(torch.float16)
        tensors[f"{names[name]}.lora_up.weight"] = delta.up.to(torch.float16)
        tensors[f"{names[name]}.alpha"] = torch.tensor(float(delta.rank))  # alpha = rank: the product is not scaled
    return tensors


def kohya_names(layers: Iterable[str], family: Family) -> dict[str, str]:
    """Map LDM layer names to kohya's for a family.

    Raises WeightsError for layers that are none of a UNet's attention.
    """
    layers = list(layers)
    for name in layers:
        if not name.startswith(MIDDLE) and not BLOCK.fullmatch(name):
            raise WeightsError(f"weights: {name} is no layer of a UNet's attention, which LoRA files hold")
    places = _diffusers_names(layers) if family.lora_names == "diffusers" else dict(zip(layers, layers))
    return {name: f"lora_unet_{place.replace('.', '_')}" for name, place in places.items()}


def _diffusers_names(layers: Sequence[str]) -> dict[str, str]:
    """Map LDM names of layers of a UNet with attention from its first level on to diffusers'.

    For example ``input_blocks.1.1.….to_out.0`` → ``down_blocks.0.attentions.0.….to_out.0``. LDM numbers all blocks
    consecutively, diffusers numbers them by level. The layers per level follow from the names, since an input block
    without attention (the downsampler) stands between two levels.
    """
    found = {name: BLOCK.fullmatch(name) for name in layers}
    inputs = sorted({int(m[2]) for m in found.values() if m and m[1] == "input_blocks"})
    depth = next((n for n, index in enumerate(inputs) if index != n + 1), len(inputs))
    names = {}
    for name, match in found.items():
        if name.startswith(MIDDLE):
            names[name] = f"mid_block.attentions.0.{name.removeprefix(MIDDLE)}"
        elif depth:
            half = "down" if match[1] == "input_blocks" else "up"
            level, layer = divmod(int(match[2]) - (half == "down"), depth + 1)
            if half == "down" and layer == depth:
                raise WeightsError(f"weights: {name} stands where a UNet has no attention; the file is damaged")
            names[name] = f"{half}_blocks.{level}.attentions.{layer}.{match[3]}"
        else:
            raise WeightsError(f"weights: {name} stands in a UNet without attention on its first level; is it SDXL's?")
    return names


def truncated_svd(delta: Tensor, rank: int) -> LowRankDelta:
    """The best approximation of a matrix [out, in] by one of ``rank``, in the Frobenius norm (Eckart and Young 1936).

    Each singular value is shared equally between the factors, which keeps both in fp16's range.
    """
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRankDelta(u[:, :rank] * root, root[:, None] * v[:rank])


def exact_factorization(delta: Tensor) -> LowRankDelta:
    """A matrix [out, in] as the product of itself and an identity, at its full rank min(out, in)."""
    rows, columns = delta.shape
    return LowRankDelta(torch.eye(rows), delta) if rows <= columns else LowRankDelta(delta, torch.eye(columns))
