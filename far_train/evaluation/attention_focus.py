"""Cross-attention maps of each subject's tokens on a noised picture, and how well they keep to the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.captions import Name, locate_mentions
from ..models.attention_maps import AttentionRecorder, supervised_layers
from ..models.base import BaseModel
from ..models.conditioning import TextConditioner
from ..models.tokens import Vocabulary
from ..training.latent_cache import average_tokens
from ..training.losses import add_noise


@torch.no_grad()
def attention_maps(
    base: BaseModel,
    vocabulary: Vocabulary,
    image: Tensor,
    caption: str,
    names: Sequence[Name],
    *,
    timestep: int | Sequence[int] = 500,
    noise_seed: int = 0,
    cells: int = 16,
) -> Tensor:
    """Attention maps of the subjects over a picture, [names, h, w] in fp32 on the CPU.

    The picture [H, W, 3] (0..1) is noised to ``timestep``; several timesteps use the same noise, and their maps are
    averaged. The layers are those that Localized Refinement supervises with maps of ``cells`` cells. A concept's map is
    that of its placeholder token, a class subject's that of its noun. Raises CaptionError if one isn't in the caption.
    """
    prompt = vocabulary.tokenize(caption)
    spans = locate_mentions(caption, names)
    select = torch.stack([average_tokens(prompt, s.token or s.noun) for s in spans])[None].to(base.device)
    pixels = image.permute(2, 0, 1)[None].to(base.device, base.vae.dtype) * 2 - 1
    latents = base.vae.encode(pixels).latent_dist.mean.float() * base.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(noise_seed)).to(latents)
    conditioning = TextConditioner(base).encode([prompt], tuple(image.shape[:2]))
    context = conditioning.context
    layers = supervised_layers(base.unet, *latents.shape[-2:], cells, base.family.supervised_modules)
    recorder = AttentionRecorder(base.unet, layers)
    maps = []
    try:
        for moment in [timestep] if isinstance(timestep, int) else timestep:
            time = torch.tensor([moment], device=base.device)
            noisy, _ = add_noise(latents, noise, base.alphas_cumprod.to(base.device)[time], base.prediction_type)
            with recorder.recording(select):
                base.unet(noisy.to(context.dtype), time, context, **conditioning.unet_kwargs())
                maps.append(recorder.maps(*latents.shape[-2:])[0].float().cpu())
    finally:
        recorder.remove()
    return torch.stack(maps).mean(0)


@dataclass(frozen=True)
class Focus:
    """How well a map keeps to a subject: mean attention per cell inside and outside its mask, and pointing accuracy.

    ``hottest_inside``: whether the cell with the highest attention lies inside the mask.
    """

    inside: float
    outside: float
    hottest_inside: bool

    @property
    def ratio(self) -> float:
        """Mean attention inside over outside; infinite if there is none outside."""
        return self.inside / self.outside if self.outside else float("inf")


def focus(heat: Tensor, mask: Tensor) -> Focus:
    """Compare a map [h, w] with a subject's mask [H, W] (0..1) of the same picture.

    The mask is averaged over the map's cells; a cell that it half covers counts half inside and half outside. NaN where
    the mask has no inside or no outside.
    """
    share = F.adaptive_avg_pool2d(mask[None, None].float(), tuple(heat.shape))[0, 0]
    inside, outside = ((heat * part).sum() / part.sum() for part in (share, 1 - share))
    return Focus(float(inside), float(outside), bool(share.flatten()[heat.argmax()] > 0.5))


def heat_over(image: Tensor, heat: Tensor) -> Tensor:
    """A pale, dark picture [H, W, 3] with a map [h, w] overlaid from red to yellow, [H, W, 3]."""
    share = stretched(heat, tuple(image.shape[:2]))[..., None]
    glow = torch.cat([share**0.7, 0.75 * share**1.6, 0.35 * share**4], -1)
    pale = torch.lerp(image.mean(-1, keepdim=True), image, 0.4)
    return (pale * (0.35 + 0.25 * share) + 0.7 * glow).clamp(0, 1)


def stretched(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [h, w] as a share of its own maximum, at a picture's ``size`` (height, width)."""
    share = (heat / heat.max().clamp(min=1e-8))[None, None]
    return F.interpolate(share, size=size, mode="bilinear", align_corners=False)[0, 0]
