"""Where a base looks for each subject's words: its cross-attention on a noised picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionRecorder, supervised_layers
from .backbone import BaseModel
from .captions import Name, locate_mentions
from .losses import add_noise
from .pool import average_tokens
from .sampling import encode_prompts
from .tokens import Vocabulary


@torch.no_grad()
def attention_maps(
    base: BaseModel,
    vocabulary: Vocabulary,
    image: Tensor,
    caption: str,
    names: Sequence[Name],
    *,
    timestep: int = 500,
    noise_seed: int = 0,
) -> Tensor:
    """Attention of each subject's words over a picture, [names, h, w] in fp32 on the CPU.

    The picture [H, W, 3] (0..1) is noised to ``timestep``; the layers are those that Localized Refinement supervises.
    A concept's words are its modifier token, a bare noun's the noun. Raises CaptionError if one isn't in the caption.
    """
    prompt = vocabulary.tokenize(caption)
    spans = locate_mentions(caption, names)
    select = torch.stack([average_tokens(prompt, s.token or s.noun) for s in spans])[None]
    pixels = image.permute(2, 0, 1)[None].to(base.device, base.vae.dtype) * 2 - 1
    latents = base.vae.encode(pixels).latent_dist.mean.float() * base.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(noise_seed)).to(latents)
    time = torch.tensor([timestep], device=base.device)
    noisy, _ = add_noise(latents, noise, base.alphas_cumprod.to(base.device)[time], base.prediction_type)
    recorder = AttentionRecorder(base.unet, supervised_layers(base.unet, *latents.shape[-2:]))
    try:
        with recorder.recording(select.to(base.device)):
            context = encode_prompts(base, [prompt])
            base.unet(noisy.to(context.dtype), time, context)
            return recorder.maps(*latents.shape[-2:])[0].float().cpu()
    finally:
        recorder.remove()


def heat_over(image: Tensor, heat: Tensor) -> Tensor:
    """A picture [H, W, 3] with a map [h, w] over it, dark where it is small: [H, W, 3]."""
    share = (heat / heat.max().clamp(min=1e-8))[None, None]
    share = F.interpolate(share, size=tuple(image.shape[:2]), mode="bilinear", align_corners=False)[0, 0, ..., None]
    glow = torch.tensor([1.0, 0.55, 0.1])
    return (image * (0.25 + 0.45 * share) + 0.45 * share * glow).clamp(0, 1)
