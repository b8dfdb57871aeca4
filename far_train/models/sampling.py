"""Pictures from a base, with or without FaR weights, through diffusers' own pipeline."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.errors import ConfigError
from ..utils.out_of_memory import in_batches, with_less_memory
from .base import BaseModel
from .conditioning import TextConditioner
from .settings import DrawConfig
from .tokens import Vocabulary, unknown_tokens

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin

log = logging.getLogger(__name__)


@torch.no_grad()
def draw_pictures(
    base: BaseModel,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    config: DrawConfig = DrawConfig(),
    *,
    size: tuple[int, int] | None = None,
    seeds: Sequence[int] | None = None,
    like_ksampler: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Draw one picture per prompt, [n, H, W, 3] float 0..1 on the CPU, with classifier-free guidance.

    By DDIM (Song et al. 2021, arXiv 2010.02502) or by DPM-Solver++ of second order (Lu et al. 2022, arXiv 2211.01095).

    Picture i has the seed ``seeds[i]``, by default ``sample_seed`` + i, whatever the batch size. ``size``: height and
    width in pixels, where the config has none; default the base's own. ``like_ksampler``: by DDIM just as ComfyUI's
    KSampler does with sampler ddim and scheduler ddim_uniform (simple, for zero terminal SNR), if the number of steps
    divides 1000. ``on_progress(done, total)`` counts sampling steps and may raise to stop.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    kind = DDIMScheduler if config.sampler == "ddim" else DPMSolverMultistepScheduler
    # ComfyUI's last step ends without noise, diffusers' at that of timestep 0.
    scheduler = kind.from_config(base.scheduler, **({"set_alpha_to_one": True} if like_ksampler else {}))
    seeds = seeds or range(config.sample_seed, config.sample_seed + len(prompts))
    height = config.height or (size or (base.native_size,) * 2)[0]
    width = config.width or (size or (base.native_size,) * 2)[1]
    check_size(base, height, width, ("height", "width") if config.height or config.width else ("size", "size"))
    for token in sorted({t for p in prompts for t in unknown_tokens(p, [n.token for n in vocabulary.names])}):
        log.warning("The prompt holds %s, which no loaded concept has: it is read as plain text.", token)
    pipeline = _pipeline(base, scheduler)
    conditioner = TextConditioner(base)
    total = -(-len(prompts) // config.sample_batch) * config.sampling_steps
    done = 0

    def count(_pipeline: object, _step: int, _timestep: object, kwargs: dict) -> dict:
        nonlocal done
        done = min(done + 1, total)  # where memory runs out, smaller batches take more steps in all
        on_progress(done, total)
        return kwargs

    def decode(latent: Tensor) -> Tensor:
        return base.vae.decode(latent.to(base.vae.device) / base.vae.config.scaling_factor).sample.float().cpu()

    shape = (base.unet.config.in_channels, height // base.downscale, width // base.downscale)
    level = _first_level(scheduler, config.sampling_steps) if like_ksampler else 1.0

    def noise(seed: int) -> Tensor:
        return level * torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))

    def draw(batch: range) -> list[Tensor]:
        tokenized = [vocabulary.tokenize(prompts[i], truncate=True) for i in batch]
        negative = [vocabulary.tokenize(config.negative_prompt, truncate=True)] * len(batch)
        latents = pipeline(
            **conditioner.encode(tokenized, (height, width)).pipeline_kwargs(),
            **conditioner.encode(negative, (height, width)).pipeline_kwargs("negative_"),
            latents=torch.stack([noise(seeds[i]) for i in batch]).to(base.unet.dtype),
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


def _pipeline(base: BaseModel, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The family's pipeline without text encoders: prompts come encoded. Asked for its dtype, a text encoder would
    name that of the placeholder tokens' fp32 rows."""
    import diffusers

    kind = getattr(diffusers, base.family.pipeline)
    given = {"vae": base.vae, "unet": base.unet, "scheduler": scheduler, "requires_safety_checker": False}
    wanted = inspect.signature(kind).parameters.values()
    pipeline = kind(**{p.name: given.get(p.name) for p in wanted if p.name in given or p.default is p.empty})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _first_level(scheduler: DDIMScheduler, steps: int) -> float:
    """Standard deviation of the noise at the first timestep. diffusers begins with that of the last one of training."""
    scheduler.set_timesteps(steps)
    first = int(scheduler.timesteps[0])
    is_last = first + 1 == scheduler.config.num_train_timesteps
    return 1.0 if is_last else float((1 - scheduler.alphas_cumprod[first]).sqrt())


def check_size(base: BaseModel, height: int, width: int, names: tuple[str, str]) -> None:
    """Refuse sizes that the UNet's levels can't halve. ``names``: of their fields. Raises ConfigError."""
    cell = base.downscale * 2 ** (len(base.unet.config.block_out_channels) - 1)
    for name, side in zip(names, (height, width)):
        if side % cell:
            raise ConfigError(f"{name}: {side} px does not fit this base; use a multiple of {cell}")
