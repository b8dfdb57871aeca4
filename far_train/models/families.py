"""What differs between model families, in one table: no other module asks which family a base is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..utils.errors import BaseModelError
from .foreign import edm_model, input_channels, transformer_name, unet_variant


@dataclass(frozen=True)
class TextEncoderSpec:
    """One of a family's text encoders, a CLIP text model."""

    part: str  # folder in diffusers' layout, and name of the component
    comfy_name: str  # in ComfyUI: attribute of a CLIP, and key in an embedding file
    layer: int  # whose output conditions the UNet, of those in its config: -1 the last, -2 the one before
    unused_layers: int  # that single files have beyond those in its config
    final_norm: bool  # whether that state goes through the final layer norm
    pooled: bool  # whether the UNet also gets the projected state of the EOS token
    pad_token: str
    checkpoint_layout: Literal["openclip", "hf"]  # of the weight names in single files
    prefixes: tuple[str, ...]  # of the encoder's weights in single files; the first is the one to write


@dataclass(frozen=True)
class Family:
    """What FaR needs to know of a model family beyond its component configs."""

    key: str
    title: str
    configs: str  # folder below far_train/configs
    context_width: int  # of the text that the UNet attends to
    linear_projections: bool  # in the UNet's transformers, where other families have 1×1 convolutions
    text_encoders: tuple[TextEncoderSpec, ...]
    size_conditions: bool  # whether the UNet is told the picture's size and crop
    default_prediction: str  # where neither a marker nor the weights tell
    measure_prediction: Callable[[Mapping[str, Tensor]], str | None]  # from the UNet's weights, in diffusers' names
    pipeline: str  # class of diffusers
    lora_names: Literal["diffusers", "ldm"]  # of layers, in kohya's LoRA files
    kv_parameters: int  # of all cross-attention K and V
    # Modules among whose cross-attention layers the supervised ones are chosen, by diffusers' names; empty: all.
    supervised_modules: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the components that hold weights, as diffusers' folders have them."""
        return ("unet", "vae", *(spec.part for spec in self.text_encoders))

    @property
    def comfy_names(self) -> tuple[str, ...]:
        """Names of the text encoders in ComfyUI."""
        return tuple(spec.comfy_name for spec in self.text_encoders)


# The bias of the last block's first norm spreads further in v-prediction models (ComfyUI tells them apart so).
V_STATISTIC = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_THRESHOLD = 0.09


def prediction_by_norm(unet: Mapping[str, Tensor]) -> str | None:
    """The prediction type of a full-size SD 2.x UNet; None for other sizes, which the statistic doesn't tell."""
    bias = unet.get(V_STATISTIC)
    if bias is None or bias.numel() != 320:
        return None
    return "v_prediction" if float(bias.float().std(unbiased=False)) > V_THRESHOLD else "epsilon"


def _not_measured(unet: Mapping[str, Tensor]) -> None:
    """For families whose weights don't tell their prediction type: only a marker in the file does."""


SD15 = Family(
    key="sd15",
    title="Stable Diffusion 1.5",
    configs="sd15",
    context_width=768,
    linear_projections=False,
    text_encoders=(
        TextEncoderSpec(
            part="text_encoder",
            comfy_name="clip_l",
            layer=-1,
            unused_layers=0,
            final_norm=True,
            pooled=False,
            pad_token="<|endoftext|>",
            checkpoint_layout="hf",
            prefixes=("cond_stage_model.transformer.",),
        ),
    ),
    size_conditions=False,
    default_prediction="epsilon",
    measure_prediction=_not_measured,
    pipeline="StableDiffusionPipeline",
    lora_names="diffusers",
    kv_parameters=19_169_280,
)

SD21 = Family(
    key="sd21",
    title="Stable Diffusion 2.1",
    configs="sd21",
    context_width=1024,
    linear_projections=True,
    text_encoders=(
        TextEncoderSpec(
            part="text_encoder",
            comfy_name="clip_h",
            layer=-1,
            unused_layers=1,  # SD 2.x conditions on the layer before OpenCLIP's last
            final_norm=True,
            pooled=False,
            pad_token="!",
            checkpoint_layout="openclip",
            # Beside OpenCLIP's names in the original's place: in sgm's, and converted to Hugging Face's.
            prefixes=(
                "cond_stage_model.model.",
                "conditioner.embedders.0.model.",
                "cond_stage_model.transformer.",
            ),
        ),
    ),
    size_conditions=False,
    default_prediction="v_prediction",
    measure_prediction=prediction_by_norm,
    pipeline="StableDiffusionPipeline",
    lora_names="diffusers",
    kv_parameters=25_559_040,
)

SDXL = Family(
    key="sdxl",
    title="Stable Diffusion XL",
    configs="sdxl",
    context_width=2048,
    linear_projections=True,
    text_encoders=(
        TextEncoderSpec(
            part="text_encoder",
            comfy_name="clip_l",
            layer=-2,
            unused_layers=0,
            final_norm=False,
            pooled=False,
            pad_token="<|endoftext|>",
            checkpoint_layout="hf",
            prefixes=("conditioner.embedders.0.transformer.",),
        ),
        TextEncoderSpec(
            part="text_encoder_2",
            comfy_name="clip_g",
            layer=-2,
            unused_layers=0,  # the last one conditions nothing, but the pooled output comes from it
            final_norm=False,
            pooled=True,
            pad_token="!",
            checkpoint_layout="openclip",
            prefixes=("conditioner.embedders.1.model.",),
        ),
    ),
    size_conditions=True,
    default_prediction="epsilon",
    measure_prediction=_not_measured,
    pipeline="StableDiffusionXLPipeline",
    lora_names="ldm",
    kv_parameters=340_787_200,
    # 60 of its 70 layers have maps of one size. These eight, in the middle of the first two transformers behind the
    # bottleneck, cost an eighth of their memory.
    supervised_modules=tuple(
        f"up_blocks.0.attentions.{attention}.transformer_blocks.{block}"
        for attention in (0, 1)
        for block in range(2, 6)
    ),
)

FAMILIES = {family.key: family for family in (SD15, SD21, SDXL)}
SUPPORTED = " or ".join(", ".join(family.title for family in FAMILIES.values()).rsplit(", ", 1))

SIZE_CONDITIONS = ("add_embedding.linear_1.weight", "label_emb.0.0.weight")  # diffusers' name, LDM's


def detect(unet: Mapping[str, Tensor], where: str, context_width: int | None = None) -> Family:
    """The family of a UNet, by its weights in diffusers' or LDM's names.

    ``context_width``: what the base's own configs say, for bases of other sizes than their family's. Raises
    BaseModelError, naming ``where`` the weights come from and what they are, for other models and for files without a
    UNet.
    """
    width = next((v.shape[-1] for k, v in unet.items() if k.endswith("attn2.to_k.weight") and v.ndim), None)
    sized = any(k.endswith(SIZE_CONDITIONS) for k in unet)
    channels = input_channels(unet)
    other = edm_model(unet) or unet_variant(channels, width, sized)
    if channels is None:
        other = transformer_name(unet) or other
    if other is not None:
        raise BaseModelError(f"base: {where} is {other}; FaR needs a plain text-to-image model of {SUPPORTED}")
    if width is None:
        raise BaseModelError(
            f"base: {where} holds no Stable Diffusion UNet; give a whole {SUPPORTED} checkpoint, not a LoRA"
        )
    linear = next((v.ndim == 2 for k, v in unet.items() if k.endswith(".proj_in.weight")), None)
    for family in FAMILIES.values():
        same_kind = (family.size_conditions, family.linear_projections) == (sized, linear)
        if same_kind and width == (context_width or family.context_width):
            return family
    expected = context_width or ", ".join(str(family.context_width) for family in FAMILIES.values())
    raise BaseModelError(
        f"base: {where} is a model of text width {width}{' with size conditions' if sized else ''}; "
        f"FaR needs {SUPPORTED} (text width {expected})"
    )
