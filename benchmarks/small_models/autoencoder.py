"""The small autoencoder: diffusers' AutoencoderKL with four latent channels and stride 8, trained from scratch.

No adversary and no perceptual network: the world's flat shapes are held by plain errors on several scales and on
gradients. While it trains, a linear map reads each cell's mean colour off the latents: without this short way to the
encoder, colours come late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from far_train.mini.world import render_scene
from far_train.models.families import SD21
from far_train.models.loading import packaged_configs
from far_train.utils.errors import BaseModelError
from far_train.utils.files import load_state, write_json

from .learning import (
    LearnConfig,
    OnStep,
    draw_rows,
    fit,
    seeded,
    step_generator,
    weights_digest,
    write_figures,
    write_module,
)
from .scene_pool import ScenePool, as_pictures

BLOCKS = (64, 64, 96, 96)  # four levels make stride 8; 32 norm groups, as hosts fix them, want two channels or more
KL_WEIGHT = 1e-3
L2_WEIGHT, DECODER_L2_WEIGHT = 2.0, 10.0  # alone, the decoder may go for what PSNR counts: its input is settled
ON_SPRITES = 0.8  # share of crops that hold a part of a sprite for sure
CODED = 2048  # pictures from which the latents' spread is measured
EVAL_SEED = 3  # a series of scenes that no training uses
PSNR_GATE = 27.0


def autoencoder_config(size: int = 128, blocks: Sequence[int] = BLOCKS) -> dict[str, Any]:
    """SD 2.1's autoencoder config with fewer channels and layers."""
    config = packaged_configs(SD21, "v_prediction")["vae"]
    return config | {"block_out_channels": list(blocks), "layers_per_block": 1, "sample_size": size}


def build_autoencoder(config: dict[str, Any]) -> Any:
    """An AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def picture_loss(drawn: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Errors between pictures [B, 3, H, W], each a mean over everything.

    ``l1``, ``l2``; ``gradient``: L1 between neighbours' differences, which keeps edges where they are; ``scales``: L1
    after pooling by 2, 4 and 8, which keeps colours true over areas.
    """
    gap = drawn.float() - target.float()
    gradient = (gap[..., 1:] - gap[..., :-1]).abs().mean() + (gap[..., 1:, :] - gap[..., :-1, :]).abs().mean()
    scales = sum(F.avg_pool2d(gap, k).abs().mean() for k in (2, 4, 8)) / 3
    return {"l1": gap.abs().mean(), "l2": gap.square().mean(), "gradient": gradient, "scales": scales}


def kl_term(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from the unit Gaussian, in nats per latent number (Kingma & Welling 2014, arXiv 1312.6114)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def crop_to_sprites(pictures: Tensor, labels: Tensor, side: int, choices: torch.Generator) -> Tensor:
    """Windows [B, 3, side, side] of pictures [B, 3, S, S], most of them around a point of a sprite.

    ``labels`` [B, S, S]: 0 where no sprite is. Places repeat and are learned soon; sprites are what takes long.
    """
    windows, last = [], pictures.shape[-1] - side
    for picture, owner in zip(pictures, labels):
        corner = torch.randint(last + 1, (2,), generator=choices)
        inside = owner.nonzero()
        if len(inside) and torch.rand((), generator=choices) < ON_SPRITES:
            point = inside[torch.randint(len(inside), (), generator=choices)].cpu()
            corner = (point - torch.randint(side, (2,), generator=choices)).clamp(0, last)
        top, left = corner.tolist()
        windows.append(picture[:, top : top + side, left : left + side])
    return torch.stack(windows)


def learn_autoencoder(
    pool: ScenePool,
    folder: Path,
    config: LearnConfig,
    *,
    blocks: Sequence[int] = BLOCKS,
    crop: int = 0,
    kl_weight: float = KL_WEIGHT,
    start: Path | None = None,
    decoder_only: bool = False,
    compiled: bool = False,
    on_step: OnStep = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """Train on a pool's pictures, or go on with it; writes ``folder``/vae when done and returns that autoencoder.

    ``crop``: train on windows of this many pixels (0: whole pictures), for machines that would wait long. ``start``: a
    folder of an AutoencoderKL to begin with; ``decoder_only``: its latents, and so every base that was trained on them,
    stay as they are. ``compiled``: through torch.compile, a fifth faster on a CPU. Raises BaseModelError.
    """
    if decoder_only and not start:
        raise BaseModelError("a decoder is trained on the latents of a finished encoder: name its folder (--start)")
    size = pool.config.picture_size
    shape = autoencoder_config(size, blocks)
    vae = seeded(config.learn_seed, lambda: build_autoencoder(shape))
    if start:
        load_state(vae, load_file(start / "diffusion_pytorch_model.safetensors"), start)
    colours = seeded(config.learn_seed, lambda: nn.Conv2d(shape["latent_channels"], 3, 1))
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv, colours):
            part.requires_grad_(False)
    l2_weight = DECODER_L2_WEIGHT if decoder_only else L2_WEIGHT
    if compiled:
        vae.encoder.compile()
        vae.decoder.compile()

    def step_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(vae.parameters()).device
        rows = draw_rows(config.learn_seed, step, config.batch_size, len(pool))
        pictures = pool.hold(device).pictures(rows)
        choices = torch.Generator().manual_seed(step)
        if crop and crop < size:
            pictures = crop_to_sprites(pictures, pool.take("labels", rows), crop, choices)
        if torch.rand((), generator=choices) < 0.5:
            pictures = pictures.flip(-1)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=step_generator(config.learn_seed, step, device), device=device
        )
        drawn = vae.decode(posterior.mean + posterior.std * noise).sample
        errors = picture_loss(drawn, pictures)
        loss = errors["l1"] + l2_weight * errors["l2"] + errors["gradient"] + errors["scales"]
        if decoder_only:
            return loss, errors
        cells = F.avg_pool2d(pictures, 2 ** (len(blocks) - 1))
        errors["cells"] = (colours(posterior.mean) - cells).square().mean()
        kl = kl_term(posterior.mean, posterior.logvar)
        return loss + errors["cells"] + kl_weight * kl, {**errors, "kl": kl}

    about = {"model": "autoencoder", "blocks": list(blocks), "crop": crop, "kl_weight": kl_weight}
    about |= {"pool_seed": pool.config.pool_seed, "start": weights_digest(start), "decoder_only": decoder_only}
    both = nn.ModuleDict({"vae": vae, "colours": colours})
    vae = fit(both, step_loss, config, folder, about, on_step=on_step, should_stop=should_stop)["vae"]
    if decoder_only:
        shape["scaling_factor"] = json.loads((start / "config.json").read_text(encoding="utf-8"))["scaling_factor"]
    else:  # latents of unit spread are what the noise schedule is made for
        latents = encode_means(vae, pool.take("images", torch.arange(min(CODED, len(pool)))))
        shape["scaling_factor"] = round(1 / float(latents.float().std()), 5)
    vae.register_to_config(scaling_factor=shape["scaling_factor"])
    write_module(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    write_json(folder / "vae" / "config.json", shape)
    return vae


def load_autoencoder(folder: Path, device: torch.device | str = "cpu") -> tuple[Any, dict[str, Any]]:
    """The autoencoder that :func:`learn_autoencoder` wrote, frozen, and its config. Raises BaseModelError."""
    try:
        shape = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{folder}: holds no finished autoencoder ({e}); train it first") from e
    vae = build_autoencoder(shape)
    load_state(vae, state, folder)
    return vae.eval().requires_grad_(False).to(device), shape


@torch.no_grad()
def encode_means(vae: nn.Module, images: Tensor) -> Tensor:
    """Unscaled latent means [N, 4, h, w] of a pool's ``images`` (uint8 [N, S, S, 3]), fp16, on the autoencoder's
    device."""
    device = next(vae.parameters()).device
    batch = 128 if device.type == "cuda" else 8  # small enough for a CPU's caches
    with torch.autocast(device.type, torch.bfloat16):
        parts = [vae.encode(as_pictures(part.to(device))).latent_dist.mean.half() for part in images.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def round_trip(vae: nn.Module, pictures: Tensor, latent_noise: Tensor | None = None) -> Tensor:
    """Pictures [B, 3, H, W] (-1..1) encoded and decoded; ``latent_noise`` [B, 4, h, w] is added between, in units of
    the latents' spread."""
    latents = vae.encode(pictures).latent_dist.mean
    if latent_noise is not None:
        latents = latents + latent_noise / vae.config.scaling_factor
    return vae.decode(latents).sample.float().clamp(-1, 1)


def scene_pictures(first: int, count: int, size: int, seed: int = EVAL_SEED) -> Tensor:
    """Held-out scenes as pictures [count, 3, S, S] from -1 to 1."""
    images = [render_scene(seed, i, size).image for i in range(first, first + count)]
    return torch.stack(images).permute(0, 3, 1, 2) * 2 - 1


def measure_autoencoder(vae: nn.Module, folder: Path | None, size: int, count: int = 512) -> dict[str, Any]:
    """Reconstruction of held-out scenes: mean PSNR of whole pictures, in dB, and the worst of them."""
    device = next(vae.parameters()).device
    values = []
    for start in range(0, count, 64):
        pictures = scene_pictures(start, min(64, count - start), size).to(device)
        error = ((round_trip(vae, pictures) - pictures) / 2).square().mean((1, 2, 3))
        values.append(-10 * error.clamp(min=1e-10).log10().cpu())
    psnr = torch.cat(values)
    figures = {
        "scenes": count,
        "psnr": round(float(psnr.mean()), 2),
        "psnr_worst": round(float(psnr.min()), 2),
        "psnr_gate": PSNR_GATE,
        "reached": float(psnr.mean()) >= PSNR_GATE,
        "scaling_factor": vae.config.scaling_factor,
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    if folder:
        write_figures(folder, figures)
    return figures
