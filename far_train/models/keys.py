"""Weight names: diffusers and Hugging Face folders ↔ single files of the original latent diffusion code ("LDM").

For the shapes of Stable Diffusion 1.x, 2.x and XL, by the tables of :mod:`.key_tables`. Four things are more than names
and stand in functions of their own: the VAE's attention (1×1 convolutions in LDM), OpenCLIP's fused q/k/v, its
transposed text projection, and its last layer, which SD 2.x never runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from ..utils.errors import BaseModelError
from .families import Family, TextEncoderSpec
from .key_tables import inverse, rename, text_table, unet_table, vae_table

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
        "": ("betas", "lvlb_weights", "logvar", "scale_factor", "v_pred", "ztsnr", "denoiser.sigmas"),
        "alphas_": ("cumprod", "cumprod_prev"),
        "sqrt_": ("alphas_cumprod", "one_minus_alphas_cumprod", "recip_alphas_cumprod", "recipm1_alphas_cumprod"),
        "log_": ("one_minus_alphas_cumprod",),
        "posterior_": ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2"),
    }.items()
    for name in names
)
# What a text encoder in a file may hold and a CLIPTextModel doesn't.
PROJECTION = ("text_projection", "text_projection.weight")  # OpenCLIP's name, Hugging Face's
IGNORED_TEXT_ENDS = (*PROJECTION, "logit_scale", "attn_mask", "position_ids")  # the projection where it isn't used

IN_PROJ = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)in_proj_(weight|bias)")
TEXT_LAYER_INDEX = re.compile(r"(?:transformer\.resblocks|encoder\.layers)\.(\d+)\.")
VAE_ATTENTION_WEIGHT = re.compile(r"(?:en|de)coder\.mid_block\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight")


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
    weights, schedules, losses, projections of encoders that aren't pooled) are ignored. That every weight of the model
    is there, in its shape, is for the caller to check. Raises BaseModelError if a weight is there twice or can't be
    split.
    """
    names = {"unet": inverse(unet_table(configs["unet"])), "vae": inverse(vae_table(configs["vae"]))}
    specs = {spec.part: spec for spec in family.text_encoders}
    for spec in family.text_encoders:
        text = text_table(configs[spec.part], spec.pooled)
        # The Hugging Face layout needs no renaming, only the same check that each name is known.
        names[spec.part] = inverse(text) | {ours: ours for ours in text}
    prefixes = part_prefixes(family)
    parts: dict[str, StateDict] = {part: {} for part in names}
    unplaced = []
    for full_name, tensor in state_dict.items():
        if full_name in IGNORED_NAMES or full_name.startswith(IGNORED_PREFIXES) or full_name.endswith(".logit_scale"):
            continue
        prefix = next((prefix for prefix in prefixes if full_name.startswith(prefix)), None)
        if prefix is None:
            unplaced.append(full_name)
            continue
        part, name = prefixes[prefix], full_name[len(prefix) :]
        pieces = {name: tensor}
        if part in specs:
            name = name.removeprefix("text_model.")
            if _is_extra_text(name, specs[part]) or _is_unused_layer(name, configs[part]):
                continue
            pieces = {name: tensor.t().contiguous()} if name == PROJECTION[0] else _split_in_proj(name, tensor)
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
    plain = {n: t for n, t in strip_text_model(state_dict).items() if not _is_extra_text(n, spec)}
    renamed = _rename_all(plain, text_table(config, spec.pooled), spec.part)
    if spec.checkpoint_layout == "hf":
        return _prefixed("text_model.", plain)
    text = {n: t.t().contiguous() if n == PROJECTION[0] else t for n, t in _fuse_in_proj(renamed, spec.part).items()}
    count = config["num_hidden_layers"]
    last = f"transformer.resblocks.{count - 1}."
    for layer in range(count, count + spec.unused_layers if unused_layers else count):
        extra = f"transformer.resblocks.{layer}."
        # Cloned, because safetensors refuses two names for one storage.
        text |= {extra + n.removeprefix(last): t.clone() for n, t in text.items() if n.startswith(last)}
    return text


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


def _is_extra_text(name: str, spec: TextEncoderSpec) -> bool:
    return name.endswith(IGNORED_TEXT_ENDS) and not (spec.pooled and name in PROJECTION)


def _is_unused_layer(name: str, config: Mapping) -> bool:
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
