"""The host's internals: memory, folders, state dicts, tokenizers, patches.

With the other ``host_*`` modules all that touches them. When the host changes, little else does.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.clip_model
import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..far_train.models.base import BaseModel
from ..far_train.models.families import Family
from ..far_train.models.fingerprint import base_fingerprint, kv_digest
from ..far_train.models.keys import ldm_to_diffusers
from ..far_train.models.loading import load_base
from ..far_train.models.tokens import unknown_tokens
from ..far_train.models.weights import FarWeights
from ..far_train.utils.errors import BaseModelError, WeightsError
from . import layout
from .host_state import read_weights

log = logging.getLogger(__name__)

# What the pack reads from models/NAME. Other packs may have registered the same folders: theirs and ours are united.
MODEL_FOLDERS = {"far": {".safetensors"}, "sams": {".pth", ".pt", ".safetensors"}}


# --- folders


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def input_subfolders() -> list[str]:
    """Folders below the input folder, relative, with forward slashes; hidden ones left out."""
    root = input_folder()
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_dir())
    return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def register_model_folders() -> None:
    """Make models/far and models/sams known, keeping what other packs registered under these names."""
    for kind, extensions in MODEL_FOLDERS.items():
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
        paths, known = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = (paths, set(known) | extensions)


def model_files(kind: str) -> list[str]:
    """Names of the files in models/``kind`` that the host lists."""
    return folder_paths.get_filename_list(kind)


def model_path(kind: str, name: str) -> Path:
    """The file ``name`` of models/``kind``. Raises FileNotFoundError."""
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def model_subfolders(kind: str) -> list[Path]:
    """Folders right below models/``kind`` that hold a model in transformers' layout (config.json)."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind) if Path(root).is_dir()]
    return sorted(path.parent for root in roots for path in root.glob("*/config.json"))


def model_folder(kind: str) -> Path:
    """Where new files of models/``kind`` are written."""
    return Path(folder_paths.get_folder_paths(kind)[0])


# --- memory and grad mode


def compute_device() -> torch.device:
    """The device on which the host computes."""
    return comfy.model_management.get_torch_device()


def memory_in_use() -> tuple[int, int]:
    """Bytes in use on the compute device, by everyone, and in all."""
    device = compute_device()
    total = int(comfy.model_management.get_total_memory(device))
    return total - int(comfy.model_management.get_free_memory(device)), total


def free_everything() -> None:
    """Take the host's models off the device and give back what nobody holds."""
    comfy.model_management.unload_all_models()
    give_back()


def give_back() -> None:
    """Give back memory that nobody holds."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """The host runs nodes in inference mode, in which nothing can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that can be used in training, which the graph's inference tensors can't."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True)


@contextmanager
def on_compute_device(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Have a module, such as a SAM of any pack, on the compute device for a while; the host's models make room."""
    before = next(module.parameters()).device
    device = compute_device()
    if device != before:
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        comfy.model_management.free_memory(2 * size, device)
    try:
        # Other packs make theirs in inference mode; moved outside of it, such parameters can't be used any more.
        with torch.inference_mode():
            module.to(device)
        yield module
    finally:
        with torch.inference_mode():
            module.to(before)
        if device != before:
            comfy.model_management.soft_empty_cache()


# --- the base: MODEL, CLIP and VAE as far_train's


@dataclass(frozen=True)
class BaseMark:
    """By what weights know their base again: the digest of its cross-attention K/V, and how it predicts."""

    digest: str
    prediction_type: str


def mark_base(model: Any, clip: Any) -> BaseMark:
    """What weights ask of MODEL, with the graph's patches. Raises BaseModelError for another family."""
    check_family(model, clip)
    return BaseMark(kv_digest(kv_weights(model)), prediction_type(model))


@dataclass(frozen=True)
class BaseIdentity:
    """All of a base that decides what a training on it learns."""

    fingerprint: str
    prediction_type: str


# By the module that a MODEL patches: the ids of all patches on MODEL, CLIP and VAE → fingerprint.
_fingerprints: WeakKeyDictionary[torch.nn.Module, dict[tuple, str]] = WeakKeyDictionary()


def identify_base(model: Any, clip: Any, vae: Any) -> BaseIdentity:
    """Identify MODEL, CLIP and VAE by all their weights, with the graph's patches, without building the base.

    Reading and hashing gigabytes takes seconds, so the result is kept for as long as the host keeps MODEL: the host
    gives every change of a model's patches an id of its own. Raises BaseModelError for another family.
    """
    _check_base(model, clip, vae)
    key = (model.patches_uuid, clip.patcher.patches_uuid, clip.layer_idx, vae.patcher.patches_uuid)
    known = _fingerprints.setdefault(model.model, {})
    if key not in known:
        states, _ = ldm_to_diffusers(*_read_parts(model, clip, vae))
        known[key] = base_fingerprint(states)
    return BaseIdentity(known[key], prediction_type(model))


def read_base(model: Any, clip: Any, vae: Any) -> BaseModel:
    """MODEL, CLIP and VAE as a base in fp32 on the CPU, patches baked in; the inputs stay untouched.

    Raises BaseModelError where they are not Stable Diffusion 2.1's.
    """
    state, configs, _ = _read_parts(model, clip, vae)
    base, stated = load_base(state, config=configs), prediction_type(model)
    if base.prediction_type != stated:
        # A file's type is measured, since nothing else tells it. In a graph MODEL says how the samplers will read the
        # UNet's output (ModelSamplingDiscrete may have set it), and training must aim at what they will read.
        measured = base.prediction_type
        log.warning("MODEL samples as %s though its weights look like %s; MODEL is believed.", stated, measured)
        scheduler = {**base.scheduler, "prediction_type": stated}
        base = dataclasses.replace(base, prediction_type=stated, scheduler=scheduler)
    sigmas = model.get_model_object("model_sampling").sigmas.float().cpu()
    if len(sigmas) != 1000 or not torch.allclose(1 / (sigmas**2 + 1), base.alphas_cumprod, atol=1e-3):
        log.warning("MODEL has a noise schedule of its own (zero terminal SNR?); FaR trains on Stable Diffusion's.")
    return base


def _read_parts(model: Any, clip: Any, vae: Any) -> tuple[dict[str, Tensor], dict[str, Any], Family]:
    """The weights in fp32 in the layout of a single file, patches baked in, the component configs, and the family."""
    family = _check_base(model, clip, vae)
    unet, pixels = read_weights(model, "diffusion_model."), read_weights(vae.patcher)
    text_encoders = [_read_text_encoder(clip, spec.comfy_name) for spec in family.text_encoders]
    configs = layout.component_configs(
        family,
        model.model.model_config.unet_config,
        text_encoders,
        pixels,
        prediction_type=prediction_type(model),
        scaling_factor=model.model.latent_format.scale_factor,
    )
    tokenizer = inner_tokenizer(clip).tokenizer
    if len(tokenizer.get_vocab()) != layout.CLIP_VOCABULARY:
        configs["tokenizer"] = Path(tokenizer.name_or_path)  # a small base's own words
    state = {f"model.{k}": v for k, v in unet.items()}
    state |= {f"first_stage_model.{k}": v for k, v in pixels.items()}
    for spec, encoder in zip(family.text_encoders, text_encoders):
        state |= {f"{spec.prefixes[0]}{k}": v for k, v in encoder.state.items()}
    return state, configs, family


def _read_text_encoder(clip: Any, name: str) -> layout.TextEncoder:
    prefix, encoder = f"{name}.transformer.text_model.", getattr(clip.cond_stage_model, name)
    state = {k.removeprefix(prefix): v for k, v in read_weights(clip.patcher, prefix).items()}
    heads, activation = _text_details(encoder)
    return layout.TextEncoder(state, heads, activation, layout.text_layer_count(state, _text_layer(clip, encoder)))


def prediction_type(model: Any) -> str:
    """What MODEL's samplers take the UNet's output for. Raises BaseModelError if it is neither v nor ε."""
    sampling = model.get_model_object("model_sampling")
    # By the formula and not by the class: LCM and x0 inherit from ε, EDM from v, with formulas of their own.
    formula = type(sampling).calculate_denoised
    if formula is comfy.model_sampling.V_PREDICTION.calculate_denoised:
        return "v_prediction"
    if formula is comfy.model_sampling.EPS.calculate_denoised:
        return "epsilon"
    raise BaseModelError(
        "MODEL predicts neither v nor ε (LCM, EDM, x0 …); remove its ModelSampling node or use a plain SD 2.1"
    )


def kv_weights(model: Any, patched: bool = True) -> dict[str, Tensor]:
    """MODEL's cross-attention K/V [channels, context width] by layer name, with or without the graph's patches."""
    found = read_weights(model, "diffusion_model.", (".attn2.to_k.weight", ".attn2.to_v.weight"), patched)
    return {k.removeprefix("diffusion_model.").removesuffix(".weight"): v for k, v in found.items()}


def noun_embedding(clip: Any, noun: str) -> Tensor:
    """Mean embedding [width] of a class noun's tokens in CLIP; see :func:`far_train.models.tokens.noun_embedding`."""
    tokenizer = inner_tokenizer(clip)
    key = f"{tokenizer.embedding_key}.transformer.text_model.embeddings.token_embedding.weight"
    table = read_weights(clip.patcher, key)[key]
    return table[tokenizer.tokenizer(noun, add_special_tokens=False)["input_ids"]].mean(0)


def check_family(model: Any, clip: Any) -> Family:
    """The family of MODEL and CLIP. Raises BaseModelError for families that FaR doesn't train."""
    _check_kind("model", model, "MODEL", ("model", "get_key_patches"))
    _check_kind("clip", clip, "CLIP", ("tokenizer", "patcher", "cond_stage_model"))
    config = model.model.model_config
    kind = type(config).__name__
    return layout.find_family(config.unet_config, kind, _text_encoder_names(clip))


def _text_encoder_names(clip: Any) -> tuple[str, ...]:
    name = getattr(getattr(clip, "tokenizer", None), "clip", None)
    return (name,) if name else ()


def _check_base(model: Any, clip: Any, vae: Any) -> Family:
    family = check_family(model, clip)
    _check_kind("vae", vae, "VAE", ("patcher", "first_stage_model"))
    return family


def _check_kind(name: str, value: Any, called: str, attributes: Sequence[str]) -> None:
    """Refuse what a queue wrote down in place of a link. By attributes, since packs have classes of their own."""
    if not all(hasattr(value, a) for a in attributes):
        raise BaseModelError(f"{name}: expected a {called} of another node, got {type(value).__name__}; connect one")


def _text_layer(clip: Any, encoder: torch.nn.Module) -> int | None:
    """The layer whose output conditions the UNet; CLIPSetLastLayer overrides the model's own."""
    layer, index, _ = encoder.options_default
    index = clip.layer_idx if clip.layer_idx is not None else index
    return index if layer == "hidden" or clip.layer_idx is not None else None


def _text_details(encoder: torch.nn.Module) -> tuple[int, str]:
    """Heads and activation of a text encoder, which shapes don't show."""
    first = encoder.transformer.text_model.encoder.layers[0]
    names = {function: name for name, function in comfy.clip_model.ACTIVATIONS.items()}
    return first.self_attn.heads, names[first.mlp.activation]


# --- the weights: patches on MODEL, tokens in CLIP


def apply_changes(model: Any, weights: FarWeights, strength: float) -> Any:
    """MODEL with ``strength`` × what the weights change; the input stays as it is. Raises WeightsError."""
    patched = model.clone()
    own = {k: tuple(v.shape) for k, v in model.model_state_dict("diffusion_model.").items()}
    # The host drops unknown keys without a word and logs wrong shapes only when it samples.
    for name, shape in weights.shapes().items():
        key = _model_key(name)
        if own.get(key) != shape:
            has = "lacks it" if key not in own else f"has {list(own[key])}"
            raise WeightsError(f"weights: {key} is {list(shape)}, MODEL {has}; use the base that they belong to")
    patched.add_patches({_model_key(n): ("diff", (plain(d),)) for n, d in weights.deltas.items()}, strength)
    halves = {f"{n}.lora_up.weight": plain(d.up) for n, d in weights.low_rank_deltas.items()}
    halves |= {f"{n}.lora_down.weight": plain(d.down) for n, d in weights.low_rank_deltas.items()}
    patched.add_patches(comfy.lora.load_lora(halves, {n: _model_key(n) for n in weights.low_rank_deltas}), strength)
    return patched


def _model_key(layer: str) -> str:
    return f"diffusion_model.{layer}.weight"


def apply_tokens(clip: Any, embeddings: Mapping[str, Tensor]) -> Any:
    """CLIP whose prompts may hold the modifier tokens; ``embeddings`` [n, width] by token, ``<corgi-dog>``.

    Works in every node that tokenizes with the CLIP it is given, with weights as in ``(<corgi-dog>:1.2)``, and on top
    of tokens applied before. The input and its tokenizer stay as they are. Raises WeightsError.
    """
    inner = inner_tokenizer(clip)
    for token, rows in embeddings.items():
        # The host would drop such an embedding from every prompt with no more than a line in its log.
        if rows.ndim != 2 or rows.shape[1] != inner.embedding_size:
            raise WeightsError(
                f"weights: {token} has {rows.shape[-1]} numbers per vector, this CLIP needs {inner.embedding_size}; "
                "use the CLIP of the base that they belong to"
            )
    applied = clip.clone()
    applied.tokenizer = copy.copy(clip.tokenizer)
    setattr(applied.tokenizer, clip.tokenizer.clip, _with_modifiers(inner, embeddings))
    return applied


def inner_tokenizer(clip: Any) -> Any:
    """The host's tokenizer for the only text encoder of CLIP. Raises BaseModelError for a CLIP of another family."""
    (name,) = layout.clip_family(_text_encoder_names(clip), "the base that the weights belong to").comfy_names
    return getattr(clip.tokenizer, name)


class _ModifierTokens:
    """Mixin for a copy of the host's tokenizer: modifier tokens become embeddings, looked up in a table."""

    far_tokens: Mapping[str, Tensor]
    far_warned: set[str]
    far_names_found: bool  # whether this host's _try_get_embedding also gives the name back, as it does since 2026

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        for token in unknown_tokens(text, tuple(self.far_tokens)):
            if token not in self.far_warned:
                self.far_warned.add(token)
                log.warning(
                    "The prompt holds %s, which none of the applied concepts has (%s): it is read as plain text.",
                    token,
                    ", ".join(self.far_tokens),
                )
        names = "|".join(map(re.escape, self.far_tokens))
        pattern = re.compile(f"(?:{self.embedding_identifier})?({names})", re.IGNORECASE)
        # The spaces matter: the host looks for " embedding:", and takes all up to the next space for the name.
        text = pattern.sub(lambda m: f" {self.embedding_identifier}{m[1].lower()} ", text)
        return super().tokenize_with_weights(text, *args, **kwargs)

    def _try_get_embedding(self, embedding_name: str) -> tuple[Any, ...]:
        name, _, rest = embedding_name.partition(" ")
        if name in self.far_tokens:
            found = self.far_tokens[name]
            return (found, name, rest.strip()) if self.far_names_found else (found, rest.strip())
        return super()._try_get_embedding(embedding_name)


def _with_modifiers(tokenizer: Any, embeddings: Mapping[str, Tensor]) -> Any:
    """A copy of a tokenizer that knows the tokens; those of earlier copies stay known."""
    applied = copy.copy(tokenizer)
    kind = type(tokenizer)
    if not isinstance(tokenizer, _ModifierTokens):
        applied.__class__ = type(kind.__name__, (_ModifierTokens, kind), {})
    tokens = {token: plain(rows).float() for token, rows in embeddings.items()}
    applied.far_tokens = {**getattr(tokenizer, "far_tokens", {}), **tokens}
    applied.far_warned = set()
    nowhere = copy.copy(tokenizer)
    nowhere.embedding_directory = []
    applied.far_names_found = len(nowhere._try_get_embedding("none")) == 3
    if applied.embedding_directory is None:  # then the host would not look for embeddings at all
        applied.embedding_directory = []
    return applied
