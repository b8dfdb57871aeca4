"""Test-only node pack: a tiny but genuine SD 2.x MODEL, CLIP and VAE, so that host tests need no downloads.

Every class is the host's own; only the sizes differ from Stable Diffusion 2.1, and the weights are random (pictures are
noise, the arithmetic is real). Not part of what users install.
"""

from __future__ import annotations

import math

import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from .probes import NODES as PROBES
from .registry import NODES as REGISTRY

TEXT_WIDTH = 64
PREDICTIONS = {
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "epsilon": comfy.model_base.ModelType.EPS,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "projection_dim": TEXT_WIDTH,
    "vocab_size": 49408,
}
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


def unet_config(res_blocks: int) -> dict:
    """The UNet's shape: four levels of 32, 64, 128, 128 channels, attention on the first three.

    These are the keys and values that the host's checkpoint detection finds in the resulting state dict. With two
    residual blocks per level, as in SD 2.1, its names are SD 2.1's exactly (16 cross-attentions); one (10) is faster.
    """
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [res_blocks] * 4,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1] * (3 * res_blocks) + [0] * res_blocks,
        "transformer_depth_output": [1] * (3 * (res_blocks + 1)) + [0] * (res_blocks + 1),
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": TEXT_WIDTH,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


class TinySD20(comfy.supported_models.SD20):
    """SD 2.x with narrow heads; everything else (latent format, key names for saving, fp32 attention) is inherited."""

    unet_extra_config = comfy.supported_models.SD20.unet_extra_config | {"num_head_channels": 16}


class TinyTextModel(comfy.sd1_clip.SDClipModel):
    """SD 2.x's text encoder: the penultimate layer, padded with token 0."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=TEXT_CONFIG,
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            model_options=model_options or {},
        )


class TinyTokenizer(comfy.sd1_clip.SDTokenizer):
    """SD 2.x's tokenizer, which tells the embedding loader the tiny encoder's width."""

    def __init__(self, tokenizer_path=None, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            tokenizer_path,
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=TEXT_WIDTH,
            embedding_key="clip_h",
            tokenizer_data=tokenizer_data or {},
        )


class TinyClipModel(comfy.sd1_clip.SD1ClipModel):
    """The wrapper that names the encoder `clip_h`, as SD 2.x does."""

    def __init__(self, device="cpu", dtype=None, model_options=None, **kwargs):
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            clip_name="h",
            clip_model=TinyTextModel,
            **kwargs,
        )


class TinyClipTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The wrapper that names the tokenizer `clip_h`."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            clip_name="h",
            tokenizer=TinyTokenizer,
        )


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


def tiny_model(seed: int, prediction: str, res_blocks: int, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """A MODEL. prediction: a key of PREDICTIONS."""
    config = TinySD20(unet_config(res_blocks))
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, model_type=PREDICTIONS[prediction], device=offload)
    randomize(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def tiny_clip(seed: int, dtype: torch.dtype) -> comfy.sd.CLIP:
    """A CLIP with the host's own SD 2.x vocabulary."""
    target = comfy.supported_models_base.ClipTarget(TinyClipTokenizer, TinyClipModel)
    clip = comfy.sd.CLIP(
        target, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options={"dtype": dtype}
    )
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
            display_name="Tiny SD 2.x Checkpoint (test)",
            category="FaR/test",
            inputs=[
                io.Int.Input("weights_seed", default=0, min=0, max=2**31 - 1),
                io.Combo.Input("prediction", options=list(PREDICTIONS)),
                io.Int.Input("res_blocks", default=1, min=1, max=2, optional=True),
                io.Combo.Input("dtype", options=list(DTYPES), optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, weights_seed: int, prediction: str, res_blocks: int = 1, dtype: str = "fp32") -> io.NodeOutput:
        return io.NodeOutput(
            tiny_model(weights_seed, prediction, res_blocks, DTYPES[dtype]),
            tiny_clip(weights_seed, DTYPES[dtype]),
            tiny_vae(weights_seed),
        )


class TestExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyCheckpoint, *PROBES, *REGISTRY]


async def comfy_entrypoint() -> ComfyExtension:
    """The host's door into the pack."""
    return TestExtension()
