"""A base of far_train as the host's own MODEL, CLIP and VAE, whatever its sizes.

The host's checkpoint loader knows a list of models by their exact shapes. A small base isn't on it, and to append to
that list would change the host for every other pack; so the objects that the loader would make are put together here,
from the host's own classes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules import model as vae_parts

from ..far_train.models.base import BaseModel
from ..far_train.models.keys import UNET_PREFIX, VAE_PREFIX, diffusers_to_ldm, strip_text_model
from ..far_train.utils.errors import BaseModelError
from .layout import CLIP_VOCABULARY, NATIVE_SIZE

PREDICTIONS = {
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "epsilon": comfy.model_base.ModelType.EPS,
}


def as_host_models(base: BaseModel) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE with the weights of ``base``, of Stable Diffusion 2.1's family, in fp32.

    Raises BaseModelError for shapes that the host hasn't.
    """
    parts = {part: module.state_dict() for part, module in base.parts.items()}
    (spec,) = base.family.text_encoders
    configs = {p: dict(base.parts[p].config) for p in ("unet", "vae")}
    configs[spec.part] = base.text_encoders[0].config.to_dict()
    state = diffusers_to_ldm(parts, configs, base.family, unused_text_layers=False)
    return (
        _model(base, configs, _below(UNET_PREFIX, state)),
        _clip(base, spec.comfy_name, configs[spec.part], strip_text_model(parts[spec.part])),
        _vae(configs["vae"], _below(VAE_PREFIX, state)),
    )


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _fill(module: torch.nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load weights; the host's layers are not initialised, so a missing one would hold whatever lay in memory."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith(("logit_scale", "text_projection.weight", "position_ids"))]
    if missing or unexpected:
        raise BaseModelError(f"{what}: this host has other layers than the base, such as {(missing + unexpected)[0]}")


def _model(base: BaseModel, configs: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    unet, vae = configs["unet"], configs["vae"]
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    heads = {c // n for c, n in zip(channels, unet["attention_head_dim"])}
    if len(heads) != 1 or any(c % channels[0] for c in channels):
        raise BaseModelError(
            f"the base's UNet has {channels} channels and heads of {sorted(heads)}; the host has no such"
        )
    attends = [kind.startswith("CrossAttn") for kind in unet["down_block_types"]]
    sizes = {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": channels[0],
        "num_res_blocks": [layers] * len(channels),
        "channel_mult": [c // channels[0] for c in channels],
        "transformer_depth": [int(a) for a in attends for _ in range(layers)],
        "transformer_depth_output": [int(a) for a in attends for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": unet["cross_attention_dim"],
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }
    config = comfy.supported_models.SD20(sizes)
    config.unet_config["num_head_channels"] = heads.pop()
    config.latent_format = comfy.latent_formats.SD15(scale_factor=vae["scaling_factor"])
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, model_type=PREDICTIONS[base.prediction_type], device=device)
    config.unet_config[NATIVE_SIZE] = base.native_size
    _fill(model.diffusion_model, state, "MODEL")
    return comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=device
    )


def _clip(base: BaseModel, key: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    tokenizer = base.tokenizer
    special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    shape = {k: config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    shape |= {"hidden_act": config["hidden_act"], "max_position_embeddings": config["max_position_embeddings"]}
    shape |= {"eos_token_id": special["end"], "projection_dim": config["hidden_size"], "vocab_size": CLIP_VOCABULARY}
    encoder = partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=shape, special_tokens=special)
    words = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=tokenizer.name_or_path,
        pad_with_end=False,
        pad_token=special["pad"],
        embedding_size=config["hidden_size"],
        embedding_key=key,
    )
    name = key.removeprefix("clip_")
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=name, tokenizer=words),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=encoder),
    )
    folders = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.CLIP(target, embedding_directory=folders, model_options={"dtype": torch.float32})
    table = state["embeddings.token_embedding.weight"]
    padding = table.new_zeros(CLIP_VOCABULARY - len(table), table.shape[1])
    state = state | {"embeddings.token_embedding.weight": torch.cat([table, padding])}
    inner = getattr(clip.cond_stage_model, key).transformer
    _fill(inner, {f"text_model.{k}": v for k, v in state.items() if not k.endswith("position_ids")}, "CLIP")
    return clip


def _vae(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    widths = config["block_out_channels"]
    if len(widths) != 4:
        raise BaseModelError(f"the base's VAE has {len(widths)} levels: the host's VAEs have 4")
    unit = math.gcd(*widths)
    shape = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": unit,
        "ch_mult": [width // unit for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {"ddconfig": shape, "embed_dim": config["latent_channels"]}
    empty = AutoencoderKL(**parameters).state_dict()
    vae = comfy.sd.VAE(sd=empty, config={"params": parameters}, dtype=torch.float32)
    if widths[0] != unit:
        # The host's encoder begins with ``ch`` channels, diffusers' with its first level's.
        encoder, device = vae.first_stage_model.encoder, vae.patcher.offload_device
        conv_in = vae_parts.ops.Conv2d(config["in_channels"], widths[0], kernel_size=3, padding=1)
        block = vae_parts.ResnetBlock(in_channels=widths[0], out_channels=widths[0], temb_channels=0)
        encoder.conv_in, encoder.down[0].block[0] = conv_in.to(device), block.to(device)
        vae.size = None  # counted anew when it is asked for
    _fill(vae.first_stage_model, state, "VAE")
    return vae
