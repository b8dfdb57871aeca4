"""The UNet's layers: what of them runs checkpointed or compiled, and where its attention projects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .keys import unet_to_ldm


def set_checkpointing(unet: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing, which trades time for memory."""
    if on:
        # The UNet draws nothing at random; a CUDA graph can't be captured where the generator's state is read.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    else:
        unet.disable_gradient_checkpointing()
    unet.train(on)  # diffusers checkpoints in training mode only; the UNet has no dropout


# Blocks share their code, and each kind of pass of each size is a graph of its own. Beyond its limit, 8 by default,
# torch runs what it has no graph for eagerly.
MOST_GRAPHS = 64


@contextmanager
def compiled(unet: nn.Module, **options: Any) -> Iterator[None]:
    """Within, the transformer blocks are compiled, which repeat (diffusers' regional compilation).

    ``options`` are torch.compile's.
    """
    limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    with torch._dynamo.config.patch(recompile_limit=limit):
        unet.compile_repeated_blocks(**options)
        try:
            yield
        finally:
            _run_eagerly(unet)


@contextmanager
def uncompiled(unet: nn.Module) -> Iterator[None]:
    """Within, the UNet runs as it is: sample pictures have other sizes, and few passes, to be compiled for."""
    calls = {m: m._compiled_call_impl for m in unet.modules() if m._compiled_call_impl is not None}
    _run_eagerly(unet)
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call


def _run_eagerly(unet: nn.Module) -> None:
    for module in unet.modules():
        module._compiled_call_impl = None  # compiling a module has no public way back


def attention_projections(unet: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Q, K, V and output of all self- and cross-attention: original (LDM) layer name → (the module that holds it, its
    name there).

    LDM names, ``input_blocks.1.1.transformer_blocks.0.attn2.to_k``, because FaR weights go to hosts that use them.
    """
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    found = {}
    for name in (n for n, _ in unet.named_modules() if n.endswith(tuple(f".{part}" for part in parts))):
        owner, _, last = name.rpartition(".")
        found[unet_to_ldm(name, unet.config)] = (unet.get_submodule(owner), last)
    return found


def kv_layers(unet: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The cross-attention K and V among :func:`attention_projections`: name → (attention layer, "to_k" or "to_v")."""
    ends = (".attn2.to_k", ".attn2.to_v")
    return {name: found for name, found in attention_projections(unet).items() if name.endswith(ends)}


def kv_weights(unet: nn.Module) -> dict[str, Tensor]:
    """The matrices of :func:`kv_layers`, each [channels, context width]."""
    return {name: getattr(layer, part).weight for name, (layer, part) in kv_layers(unet).items()}
