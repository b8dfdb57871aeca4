"""A segment-anything model that is small enough for any test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from far_train.data.sam import build_sam

TINY = {
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "global_attn_indexes": [1],
    "image_size": 64,
    "window_size": 3,
    "patch_size": 8,
    "mlp_dim": 40,
    "prompt_dim": 32,
    "mask_channels": 8,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "decoder_mlp_dim": 48,
    "iou_depth": 2,
    "iou_dim": 20,
}


def tiny_sam(seed: int = 0) -> Any:
    """A small SAM whose weights are all random, also those that start as zeros."""
    torch.manual_seed(seed)
    sam = build_sam(TINY)
    with torch.no_grad():
        for p in sam.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return sam


def save_tiny(path: Path, sam: Any, stated: str = '{"decoder_heads": 4}') -> Path:
    """Write a SAM as its suffix says; ``stated``: what a safetensors file says of the shape beside its weights."""
    if path.suffix == ".safetensors":
        save_file(sam.state_dict(), path, {"far_sam": stated})
    else:
        torch.save(sam.state_dict(), path)
    return path
