"""Tiny but genuine MODEL, CLIP and VAE of each model family, so that host tests need no downloads.

Every class is the host's own; only the sizes are small, and the weights are random (pictures are noise, the arithmetic
is real).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import folder_paths
import torch
from comfy_api.latest import io

PREDICTIONS = {
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "epsilon": comfy.model_base.ModelType.EPS,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

# Four levels, since the VAE class assumes a factor of 8; GroupNorm(32) wants multiples of 32 channels.
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class TinySD15(comfy.supported_models.SD15):
    """SD 1.x, whose number of heads suits narrow layers, too."""


class TinySD20(comfy.supported_models.SD20):
    """SD 2.x with narrow heads; everything else (latent format, key names for saving, fp32 attention) is inherited."""

    unet_extra_config = comfy.supported_models.SD20.unet_extra_config | {"num_head_channels": 16}


class TinySDXL(comfy.supported_models.SDXL):
    """SDXL with narrow heads."""

    unet_extra_config = comfy.supported_models.SDXL.unet_extra_config | {"num_head_channels": 16}


@dataclass(frozen=True)
class TinyFamily:
    """A family's host classes, and what its shape differs in from the others'."""

    config: type
    model: type
    tokenizer: Callable[..., Any]
    text_model: Callable[..., Any]
    widths: dict[str, int]  # of the text encoders
    layers: int  # of each text encoder
    levels: tuple[int, ...]  # channels of the UNet's, in units of 32
    depths: tuple[int, ...]  # blocks of their transformers
    linear: bool = True  # the transformers' projections, convolutions otherwise
    sizes: bool = False  # whether the UNet gets the pooled text and the picture's size


FAMILIES = {
    "sd15": TinyFamily(
        TinySD15,
        comfy.model_base.BaseModel,
        comfy.sd1_clip.SD1Tokenizer,
        comfy.sd1_clip.SD1ClipModel,
        widths={"clip_l": 64},
        layers=2,
        levels=(1, 2, 4, 4),
        depths=(1, 1, 1, 0),
        linear=False,
    ),
    "sd21": TinyFamily(
        TinySD20,
        comfy.model_base.BaseModel,
        comfy.text_encoders.sd2_clip.SD2Tokenizer,
        comfy.text_encoders.sd2_clip.SD2ClipModel,
        widths={"clip_h": 64},
        layers=3,  # the last of them is never used
        levels=(1, 2, 4, 4),
        depths=(1, 1, 1, 0),
    ),
    "sdxl": TinyFamily(
        TinySDXL,
        comfy.model_base.SDXL,
        comfy.sdxl_clip.SDXLTokenizer,
        comfy.sdxl_clip.SDXLClipModel,
        widths={"clip_l": 64, "clip_g": 64},  # equal, so that exchanging the two is no error of shapes
        layers=3,
        levels=(1, 2, 4),
        depths=(0, 1, 3),
        sizes=True,
    ),
}


def unet_config(res_blocks: int, family: str = "sd21") -> dict:
    """The UNet's shape, with attention on all levels but one.

    These are the keys and values that the host's checkpoint detection finds in the resulting state dict. With two
    residual blocks per level its names are the full-size model's (SD 1.5, 2.1: 16 cross-attentions); one is faster.
    """
    about = FAMILIES[family]
    config = {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [res_blocks] * len(about.levels),
        "channel_mult": list(about.levels),
        "transformer_depth": [depth for depth in about.depths for _ in range(res_blocks)],
        "transformer_depth_output": [depth for depth in about.depths for _ in range(res_blocks + 1)],
        "transformer_depth_middle": max(about.depths[-1], 1),
        "use_linear_in_transformer": about.linear,
        "context_dim": sum(about.widths.values()),
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }
    if about.sizes:
        config |= {"num_classes": "sequential", "adm_in_channels": about.widths["clip_g"] + 6 * 256}
    return config


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter, in order of name, from one seed: N(0, 1/fan_in) weights, unit norms, small biases.

    The host's layers skip PyTorch's initialisation, so they hold whatever lay in memory; and a real model's zero-
    initialised outputs would hide errors, so nothing is left at zero here.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 0:  # CLIP's logit scale.
            continue
        if "embedding" in name:
            value = noise * 0.5
        elif parameter.ndim > 1:
            value = noise / math.sqrt(parameter[0].numel())
        elif name.endswith("weight"):  # One-dimensional weights belong to norms.
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)


def tiny_model(
    seed: int, prediction: str, res_blocks: int, dtype: torch.dtype, family: str
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL. prediction: a key of PREDICTIONS."""
    config = FAMILIES[family].config(unet_config(res_blocks, family))
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    offload = comfy.model_management.unet_offload_device()
    model = FAMILIES[family].model(config, model_type=PREDICTIONS[prediction], device=offload)
    randomize(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def tiny_clip(seed: int, dtype: torch.dtype, family: str) -> comfy.sd.CLIP:
    """A CLIP with the family's own vocabulary, padding and layers."""
    about = FAMILIES[family]
    options: dict[str, Any] = {"dtype": dtype}
    for name, width in about.widths.items():
        options[f"{name}_model_config"] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": about.layers,
            "num_attention_heads": width // 16,
            "projection_dim": width,
        }

    def tokenizer(**inputs: Any) -> Any:
        made = about.tokenizer(**inputs)
        for name, width in about.widths.items():
            getattr(made, name).embedding_size = width  # which it tells the loader of embeddings
        return made

    target = comfy.supported_models_base.ClipTarget(tokenizer, about.text_model)
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options=options)
    randomize(clip.cond_stage_model, seed)
    return clip


def tiny_vae(seed: int) -> comfy.sd.VAE:
    """A VAE with four latent channels and a factor of 8."""
    parameters = {"ddconfig": VAE_CONFIG, "embed_dim": 4}
    source = comfy.ldm.models.autoencoder.AutoencoderKL(**parameters)
    randomize(source, seed)
    return comfy.sd.VAE(sd=source.state_dict(), config={"params": parameters}, dtype=torch.float32)


class TinyCheckpoint(io.ComfyNode):
    """Stands in for CheckpointLoaderSimple, whose detection cannot match such small shapes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_TinyCheckpoint",
            display_name="Tiny Checkpoint (test)",
            category="FaR/test",
            inputs=[
                io.Int.Input("weights_seed", default=0, min=0, max=2**31 - 1),
                io.Combo.Input("prediction", options=list(PREDICTIONS)),
                io.Int.Input("res_blocks", default=1, min=1, max=2, optional=True),
                io.Combo.Input("dtype", options=list(DTYPES), optional=True),
                io.Combo.Input("family", options=list(FAMILIES), optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(
        cls, weights_seed: int, prediction: str, res_blocks: int = 1, dtype: str = "fp32", family: str = "sd21"
    ) -> io.NodeOutput:
        return io.NodeOutput(
            tiny_model(weights_seed, prediction, res_blocks, DTYPES[dtype], family),
            tiny_clip(weights_seed, DTYPES[dtype], family),
            tiny_vae(weights_seed),
        )
