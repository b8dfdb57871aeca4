"""The small base model: SD 2.1's UNet and text encoder with few channels, trained together from scratch.

v-prediction on SD 2.1's noise schedule, in the latents of the small autoencoder; the text model is causal and hands on
its last layer behind the final norm, as the 23 layers do that SD 2.1 keeps of its encoder.

Beside the noise, the UNet learns to say what stands in each cell, from features halfway up: aligning its features with
those that know the content speeds a diffusion model's training up (REPA, Yu et al. 2025, arXiv 2410.06940), and in this
world the content itself is known. The readout is thrown away with the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from far_train.mini.tiny import write_folder
from far_train.models.families import SD21
from far_train.models.fingerprint import fingerprint
from far_train.models.keys import strip_text_model
from far_train.models.loading import build_parts, packaged_configs
from far_train.training.losses import add_noise, denoising_loss
from far_train.utils.devices import choose_device
from far_train.utils.errors import Interrupted
from far_train.utils.files import load_state

from .autoencoder import load_autoencoder
from .content import ContentReadout, content_loss
from .encoded_scenes import EncodedScenes, token_table
from .learning import LearnConfig, Loss, OnStep, fit, seeded, step_generator, weights_digest
from .scene_pool import CAPTIONS, ScenePool, describe_pool
from .words import vocabulary, write_tokenizer

BLOCKS = (64, 128, 128, 64)
HEAD_WIDTH = 32
TEXT_WIDTH, TEXT_LAYERS = 192, 3
CONTENT_WEIGHT = 0.05
CAPTION_DROPOUT = 0.1  # share of empty prompts, which classifier-free guidance needs (arXiv 2207.12598)
FIRST_SCENES = 10_000  # with so many of them rendered, a training on CUDA begins


def diffusion_configs(
    autoencoder: dict[str, Any],
    tokenizer: Path,
    *,
    blocks: Sequence[int] = BLOCKS,
    text_width: int = TEXT_WIDTH,
    text_layers: int = TEXT_LAYERS,
) -> dict[str, Any]:
    """Component configs of a base around an autoencoder's config and a tokenizer folder.

    ``blocks``: UNet channels per level, multiples of 32, the last without cross-attention. Every attention head of the
    UNet has 32 channels, so that a host can state them as one number.
    """
    configs = packaged_configs(SD21, "v_prediction")
    configs["vae"] = autoencoder
    configs["tokenizer"] = tokenizer
    configs["unet"] |= {
        "block_out_channels": list(blocks),
        "layers_per_block": 1,
        "attention_head_dim": [c // HEAD_WIDTH for c in blocks],  # diffusers' name for the number of heads
        "cross_attention_dim": text_width,
        "sample_size": autoencoder["sample_size"] // 8,
    }
    configs["text_encoder"] |= {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_width // HEAD_WIDTH,
        "projection_dim": text_width,
        "vocab_size": len(vocabulary()),
    }
    return configs


class PlainAttention:
    """Attention of the UNet in plain matrix products, which on a CPU train faster than torch's fused kernel."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """[B, cells, channels] attends to [B, tokens, width], or to itself → [B, cells, channels]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        odds = (torch.bmm(query, key.transpose(1, 2)) * attn.scale).softmax(-1).to(value.dtype)
        out = torch.bmm(odds, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def learn_diffusion(
    autoencoder: Path,
    pool: ScenePool,
    folder: Path,
    config: LearnConfig,
    *,
    blocks: Sequence[int] = BLOCKS,
    text_width: int = TEXT_WIDTH,
    text_layers: int = TEXT_LAYERS,
    start: Path | None = None,
    on_scenes: Callable[[int, int], None] = lambda done, total: None,
    on_step: OnStep = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train UNet and text encoder, or resume; writes the base in diffusers' layout to ``folder``/base.

    ``autoencoder``: what :func:`learn_autoencoder` filled; ``start``: a base's folder to begin with. ``pool`` may still
    be growing: on CUDA the training begins with its first scenes and takes in the others as they come, elsewhere it
    waits for all; ``on_scenes(done, total)`` counts those that it waits for. Returns the base's folder.
    """
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizerFast

    device, _ = choose_device(config.device, config.precision)
    vae, vae_config = load_autoencoder(autoencoder)
    tokenizer_folder = write_tokenizer(folder / "tokenizer")
    sizes = {"blocks": blocks, "text_width": text_width, "text_layers": text_layers}
    configs = diffusion_configs(vae_config, tokenizer_folder, **sizes)
    parts = seeded(config.learn_seed, lambda: build_parts(SD21, configs, device="cpu"))
    readout = seeded(config.learn_seed, lambda: ContentReadout(parts["unet"]))
    model = nn.ModuleDict({"unet": parts["unet"], "text_encoder": parts["text_encoder"], "readout": readout})
    if device.type == "cpu":  # a matter of speed; transformers 4.50 lacks the second
        parts["unet"].set_attn_processor(PlainAttention())
        if hasattr(parts["text_encoder"], "set_attn_implementation"):
            parts["text_encoder"].set_attn_implementation("eager")
    if start:
        _start_from(model, start)
    tokenizer = CLIPTokenizerFast.from_pretrained(str(tokenizer_folder), local_files_only=True)
    empty = token_table([[""]], tokenizer)[0, 0].to(device)
    alphas_cumprod = DDIMScheduler.from_config(configs["scheduler"]).alphas_cumprod.to(device)
    digest = fingerprint(vae.state_dict())[:16]
    scenes = EncodedScenes(pool, vae.to(device), digest, tokenizer, folder / "latents")
    enough = min(FIRST_SCENES, pool.config.count) if device.type == "cuda" else pool.config.count

    def take_in_scenes() -> None:
        scenes.take_in()
        while len(scenes) < enough:
            if should_stop():
                raise Interrupted("stopped before the first step; rendered scenes are saved, start again to resume")
            if scenes.take_in():
                on_scenes(len(scenes), enough)
            else:
                time.sleep(0.2)

    def loss_of(generator: torch.Generator | None) -> Loss:
        def random(draw: Callable[..., Tensor], *size: Any) -> Tensor:
            return draw(*size, generator=generator, device=device)

        rows = (random(torch.rand, config.batch_size) * scenes.ready).long()
        rows = torch.minimum(rows, scenes.ready - 1)  # float32 may round a product up to the number itself
        latents = scenes.latents[rows].float()
        ids = scenes.ids[rows, random(torch.randint, CAPTIONS, (len(rows),))]
        ids = torch.where(random(torch.rand, (len(rows), 1)) < CAPTION_DROPOUT, empty, ids).long()
        # Spread evenly over the schedule: less varies from step to step (Kingma et al. 2021, arXiv 2107.00630).
        spread = (random(torch.rand, 1) + torch.arange(len(rows), device=device) / len(rows)) % 1
        timesteps = (spread * len(alphas_cumprod)).long()
        noise = random(torch.randn, latents.shape)
        noisy, target = add_noise(latents, noise, alphas_cumprod[timesteps], "v_prediction")
        context = model["text_encoder"](ids).last_hidden_state
        with readout.reading(model["unet"]):
            error = denoising_loss(model["unet"](noisy, timesteps, context).sample, target).mean()
            content = content_loss(readout(), scenes.content[rows])
        return error + CONTENT_WEIGHT * content, {"error": error, "content": content}

    about = {"model": "diffusion", **sizes, "blocks": list(blocks), "autoencoder": digest}
    about |= {"content_weight": CONTENT_WEIGHT}
    about |= {"pool": describe_pool(pool.config), "start": weights_digest(start)}
    model = fit(
        model,
        lambda step: loss_of(step_generator(config.learn_seed, step, device)),
        config,
        folder,
        about,
        captured_loss=lambda: loss_of(None),
        before_step=take_in_scenes,
        on_step=on_step,
        should_stop=should_stop,
    )
    states = {"unet": model["unet"].state_dict(), "vae": vae.state_dict()}
    states["text_encoder"] = model["text_encoder"].state_dict()
    return write_base(folder / "base", configs, states)


def write_base(
    folder: Path, configs: dict[str, Any], states: dict[str, dict[str, Tensor]], *, half: bool = False
) -> Path:
    """Write a base in diffusers' folder layout, in fp16 if ``half``."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()

    plain = {
        part: {k: convert(v) for k, v in state.items() if "position_ids" not in k} for part, state in states.items()
    }
    plain["text_encoder"] = strip_text_model(plain["text_encoder"])
    return write_folder(folder, configs, plain)


def _start_from(model: nn.ModuleDict, base: Path) -> None:
    load_state(model["unet"], load_file(base / "unet" / "diffusion_pytorch_model.safetensors"), base)
    text = load_file(base / "text_encoder" / "model.safetensors")
    if any(k.startswith("text_model.") for k in model["text_encoder"].state_dict()):  # transformers before 5.6
        text = {f"text_model.{k}": v for k, v in text.items()}
    load_state(model["text_encoder"], text, base)
