"""Pictures from a base, with or without FaR weights, through diffusers' own pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..utils.errors import ConfigError
from ..utils.out_of_memory import in_batches, with_less_memory
from .base import BaseModel
from .settings import SampleConfig
from .tokens import TokenizedPrompt, Vocabulary, unknown_tokens

log = logging.getLogger(__name__)


class TextCache:
    """What of prompts can't change while training, on the device: their token ids, and the text conditioning of those
    without modifiers. ``prompts`` are prepared at once; others when they are met."""

    def __init__(self, base: BaseModel, prompts: Sequence[TokenizedPrompt] = ()) -> None:
        self._encoder, self._size = base.text_encoder, base.tokenizer_size
        self._ids: dict[tuple[int, ...], Tensor] = {}
        self._encoded: dict[tuple[int, ...], Tensor] = {}
        for ids in dict.fromkeys(p.ids for p in prompts):
            prepare = self.ids if self.is_learned(ids) else self.encoded
            prepare(ids)

    def is_learned(self, ids: tuple[int, ...]) -> bool:
        """Whether a modifier stands in a prompt."""
        return max(ids) >= self._size

    def ids(self, ids: tuple[int, ...]) -> Tensor:
        """Token ids [length] on the device."""
        if ids not in self._ids:
            self._ids[ids] = torch.tensor(ids, device=self._encoder.device)
        return self._ids[ids]

    @torch.no_grad()
    def encoded(self, ids: tuple[int, ...]) -> Tensor:
        """Text conditioning [length, width] of a prompt without modifiers."""
        if ids not in self._encoded:
            self._encoded[ids] = self._encoder(self.ids(ids)[None]).last_hidden_state[0]
        return self._encoded[ids]


def encode_prompts(base: BaseModel, prompts: Sequence[TokenizedPrompt], cache: TextCache | None = None) -> Tensor:
    """Text conditioning [B, length, width]; equal prompts are encoded once, with gradients where modifiers stand."""
    cache = cache or TextCache(base)
    unique = list(dict.fromkeys(p.ids for p in prompts))
    learned = [ids for ids in unique if cache.is_learned(ids)]
    encoded = {ids: cache.encoded(ids) for ids in unique if ids not in learned}
    if learned:
        encoded |= dict(zip(learned, base.text_encoder(torch.stack([cache.ids(i) for i in learned])).last_hidden_state))
    return torch.stack([encoded[p.ids] for p in prompts])


def plain_vocabulary(base: BaseModel) -> Vocabulary:
    """The base's own words, with no concept added."""
    return Vocabulary(base.tokenizer, (), base.tokenizer_size)


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
    """Draw one picture per prompt, [n, H, W, 3] float 0..1 on the CPU, with classifier-free guidance.

    By DDIM (Song et al. 2021, arXiv 2010.02502) or by DPM-Solver++ of second order (Lu et al. 2022, arXiv 2211.01095).

    Picture i has the seed ``seeds[i]``, by default ``sample_seed`` + i, whatever the batch size. ``size``: height and
    width in pixels, where the config has none; default the base's own. ``on_progress(done, total)`` counts sampling
    steps and may raise to stop.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler if config.sampler == "ddim" else DPMSolverMultistepScheduler
    seeds = seeds or range(config.sample_seed, config.sample_seed + len(prompts))
    height = config.height or (size or (base.native_size,) * 2)[0]
    width = config.width or (size or (base.native_size,) * 2)[1]
    check_size(base, height, width)
    for token in sorted({t for p in prompts for t in unknown_tokens(p, [n.token for n in vocabulary.names])}):
        log.warning("The prompt holds %s, which no loaded concept has: it is read as plain text.", token)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=None,  # prompts come encoded; asked for its dtype, it would name that of the modifiers' fp32 rows
        tokenizer=None,
        unet=base.unet,
        scheduler=scheduler.from_config(base.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    total = -(-len(prompts) // config.sample_batch) * config.sampling_steps
    done = 0

    def count(_pipeline: object, _step: int, _timestep: object, kwargs: dict) -> dict:
        nonlocal done
        done = min(done + 1, total)  # where memory runs out, smaller batches take more steps in all
        on_progress(done, total)
        return kwargs

    def decode(latent: Tensor) -> Tensor:
        return base.vae.decode(latent.to(base.vae.device) / base.vae.config.scaling_factor).sample.float().cpu()

    def draw(batch: range) -> list[Tensor]:
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
        # One by one: the decoder fills a GPU with a single picture.
        decoded = [
            with_less_memory(base.vae, lambda latent=latent: decode(latent))
            for latent in latents.to(base.vae.dtype).split(1)
        ]
        return [(picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) for picture in decoded]

    return torch.cat(in_batches(draw, len(prompts), config.sample_batch, "pictures"))


def check_size(base: BaseModel, height: int, width: int) -> None:
    """Refuse sizes that the UNet's levels can't halve. Raises ConfigError."""
    cell = base.downscale * 2 ** (len(base.unet.config.block_out_channels) - 1)
    for name, side in (("height", height), ("width", width)):
        if side % cell:
            raise ConfigError(f"{name}: {side} px does not fit this base; use a multiple of {cell}")
