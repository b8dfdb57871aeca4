"""Cross-attention maps of chosen tokens, read off the layers that the refinement loss supervises."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import BaseModelError
from .families import SUPPORTED

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def cross_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """All text cross-attention layers (``attn2``) by module name, in the UNet's order."""
    from diffusers.models.attention_processor import Attention  # takes seconds, which every start of a host would pay

    return {name: m for name, m in unet.named_modules() if name.endswith("attn2") and isinstance(m, Attention)}


def layer_stride(name: str, levels: int) -> int:
    """Latent cells per side of an attention cell of a layer, from its name in a UNet of ``levels`` levels.

    Raises BaseModelError for a layer outside of the down, mid and up blocks.
    """
    if name.startswith("mid_block"):
        return 2 ** (levels - 1)
    found = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if not found:
        raise BaseModelError(f"base: the attention layer {name} is in no block that FaR knows; use a {SUPPORTED} model")
    level = int(found[2])
    return 2 ** (level if found[1] == "down" else levels - 1 - level)


def supervised_layers(
    unet: nn.Module, latent_height: int, latent_width: int, cells: int = 16, modules: Sequence[str] = ()
) -> list[str]:
    """Names of the layers with the smallest maps that still have ``cells`` cells on the shorter side.

    In SD 1.5 and 2.1 these are 16×16 maps at 512 px and 24×24 maps at 768 px, both at stride 4. A small model's 16×16
    layers follow from the same rule, whatever their stride. If no map is that large, the layers with the largest are
    taken. ``modules``: only layers in these are considered, if the UNet has any there
    (:attr:`.families.Family.supervised_modules`). Raises BaseModelError if the UNet has no cross-attention.
    """
    levels = len(unet.config.block_out_channels)
    strides = {name: layer_stride(name, levels) for name in among(cross_attention_layers(unet), modules)}
    if not strides:
        raise BaseModelError(f"base: the UNet has no cross-attention layers; use a {SUPPORTED} model")
    shorter = min(latent_height, latent_width)
    sides = {name: math.ceil(shorter / stride) for name, stride in strides.items()}
    chosen = supervised_side(sides.values(), cells)
    return [name for name, side in sides.items() if side == chosen]


def among(layers: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Those of the layers that are in one of the modules, by name; all of them if none is."""
    layers = list(layers)
    return [name for name in layers if name.startswith(tuple(f"{m}." for m in modules))] or layers


def supervised_side(sides: Iterable[int], cells: int = 16) -> int:
    """The shorter side of the maps to supervise: the smallest of at least ``cells``, else the largest."""
    sides = list(sides)
    return min((s for s in sides if s >= cells), default=max(sides))


def attention_columns(query: Tensor, key: Tensor, scale: float, select: Tensor) -> Tensor:
    """Softmax attention of token groups, in fp32 and averaged over heads.

    ``query`` [B, heads, cells, d] and ``key`` [B, heads, tokens, d] are already projected. ``select`` [B, G, tokens]
    weights the tokens of each of G groups. Returns [B, G, cells].
    """
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    probabilities = scores.softmax(-1).mean(1)  # [B, cells, tokens]
    return select.to(probabilities) @ probabilities.transpose(-1, -2)


class AttentionRecorder:
    """Records the attention of chosen tokens on chosen layers while the UNet runs.

    Within ``recording(select)`` each layer keeps its map of every selected token group, averaged over heads in fp32.
    ``maps()`` averages them over layers.
    """

    def __init__(self, unet: nn.Module, layers: list[str]):
        attentions = cross_attention_layers(unet)
        self.layers = {name: attentions[name] for name in layers}
        self._before = {name: layer.processor for name, layer in self.layers.items()}
        self._processors = {name: _RecordingProcessor() for name in self.layers}
        with ExitStack() as undo:  # of a recorder that fails halfway, nothing stays in the UNet
            undo.callback(self.remove)
            for name, layer in self.layers.items():
                layer.set_processor(self._processors[name])
            undo.pop_all()

    def remove(self) -> None:
        """Restore the layers' own processors."""
        for name, layer in self.layers.items():
            layer.set_processor(self._before[name])

    @contextmanager
    def recording(self, select: Tensor) -> Iterator[None]:
        """Record the forward pass of a ``with`` block. ``select`` [B, G, tokens] weights the tokens of G groups.

        The backward pass belongs in here too: a checkpointed layer runs again then and must do the same again.
        """
        self._set(select)
        try:
            yield
        finally:
            self._set(None)

    def _set(self, select: Tensor | None) -> None:
        for processor in self._processors.values():
            processor.select, processor.map = select, None

    def maps(self, latent_height: int, latent_width: int) -> Tensor:
        """Attention [B, G, h, w] of the forward pass, averaged over heads and layers.

        Call it before the backward pass. Raises BaseModelError if a layer recorded nothing.
        """
        missing = [name for name, processor in self._processors.items() if processor.map is None]
        if missing:
            raise BaseModelError(f"base: no attention was recorded on {', '.join(sorted(missing))}")
        stacked = torch.stack([processor.map for processor in self._processors.values()]).mean(0)  # [B, G, cells]
        stride = math.sqrt(latent_height * latent_width / stacked.shape[-1])
        height = round(latent_height / stride)
        return stacked.unflatten(-1, (height, stacked.shape[-1] // height))


class SdpaProcessor:
    """An attention processor for what Stable Diffusion has: plain scaled-dot-product attention.

    It leaves out the options of diffusers' ``AttnProcessor2_0`` that no family here uses, and has a hook.
    """

    def on_qk(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Hook: called with the projected queries [B, heads, cells, d] and keys [B, heads, tokens, d]."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """[B, cells, channels] attends to [B, tokens, width] → [B, cells, channels]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        self.on_qk(query, key, attn.scale)
        # In SD 2.x the product of queries and keys overflows fp16, except in kernels that keep it in fp32 internally.
        # Those for long sequences, as in self-attention, do.
        if query.dtype == torch.float16 and encoder_hidden_states is not None:
            query, key, value = query.float(), key.float(), value.float()
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class _RecordingProcessor(SdpaProcessor):
    """Also keeps the attention map of the selected token groups.

    Each processor holds its own map. In a table by layer name, torch would compile every block anew for its name.
    """

    def __init__(self) -> None:
        self.select: Tensor | None = None
        self.map: Tensor | None = None

    def on_qk(self, query: Tensor, key: Tensor, scale: float) -> None:
        if self.select is not None:
            self.map = attention_columns(query, key, scale, self.select)
