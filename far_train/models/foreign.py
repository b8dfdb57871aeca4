"""Models that FaR doesn't train, told by name from their weights."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from torch import Tensor

# What UNets have beside the four channels of the noisy latents: another picture, and where to paint.
INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
# Widths of the text of families that have UNets, too.
WIDTHS = {1280: "the SDXL refiner"}
# Tensors by which files say that they are trained in another form of diffusion (Karras et al. 2022, arXiv 2206.00364).
EDM_MARKERS = {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL or another EDM model"}

# Transformers: patterns of the names at their top level, the more telling ones first.
TRANSFORMERS = {
    r"joint_blocks\.": "Stable Diffusion 3 or 3.5",
    r"(context_embedder|transformer_blocks\.\d+\.norm1_context)\..*": "Stable Diffusion 3 or a Flux model",
    r"double_stream_modulation_img\.": "FLUX.2",
    r"txt_in\.individual_token_refiner\.": "Hunyuan Video",
    r"(double_blocks|single_blocks|single_transformer_blocks)\.": "a Flux model",
    r"llm_adapter\.": "Anima",
    r"(noise_refiner|cap_embedder|all_final_layer)\.": "Z-Image or Lumina",
    r"double_layers\.": "AuraFlow",
    r"(txt_norm|time_text_embed)\.": "Qwen-Image",
    r"head\.modulation": "Wan",
    r"mlp_t5\.": "Hunyuan DiT",
    r"(t_block|adaln_single)\.": "PixArt or another diffusion transformer",
    r"(clf|clip_txt_mapper|clip_mapper)\.": "Stable Cascade",
    r"(transformer_blocks|blocks|layers|visual_transformer_blocks)\.\d+\.": "a diffusion transformer",
}
PLACES = re.compile(r"(model\.diffusion_model\.|diffusion_model\.|model\.|transformer\.|net\.)?(.*)", re.DOTALL)
# The first convolution, in LDM's and diffusers' names.
CONV_IN = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")


def transformer_name(names: Iterable[str]) -> str | None:
    """Which diffusion transformer weights of these names are of; None for other models, and for LoRA files."""
    tops = {PLACES.fullmatch(name)[2] for name in names}
    if any("lora" in top for top in tops):
        return None
    kinds = (kind for pattern, kind in TRANSFORMERS.items() if any(re.match(pattern, top) for top in tops))
    return next(kinds, None)


def unet_variant(channels: int | None, width: int | None, sized: bool) -> str | None:
    """What a UNet is that has inputs which FaR has nothing for; None for plain text-to-image models.

    ``channels``: of its input; ``width``: of its text; ``sized``: whether it takes a vector beside the text.
    """
    if channels not in (None, 4):
        return INPUTS.get(channels, f"a model with {channels} input channels")
    if width in WIDTHS:
        return WIDTHS[width]
    return "an unCLIP model, which varies pictures" if sized and width in (768, 1024) else None


def input_channels(state: Mapping[str, Tensor]) -> int | None:
    """Channels that a UNet takes in, if its first convolution is among the weights."""
    first = next((state[name] for name in CONV_IN if name in state), None)
    return None if first is None or first.ndim != 4 else first.shape[1]


def edm_model(names: Container[str]) -> str | None:
    """The name of a model whose file says that it is one of Karras et al.'s form."""
    return next((kind for marker, kind in EDM_MARKERS.items() if marker in names), None)
