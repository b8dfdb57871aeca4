"""Pictures from a base, with or without FaR weights, through diffusers' own pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backbone import BaseModel
from .config import SampleConfig
from .errors import ConfigError
from .tokens import TokenizedPrompt, Vocabulary, unknown_tokens

log = logging.getLogger(__name__)


class TextCache:
    """Text conditioning of prompts without modifiers: it can't change while training, so it is computed once."""

    def __init__(self) -> None:
        self.encoded: dict[tuple[int, ...], Tensor] = {}


def encode_prompts(base: BaseModel, prompts: Sequence[TokenizedPrompt], cache: TextCache | None = None) -> Tensor:
    """Text conditioning [B, length, width]; equal prompts are encoded once, with gradients where modifiers stand."""
    encoder = base.text_encoder
    size = base.tokenizer_size
    cache = cache or TextCache()
    unique = list(dict.fromkeys(p.ids for p in prompts))
    learned = [ids for ids in unique if max(ids) >= size]
    encoded: dict[tuple[int, ...], Tensor] = {}
    for ids in unique:
        if ids not in learned:
            if ids not in cache.encoded:
                with torch.no_grad():
                    cache.encoded[ids] = encoder(torch.tensor([ids], device=encoder.device)).last_hidden_state[0]
            encoded[ids] = cache.encoded[ids]
    if learned:
        states = encoder(torch.tensor(learned, device=encoder.device)).last_hidden_state
        encoded |= dict(zip(learned, states))
    return torch.stack([encoded[p.ids] for p in prompts])


@torch.no_grad()
def draw_pictures(
    base: BaseModel,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    config: SampleConfig = SampleConfig(),
    *,
    size: tuple[int, int] | None = None,
    seeds: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Draw one picture per prompt, [n, H, W, 3] float 0..1 on the CPU. DDIM with classifier-free guidance.

    Picture i has the seed ``seeds[i]``, by default ``sample_seed`` + i, whatever the batch size. ``size``: height and
    width in pixels, where the config has none; default the base's own. ``on_progress(done, total)`` counts sampling
    steps and may raise to stop.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    seeds = seeds or range(config.sample_seed, config.sample_seed + len(prompts))
    height = config.height or (size or (base.native_size,) * 2)[0]
    width = config.width or (size or (base.native_size,) * 2)[1]
    check_size(base, height, width)
    for token in sorted({t for p in prompts for t in unknown_tokens(p, [n.token for n in vocabulary.names])}):
        log.warning("The prompt holds %s, which no loaded concept has: it is read as plain text.", token)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=DDIMScheduler.from_config(base.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    batches = [
        list(range(i, min(i + config.sample_batch, len(prompts)))) for i in range(0, len(prompts), config.sample_batch)
    ]
    total = len(batches) * config.sampling_steps
    done = 0

    def count(_pipeline: object, _step: int, _timestep: object, kwargs: dict) -> dict:
        nonlocal done
        done += 1
        on_progress(done, total)
        return kwargs

    pictures = []
    for batch in batches:
        tokenized = [vocabulary.tokenize(prompts[i], truncate=True) for i in batch]
        negative = [vocabulary.tokenize(config.negative_prompt, truncate=True)] * len(batch)
        latents = pipeline(
            prompt_embeds=encode_prompts(base, tokenized),
            negative_prompt_embeds=encode_prompts(base, negative),
            generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in batch],
            height=height,
            width=width,
            num_inference_steps=config.sampling_steps,
            guidance_scale=config.guidance,
            output_type="latent",
            callback_on_step_end=count,
        ).images
        decoded = base.vae.decode(latents.to(base.vae.dtype) / base.vae.config.scaling_factor).sample
        pictures.append((decoded.float().cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    return torch.cat(pictures)


def check_size(base: BaseModel, height: int, width: int) -> None:
    """Refuse sizes that the UNet's levels can't halve. Raises ConfigError."""
    cell = base.downscale * 2 ** (len(base.unet.config.block_out_channels) - 1)
    for name, side in (("height", height), ("width", width)):
        if side % cell:
            raise ConfigError(f"{name}: {side} px does not fit this base; use a multiple of {cell}")
