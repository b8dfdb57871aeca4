"""The base model: its modules, where they are and in which precision, and what identifies them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .families import Family
from .fingerprint import base_fingerprint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast


@dataclass(frozen=True)
class BaseModel:
    """A base with all that training and sampling need. Modules are frozen and in eval mode.

    ``text_encoders`` stand in the order of their family's table and share one ``tokenizer``. ``alphas_cumprod`` [T] in
    fp32; ``digest`` identifies the cross-attention K/V by content; ``native_size`` in pixels.
    A base is to be changed within :meth:`placed` or :func:`.apply.applied_weights` alone, which leave it as it was.
    """

    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizer: CLIPTokenizerFast
    scheduler: dict[str, Any]
    prediction_type: str
    native_size: int
    digest: str
    _fingerprint: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules by the names of their folders in diffusers' layout."""
        return dict(zip(self.family.parts, (self.unet, self.vae, *self.text_encoders), strict=True))

    @property
    def fingerprint(self) -> str:
        """Identifies all weights by content. Computed anew only where a tensor was replaced or written to.

        Writes through ``.data`` are seen by samples of each tensor alone.
        """
        tensors, seen = self._tensors()
        # The objects themselves, since the memory of one that was replaced is given to another.
        known = self._fingerprint.get("tensors", [])
        same = len(known) == len(tensors) and all(known_one() is t for known_one, t in zip(known, tensors))
        if not same or self._fingerprint["seen"] != seen:
            self.remember_fingerprint(base_fingerprint({part: m.state_dict() for part, m in self.parts.items()}))
        return self._fingerprint["value"]

    def remember_fingerprint(self, value: str) -> None:
        """Take ``value`` for the fingerprint of the weights as they are: for callers that computed it elsewhere."""
        tensors, seen = self._tensors()
        self._fingerprint.update(tensors=[weakref.ref(t) for t in tensors], seen=seen, value=value)

    def _tensors(self) -> tuple[list[Tensor], list[tuple]]:
        """All parameters and buffers, and by what a write to each of them is noticed."""
        states = (module.state_dict(keep_vars=True) for module in self.parts.values())
        tensors = [tensor for state in states for tensor in state.values()]
        return tensors, [(t.data_ptr(), t._version, *_samples(t)) for t in tensors]

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler).alphas_cumprod

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule ends in pure noise; otherwise it is Stable Diffusion's own."""
        return bool(self.scheduler.get("rescale_betas_zero_snr"))

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def tokenizer_size(self) -> int:
        """Rows of the text encoders' embedding tables; the ids of placeholder tokens begin behind them."""
        return self.text_encoders[0].get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        """Move all parts; ``dtype`` is for UNet and text encoders, the VAE stays in fp32, which it needs little of."""
        # nn.Module's own method: diffusers' would warn of every cast, modules to be kept in fp32 or not.
        for module in (self.unet, *self.text_encoders):
            nn.Module.to(module, device=device, dtype=dtype)
        nn.Module.to(self.vae, device=device)
        return self

    @contextmanager
    def placed(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Iterator[BaseModel]:
        """Within, :meth:`to` this device and precision; afterwards as it was, to the bit, where it was.

        The original weights are held meanwhile, in what memory they are in.
        """
        modules = [m for part in self.parts.values() for m in part.modules()]
        held = [(p, p.data) for m in modules for p in m.parameters(recurse=False)]
        buffers = [(m, name, buffer) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        try:
            yield self.to(device, dtype)
        finally:
            for parameter, data in held:
                parameter.data = data
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


def _samples(tensor: Tensor) -> list[float]:
    """About sixteen values from all over a tensor."""
    values = tensor.detach().reshape(-1)
    return values[:: max(len(values) // 16, 1)].tolist()
