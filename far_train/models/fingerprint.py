"""Digests of weights: what tells one base, one file of weights, or one checkpoint from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MOST_THREADS = 8


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Hex digest (SHA-256) of named tensors: of names, shapes and every value, whatever the order of the mapping.

    ``dtype``: the precision in which values are compared; by default each tensor's own, which then counts as well.
    Several threads share the work: the 5 GB of Stable Diffusion 2.1 in fp32 take seconds.
    """

    def describe(name: str) -> bytes:
        tensor = tensors[name].detach().to("cpu", dtype).contiguous()
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy())
        return f"{name} {tuple(tensor.shape)} {tensor.dtype} {content.hexdigest()}\n".encode()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as threads:
        for line in threads.map(describe, sorted(tensors)):
            whole.update(line)
    return whole.hexdigest()


def base_fingerprint(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Fingerprint of a base from the state dict of each part: unet, vae, text_encoder, in diffusers' names.

    In fp32, so that a tensor counts by its values. A file in another precision holds other values, unless they happen
    to be exact in both: an fp16 and an fp32 file of one base may differ.
    """
    named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in _weights(state)}
    return fingerprint(named, torch.float32)


def kv_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest of the cross-attention K/V matrices in fp16, by which FaR weights know their base again.

    It asks less than :func:`base_fingerprint`: weights fit every base whose matrices agree in fp16, in any file format.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().to("cpu", torch.float16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Without buffers that files don't always hold, and without the prefix that transformers dropped in 5.6."""
    return ((k.removeprefix("text_model."), v) for k, v in state.items() if not k.endswith("position_ids"))
