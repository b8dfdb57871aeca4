"""Tables {diffusers module: LDM module} of each component, which follow from its config.json.

A name is translated by exchanging the longest leading part that stands in the table. So one table serves parameters
(`….to_k.weight`) and modules (`….to_k`), and its inverse serves the way back.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..utils.errors import BaseModelError

# diffusers module → LDM module
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
TEXT_PROJECTION = {"text_projection.weight": "text_projection"}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj": "attn.q",  # q, k, v are names of our own for the thirds of in_proj: see _split_in_proj
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# UNet block type → has cross-attention
UNET_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True, "UpBlock2D": False, "CrossAttnUpBlock2D": True}
UNET_MID_BLOCK = "UNetMidBlock2DCrossAttn"


def unet_table(config: Mapping) -> dict[str, str]:
    """{diffusers module: LDM module} of a UNet2DConditionModel, LDM names without `model.diffusion_model.`.

    `config` is the content of its config.json. Raises BaseModelError for blocks that LDM has no counterpart of.
    """
    down, up = _field(config, "unet", "down_block_types"), _field(config, "unet", "up_block_types")
    layers = config.get("layers_per_block", 2)
    layers = [layers] * len(down) if isinstance(layers, int) else list(layers)
    if not len(down) == len(up) == len(layers):
        raise BaseModelError(
            f"unet config: {len(down)} down_block_types, {len(up)} up_block_types and {len(layers)} layers_per_block; "
            "they must be equally many"
        )
    mid = config.get("mid_block_type", UNET_MID_BLOCK)
    if mid != UNET_MID_BLOCK:
        raise BaseModelError(f"unet config: mid_block_type {mid!r} is not supported; expected {UNET_MID_BLOCK}")

    table = dict(UNET_ENDS)
    if config.get("addition_embed_type") == "text_time":
        table |= UNET_ADDED
    index = 1  # input_blocks.0 is conv_in; every resnet and every downsampler is an input block of its own
    for block, kind in enumerate(down):
        for layer in range(layers[block]):
            _add(table, UNET_RESNET, f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{index}.0")
            if _has_attention(kind):
                table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if block < len(down) - 1:
            table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1

    _add(table, UNET_RESNET, "mid_block.resnets.0", "middle_block.0")
    table["mid_block.attentions.0"] = "middle_block.1"
    _add(table, UNET_RESNET, "mid_block.resnets.1", "middle_block.2")

    index = 0  # an upsampler has no output block of its own: it stands last in that of the resnet before it
    for block, kind in enumerate(up):
        for layer in range(layers[-1 - block] + 1):
            _add(table, UNET_RESNET, f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{index}.0")
            if _has_attention(kind):
                table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        if block < len(up) - 1:
            place = 2 if _has_attention(kind) else 1
            table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    return table


def vae_table(config: Mapping) -> dict[str, str]:
    """{diffusers module: LDM module} of an AutoencoderKL, LDM names without `first_stage_model.`."""
    levels = len(_field(config, "vae", "block_out_channels"))
    layers = config.get("layers_per_block", 1)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        _add(table, VAE_ENDS, half, half)
        _add(table, VAE_RESNET, f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        _add(table, VAE_ATTENTION, f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        _add(table, VAE_RESNET, f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
    for block in range(levels):
        level = levels - 1 - block  # LDM counts the decoder's levels by resolution, diffusers by order of execution
        for layer in range(layers):
            _add(
                table, VAE_RESNET, f"encoder.down_blocks.{block}.resnets.{layer}", f"encoder.down.{block}.block.{layer}"
            )
        for layer in range(layers + 1):
            _add(table, VAE_RESNET, f"decoder.up_blocks.{block}.resnets.{layer}", f"decoder.up.{level}.block.{layer}")
        if block < levels - 1:
            table[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"encoder.down.{block}.downsample.conv"
            table[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return table


def text_table(config: Mapping, projected: bool = False) -> dict[str, str]:
    """{CLIPTextModel module without `text_model.`: OpenCLIP module without `cond_stage_model.model.`}.

    OpenCLIP's `attn.in_proj_weight` appears as its thirds `attn.q.weight`, `attn.k.weight`, `attn.v.weight`.
    ``projected``: with the text projection of a CLIPTextModelWithProjection.
    """
    table = TEXT_ENDS | (TEXT_PROJECTION if projected else {})
    for layer in range(_field(config, "text_encoder", "num_hidden_layers")):
        _add(table, TEXT_LAYER, f"encoder.layers.{layer}", f"transformer.resblocks.{layer}")
    return table


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its longest leading part that is a key of `table` exchanged; None if no part of it is."""
    head, tail = name, ""
    while head:
        if head in table:
            return table[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table of the way back."""
    return {theirs: ours for ours, theirs in table.items()}


def _field(config: Mapping, part: str, field: str):
    if field not in config:
        raise BaseModelError(f"{part} config: {field} is missing")
    return config[field]


def _has_attention(kind: str) -> bool:
    if kind not in UNET_BLOCKS:
        raise BaseModelError(f"unet config: block type {kind!r} is not supported; expected {', '.join(UNET_BLOCKS)}")
    return UNET_BLOCKS[kind]


def _add(table: dict[str, str], leaves: Mapping[str, str], ours: str, theirs: str) -> None:
    for leaf, their_leaf in leaves.items():
        table[f"{ours}.{leaf}"] = f"{theirs}.{their_leaf}"
