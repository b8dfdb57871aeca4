"""Weight names: diffusers and Hugging Face folders ↔ single files of the original latent diffusion code ("LDM").

For the shapes of Stable Diffusion 1.x and 2.x. Each component has a table {diffusers module: LDM module} that follows
from its config.json. A name is translated by exchanging the longest leading part that stands in the table. So one table
serves parameters (`….to_k.weight`) and modules (`….to_k`), and its inverse serves the way back. Three things are more
than names, and stand in functions of their own: the VAE's attention (1×1 convolutions in LDM), OpenCLIP's fused q/k/v,
and OpenCLIP's last layer, which SD 2.x never runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from ..utils.errors import BaseModelError
from .families import Family, TextEncoderSpec

StateDict = dict[str, torch.Tensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
PART_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
# How the names of files begin that hold one part alone.
LONE_PARTS = {
    "diffusion_model.": "unet",
    "input_blocks.": "unet",
    "down_blocks.": "unet",
    "encoder.down": "vae",
    "decoder.up": "vae",
    "text_model.": "text_encoder",
    "transformer.resblocks.": "text_encoder",
}
# Present in real files and not needed: averaged copies, training losses, noise schedules, markers written by ComfyUI.
IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.")
IGNORED_NAMES = frozenset(
    f"{prefix}{name}"
    for prefix, names in {
        "": ("betas", "lvlb_weights", "logvar", "scale_factor", "v_pred", "ztsnr"),
        "alphas_": ("cumprod", "cumprod_prev"),
        "sqrt_": ("alphas_cumprod", "one_minus_alphas_cumprod", "recip_alphas_cumprod", "recipm1_alphas_cumprod"),
        "log_": ("one_minus_alphas_cumprod",),
        "posterior_": ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2"),
    }.items()
    for name in names
)
# What a text encoder in a file may hold and a CLIPTextModel doesn't.
IGNORED_TEXT_ENDS = ("text_projection", "text_projection.weight", "logit_scale", "attn_mask", "position_ids")

# diffusers module → LDM module
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
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
IN_PROJ = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)in_proj_(weight|bias)")
TEXT_LAYER_INDEX = re.compile(r"(?:transformer\.resblocks|encoder\.layers)\.(\d+)\.")
VAE_ATTENTION_WEIGHT = re.compile(r"(?:en|de)coder\.mid_block\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight")


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


def text_table(config: Mapping) -> dict[str, str]:
    """{CLIPTextModel module without `text_model.`: OpenCLIP module without `cond_stage_model.model.`}.

    OpenCLIP's `attn.in_proj_weight` appears as its thirds `attn.q.weight`, `attn.k.weight`, `attn.v.weight`.
    """
    table = dict(TEXT_ENDS)
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


def unet_to_ldm(name: str, config: Mapping) -> str:
    """A diffusers module or parameter name of the UNet in LDM's words, without `model.diffusion_model.`.

    `down_blocks.0.attentions.0.….attn2.to_k` → `input_blocks.1.1.….attn2.to_k`. Raises BaseModelError if unknown.
    """
    return _rename_one(name, unet_table(config))


def unet_from_ldm(name: str, config: Mapping) -> str:
    """The inverse of `unet_to_ldm`."""
    return _rename_one(name, inverse(unet_table(config)))


def strip_text_model(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """A CLIPTextModel's state dict without the `text_model.` that transformers wrote before 5.6."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state_dict.items()}


def part_prefixes(family: Family) -> dict[str, str]:
    """Where a single file keeps the parts of a model: {prefix of weight names: part}."""
    text = {prefix: spec.part for spec in family.text_encoders for prefix in spec.prefixes}
    return {UNET_PREFIX: "unet", VAE_PREFIX: "vae", **text}


def ldm_to_diffusers(
    state_dict: Mapping[str, torch.Tensor], configs: Mapping[str, Mapping], family: Family
) -> tuple[dict[str, StateDict], list[str]]:
    """Split a whole single file into diffusers state dicts.

    `configs` has the config.json of each of the family's parts. Returns ({part: state dict}, sorted names in the file
    that belong nowhere). Text names are without `text_model.`; both OpenCLIP's and Hugging Face's layout are read, and
    layers beyond `num_hidden_layers` are dropped. Known harmless extras (averaged
    weights, schedules, losses, text_projection) are ignored. That every weight of the model is there, in its shape,
    is for the caller to check. Raises BaseModelError if a weight is there twice or can't be split.
    """
    names = {"unet": inverse(unet_table(configs["unet"])), "vae": inverse(vae_table(configs["vae"]))}
    for spec in family.text_encoders:
        text = text_table(configs[spec.part])
        # The Hugging Face layout needs no renaming, only the same check that each name is known.
        names[spec.part] = inverse(text) | {ours: ours for ours in text}
    prefixes = part_prefixes(family)
    parts: dict[str, StateDict] = {part: {} for part in names}
    unplaced = []
    for full_name, tensor in state_dict.items():
        if full_name in IGNORED_NAMES or full_name.startswith(IGNORED_PREFIXES):
            continue
        prefix = next((prefix for prefix in prefixes if full_name.startswith(prefix)), None)
        if prefix is None:
            unplaced.append(full_name)
            continue
        part, name = prefixes[prefix], full_name[len(prefix) :]
        pieces = {name: tensor}
        if part not in ("unet", "vae"):
            name = name.removeprefix("text_model.")
            if _is_unused_text(name, configs[part]):
                continue
            pieces = _split_in_proj(name, tensor)
        for piece, value in pieces.items():
            target = rename(piece, names[part])
            if target is None:
                unplaced.append(full_name)
            elif target in parts[part]:
                raise BaseModelError(f"{full_name}: the file has the {part} weight {target} twice")
            else:
                parts[part][target] = _squeeze_attention(target, value) if part == "vae" else value
    return parts, sorted(unplaced)


def check_whole(names: Iterable[str], where: str, family: Family) -> None:
    """Refuse a single file that doesn't hold all parts of a model. Raises BaseModelError naming what lacks."""
    names = list(names)
    held = {part for prefix, part in part_prefixes(family).items() if any(n.startswith(prefix) for n in names)}
    if held == set(family.parts):
        return
    lone = next((p for begin, p in LONE_PARTS.items() if any(n.startswith(begin) for n in names)), None)
    held = held or ({lone} if lone else held)
    lacking = " and no ".join(PART_NAMES[part] for part in family.parts if part not in held)
    alone = f"is a {PART_NAMES[next(iter(held))]} alone" if len(held) == 1 else "is no whole model"
    raise BaseModelError(f"base: {where} {alone}: it holds no {lacking}; give the whole checkpoint")


def diffusers_to_ldm(
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    configs: Mapping[str, Mapping],
    family: Family,
    unused_text_layers: bool = True,
) -> StateDict:
    """One single-file state dict of the diffusers state dict of each part.

    `configs` as in `ldm_to_diffusers`; text names with or without `text_model.`. Where diffusers leaves out layers of
    a text encoder whose output is never used, loaders of single files expect them all the same: `unused_text_layers`
    adds copies of the last layer there is, to stand in their place. Unchanged tensors are shared with the inputs.
    Raises BaseModelError if a name is unknown or a q/k/v is missing.
    """
    vae = {name: _unsqueeze_attention(name, tensor) for name, tensor in parts["vae"].items()}
    whole = _prefixed(UNET_PREFIX, _rename_all(parts["unet"], unet_table(configs["unet"]), "unet"))
    whole |= _prefixed(VAE_PREFIX, _rename_all(vae, vae_table(configs["vae"]), "vae"))
    for spec in family.text_encoders:
        text = _text_to_ldm(spec, parts[spec.part], configs[spec.part], unused_text_layers)
        whole |= _prefixed(spec.prefixes[0], text)
    return whole


def _text_to_ldm(
    spec: TextEncoderSpec, state_dict: Mapping[str, torch.Tensor], config: Mapping, unused_layers: bool
) -> StateDict:
    plain = {n: t for n, t in strip_text_model(state_dict).items() if not n.endswith(IGNORED_TEXT_ENDS)}
    renamed = _rename_all(plain, text_table(config), spec.part)
    if spec.checkpoint_layout == "hf":
        return _prefixed("text_model.", plain)
    text = _fuse_in_proj(renamed, spec.part)
    count = config["num_hidden_layers"]
    last = f"transformer.resblocks.{count - 1}."
    for layer in range(count, count + spec.unused_layers if unused_layers else count):
        extra = f"transformer.resblocks.{layer}."
        # Cloned, because safetensors refuses two names for one storage.
        text |= {extra + n.removeprefix(last): t.clone() for n, t in text.items() if n.startswith(last)}
    return text


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


def _rename_one(name: str, table: Mapping[str, str]) -> str:
    renamed = rename(name, table)
    if renamed is None:
        raise BaseModelError(f"{name}: the UNet that the config describes has no such weight")
    return renamed


def _rename_all(state_dict: Mapping[str, torch.Tensor], table: Mapping[str, str], part: str) -> StateDict:
    renamed = {name: rename(name, table) for name in state_dict}
    if unknown := [name for name, target in renamed.items() if target is None]:
        raise BaseModelError(f"{part}: {len(unknown)} weights don't belong to the config: {_some(unknown)}")
    return {renamed[name]: tensor for name, tensor in state_dict.items()}


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _prefixed(prefix: str, state_dict: StateDict) -> StateDict:
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def _is_unused_text(name: str, config: Mapping) -> bool:
    if name.endswith(IGNORED_TEXT_ENDS):
        return True
    layer = TEXT_LAYER_INDEX.match(name)
    return layer is not None and int(layer[1]) >= config["num_hidden_layers"]


def _split_in_proj(name: str, tensor: torch.Tensor) -> StateDict:
    """OpenCLIP's `attn.in_proj_*` [3C, …] → `attn.q.*`, `attn.k.*`, `attn.v.*` [C, …]; any other weight as it is."""
    match = IN_PROJ.fullmatch(name)
    if match is None:
        return {name: tensor}
    if tensor.shape[0] % 3:
        raise BaseModelError(f"{name}: shape {tuple(tensor.shape)} can't be split into q, k and v")
    # Cloned, so that nobody has a third of another weight's storage.
    return {f"{match[1]}{part}.{match[2]}": third.clone() for part, third in zip("qkv", tensor.chunk(3), strict=True)}


def _fuse_in_proj(state_dict: StateDict, part: str) -> StateDict:
    """The inverse of `_split_in_proj` for a whole state dict."""
    fused: StateDict = {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name)
        if match is None:
            fused[name] = tensor
            continue
        thirds = [f"{match[1]}{third}.{match[3]}" for third in "qkv"]
        if missing := [third for third in thirds if third not in state_dict]:
            raise BaseModelError(f"{part}: {name} is there, but not {_some(missing)}")
        if match[2] == "q":
            fused[f"{match[1]}in_proj_{match[3]}"] = torch.cat([state_dict[third] for third in thirds])
    return fused


def _squeeze_attention(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """LDM's 1×1 convolution [C, C, 1, 1] in the VAE's attention → the linear layer [C, C] that diffusers has there."""
    return tensor[:, :, 0, 0] if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.ndim == 4 else tensor


def _unsqueeze_attention(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, None, None] if VAE_ATTENTION_WEIGHT.fullmatch(name) and tensor.ndim == 2 else tensor
