"""The shape of the graph's MODEL, CLIP and VAE as component configs in diffusers' words.

A graph has no config files: the host found the shapes out from the weights, and so does this file, from what
:mod:`.host` read off. Nothing here touches the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..far_train.models.families import FAMILIES, SUPPORTED, Family, TextEncoderSpec
from ..far_train.models.foreign import unet_variant
from ..far_train.models.loading import packaged_configs
from ..far_train.utils.errors import BaseModelError

NATIVE_SIZE = "far_native_size"  # side in pixels: an entry of unet_config in the MODELs that the pack makes itself
CLIP_VOCABULARY = 49408  # entries of CLIP's vocabulary, and rows of the host's token table whatever the vocabulary
_VAE_BLOCK = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight")
_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TextEncoder:
    """What the host holds of a text encoder: the weights, named without ``text_model.``, and what they don't show.

    ``layers``: the ``num_hidden_layers`` of its config.
    """

    state: Mapping[str, Tensor]
    heads: int
    activation: str
    layers: int


def component_configs(
    family: Family,
    unet: Mapping[str, Any],
    text_encoders: Sequence[TextEncoder],
    vae: Mapping[str, Tensor],
    *,
    prediction_type: str,
    scaling_factor: float,
) -> dict[str, Any]:
    """Configs for :func:`far_train.models.loading.load_base`: the family's, with this base's sizes.

    ``unet`` is the host's own unet_config; ``vae`` is a state dict. Raises BaseModelError.
    """
    configs = packaged_configs(family, prediction_type)
    configs["unet"] |= _unet_sizes(unet)
    configs["vae"] |= _vae_sizes(vae) | {"scaling_factor": scaling_factor}
    for spec, encoder in zip(family.text_encoders, text_encoders, strict=True):
        table = encoder.state["embeddings.token_embedding.weight"]
        configs[spec.part] |= {
            "hidden_size": table.shape[1],
            "vocab_size": table.shape[0],
            "intermediate_size": encoder.state["encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": encoder.state["embeddings.position_embedding.weight"].shape[0],
            "num_attention_heads": encoder.heads,
            "num_hidden_layers": encoder.layers,
            "hidden_act": encoder.activation,
        }
        if spec.pooled:
            configs[spec.part]["projection_dim"] = encoder.state["text_projection.weight"].shape[0]
    return configs


def find_family(unet: Mapping[str, Any], kind: str, text_encoders: Sequence[str]) -> Family:
    """The family of a MODEL, by the host's unet_config, and of a CLIP, by the names of its text encoders.

    Raises BaseModelError for other families and variants; ``kind`` is the host's name for the MODEL's.
    """
    width = unet.get("context_dim")
    if width is None or not unet.get("transformer_depth") or "channel_mult" not in unet:
        raise BaseModelError(f"MODEL is {kind}; FaR trains {SUPPORTED}, load such a checkpoint")
    sized = unet.get("adm_in_channels") is not None
    variant = unet_variant(unet.get("in_channels"), width, sized)
    if variant is not None:
        raise BaseModelError(f"MODEL is {variant} ({kind}); FaR trains plain text-to-image models of {SUPPORTED}")
    family = clip_family(text_encoders, "the same checkpoint as MODEL")
    # Widths that aren't in the table are those of small bases.
    own = next((f for f in FAMILIES.values() if f.context_width == width), family)
    if own is not family:
        raise BaseModelError(f"MODEL is {own.title}, CLIP is {family.title}'s; connect both of one checkpoint")
    if sized != family.size_conditions:
        takes = "takes" if sized else "takes no"
        raise BaseModelError(
            f"MODEL ({kind}) {takes} vectors beside the text, unlike {family.title}, whose CLIP is connected; connect "
            "both of one plain text-to-image checkpoint"
        )
    return family


def clip_family(text_encoders: Sequence[str], owner: str) -> Family:
    """The family whose text encoders these are, by name. Raises BaseModelError; ``owner``: whose CLIP is meant."""
    for family in FAMILIES.values():
        if set(family.comfy_names) == set(text_encoders):
            return family
    expected = " or ".join(" and ".join(family.comfy_names) for family in FAMILIES.values())
    raise BaseModelError(
        f"CLIP is not {SUPPORTED}'s (it has {' and '.join(text_encoders) or 'no known text encoder'}, not {expected}); "
        f"connect the CLIP of {owner}"
    )


def text_layer_count(spec: TextEncoderSpec, text: Mapping[str, Tensor], layer_index: int | None) -> int:
    """The ``num_hidden_layers`` with which an encoder conditions the UNet on the layer that the host conditions it on.

    ``layer_index`` as the host has it: −2 is the last but one, None the last. Raises BaseModelError for layers that the
    family can't be trained with.
    """
    layers = 1 + max(int(m[1]) for m in map(_TEXT_LAYER.match, text) if m)
    run = layers
    if layer_index is not None and abs(layer_index) <= layers:
        run = (layers + layer_index if layer_index < 0 else layer_index) + 1
    count = run - 1 - spec.layer  # as many as leave the one that was run last in the family's place
    # A pooled output comes from the encoder's very last layer, so none can be left out.
    if count > layers or (spec.pooled and count != layers):
        raise BaseModelError(
            f"CLIP stops at layer {run} of {layers} of {spec.comfy_name}; FaR trains this family with the layer "
            f"{spec.layer} alone: remove CLIP Set Last Layer, or set it to {spec.layer}"
        )
    return count


def _unet_sizes(ldm: Mapping[str, Any]) -> dict[str, Any]:
    channels = [ldm["model_channels"] * m for m in ldm["channel_mult"]]
    blocks = ldm["num_res_blocks"]
    blocks = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
    depths = _transformer_depths(ldm, blocks)
    head = ldm.get("num_head_channels", -1)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    native = {"sample_size": ldm[NATIVE_SIZE] // 8} if NATIVE_SIZE in ldm else {}
    if ldm.get("adm_in_channels") is not None:
        native["projection_class_embeddings_input_dim"] = ldm["adm_in_channels"]
    return native | {
        "block_out_channels": channels,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths] if max(depths) > 1 else 1,
        # diffusers' name for the number of heads, which it has kept from its first release
        "attention_head_dim": [c // head for c in channels] if head > 0 else ldm["num_heads"],
        "cross_attention_dim": ldm["context_dim"],
        "in_channels": ldm["in_channels"],
        "out_channels": ldm["out_channels"],
        "use_linear_projection": bool(ldm.get("use_linear_in_transformer")),
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }


def native_size(family: Family, ldm: Mapping[str, Any], prediction_type: str) -> int:
    """The side in pixels for which a MODEL was made, from the host's unet_config."""
    return ldm.get(NATIVE_SIZE) or 8 * packaged_configs(family, prediction_type)["unet"]["sample_size"]


def unet_config(family: Family, ldm: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' config of a MODEL's UNet, from the host's unet_config. Raises BaseModelError."""
    return packaged_configs(family, family.default_prediction)["unet"] | _unet_sizes(ldm)


def _transformer_depths(ldm: Mapping[str, Any], blocks: Sequence[int]) -> list[int]:
    """Blocks of each transformer, by level; 0 where a level has none. ``blocks``: residual blocks by level."""
    depth = list(ldm["transformer_depth"])
    inputs = [depth[sum(blocks[:level]) :][:count] for level, count in enumerate(blocks)]
    depths = [level[0] for level in inputs]
    outputs = [d for d, count in zip(depths, blocks) for _ in range(count + 1)]
    if (
        any(set(level) != {d} for level, d in zip(inputs, depths))
        or list(ldm.get("transformer_depth_output", outputs)) != outputs
        or ldm.get("transformer_depth_middle", max(depths[-1], 1)) != max(depths[-1], 1)
    ):
        raise BaseModelError(
            f"MODEL's transformers differ within a level, as in SSD-1B and other pruned models; FaR trains {SUPPORTED}"
        )
    return depths


def _vae_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = {(int(m[1]), int(m[2])): state[k].shape[0] for k in state if (m := _VAE_BLOCK.fullmatch(k))}
    if not blocks or "quant_conv.weight" not in state:
        raise BaseModelError("VAE is not Stable Diffusion's; connect the VAE of the same checkpoint as MODEL")
    levels = 1 + max(level for level, _ in blocks)
    return {
        "block_out_channels": [blocks[level, 0] for level in range(levels)],
        "layers_per_block": 1 + max(block for _, block in blocks),
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
