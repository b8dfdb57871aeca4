"""The graph's MODEL, CLIP and VAE as a base model of far_train, and FaR weights as patches on MODEL."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.clip_model
import comfy.lora
import comfy.model_sampling
import torch
from torch import Tensor

from ..far_train.models.base import BaseModel
from ..far_train.models.families import SUPPORTED, Family, TextEncoderSpec
from ..far_train.models.fingerprint import base_fingerprint
from ..far_train.models.keys import ldm_to_diffusers
from ..far_train.models.loading import ZERO_TERMINAL_SNR, load_base, packaged_configs
from ..far_train.models.weights import FarWeights
from ..far_train.utils.errors import BaseModelError, WeightsError
from . import layout
from .host_memory import empty_cache, training_copy, unload_models
from .host_state import check_weights_are_all, read_weights, weight_shapes
from .host_tokens import first_tokenizer, text_encoder_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseId:
    """What identifies a base model for a training: its weights, and what the UNet predicts; and its size in pixels."""

    fingerprint: str
    prediction_type: str
    zero_terminal_snr: bool
    native_size: int


# By the module that a MODEL patches: the ids of all patches on MODEL, CLIP and VAE → fingerprint.
_fingerprints: WeakKeyDictionary[torch.nn.Module, dict[tuple, str]] = WeakKeyDictionary()


def identify_base(model: Any, clip: Any, vae: Any) -> BaseId:
    """Identify MODEL, CLIP and VAE by all their weights, with the graph's patches, without building the base.

    Reading and hashing gigabytes takes seconds, so the result is kept for as long as the host keeps MODEL.
    Raises BaseModelError for another family.
    """
    family = _check_base(model, clip, vae)
    known, key = _known_fingerprints(model, clip, vae)
    if key not in known:
        states, _ = ldm_to_diffusers(*_read_parts(model, clip, vae))
        known[key] = base_fingerprint(states)
    predicts, config = prediction_type(model), model.model.model_config.unet_config
    zero_terminal_snr = _schedule(model, family) == ZERO_TERMINAL_SNR
    return BaseId(known[key], predicts, zero_terminal_snr, layout.native_size(family, config, predicts))


def _known_fingerprints(model: Any, clip: Any, vae: Any) -> tuple[dict[tuple, str], tuple]:
    """The fingerprints of the bases with this MODEL, and the key of the one with these patches.

    The host gives every change of a model's patches an id of its own.
    """
    key = (model.patches_uuid, clip.patcher.patches_uuid, clip.layer_idx, vae.patcher.patches_uuid)
    return _fingerprints.setdefault(model.model, {}), key


def read_base(model: Any, clip: Any, vae: Any) -> BaseModel:
    """MODEL, CLIP and VAE as a base model in fp32 on the CPU, patches baked in; the inputs stay untouched.

    Raises BaseModelError where they are of no family that FaR trains.
    """
    state, configs, family = _read_parts(model, clip, vae)
    base, stated = load_base(state, config=configs), prediction_type(model)
    if base.prediction_type != stated:
        # A file's type is measured, since nothing else tells it. In a graph MODEL says how the samplers will read the
        # UNet's output (ModelSamplingDiscrete may have set it), and training must aim at what they will read.
        measured = base.prediction_type
        log.warning("MODEL samples as %s though its weights look like %s; MODEL is believed.", stated, measured)
    schedule = _schedule(model, family)
    if schedule is None:
        log.warning("MODEL has a noise schedule of its own; FaR trains on Stable Diffusion's.")
    scheduler = {**base.scheduler, **(schedule or {}), "prediction_type": stated}
    base = dataclasses.replace(base, prediction_type=stated, scheduler=scheduler)
    known, key = _known_fingerprints(model, clip, vae)
    if key in known:
        base.remember_fingerprint(known[key])
    else:
        known[key] = base.fingerprint
    return base


@contextmanager
def freed_base(model: Any, clip: Any, vae: Any) -> Iterator[BaseModel]:
    """The graph's base for a while, with the device to itself; gives the memory back however it ends."""
    base = read_base(model, clip, vae)
    try:
        unload_models()
        yield base
    finally:
        base.to("meta")  # frees the weights even where a traceback still holds the modules
        del base
        empty_cache()


def _read_parts(model: Any, clip: Any, vae: Any) -> tuple[dict[str, Tensor], dict[str, Any], Family]:
    """The weights in fp32 in the layout of a single file, patches baked in, the component configs, and the family."""
    family = _check_base(model, clip, vae)
    unet, pixels = read_weights(model, "diffusion_model."), read_weights(vae.patcher)
    text_encoders = [_read_text_encoder(clip, spec) for spec in family.text_encoders]
    configs = layout.component_configs(
        family,
        model.model.model_config.unet_config,
        text_encoders,
        pixels,
        prediction_type=prediction_type(model),
        scaling_factor=model.model.latent_format.scale_factor,
    )
    tokenizer = first_tokenizer(clip)[1].tokenizer
    if len(tokenizer.get_vocab()) != layout.CLIP_VOCABULARY:
        configs["tokenizer"] = Path(tokenizer.name_or_path)  # a small base's own words
    state = {f"model.{k}": v for k, v in unet.items()}
    state |= {f"first_stage_model.{k}": v for k, v in pixels.items()}
    for spec, encoder in zip(family.text_encoders, text_encoders):
        state |= {f"{spec.prefixes[0]}{k}": v for k, v in encoder.state.items()}
    return state, configs, family


def _read_text_encoder(clip: Any, spec: TextEncoderSpec) -> layout.TextEncoder:
    prefix, encoder = f"{spec.comfy_name}.transformer.", getattr(clip.cond_stage_model, spec.comfy_name)
    parts = ("text_model.", "text_projection.") if spec.pooled else ("text_model.",)
    state = {k.removeprefix(prefix): v for part in parts for k, v in read_weights(clip.patcher, prefix + part).items()}
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    heads, activation = _text_details(encoder)
    layers = layout.text_layer_count(spec, state, _text_layer(clip, encoder))
    return layout.TextEncoder(state, heads, activation, layers)


def _schedule(model: Any, family: Family) -> dict[str, Any] | None:
    """What MODEL's noise schedule changes in its family's scheduler config: nothing, or to zero terminal SNR.

    None if it is another one.
    """
    from diffusers import DDIMScheduler  # takes seconds, which every start of a host would pay

    predicts = prediction_type(model)
    sigmas = model.get_model_object("model_sampling").sigmas.float().cpu()
    own = packaged_configs(family, predicts)["scheduler"]
    for changes in ({}, ZERO_TERMINAL_SNR) if predicts == "v_prediction" else ({},):
        expected = DDIMScheduler.from_config(own | changes).alphas_cumprod
        if len(sigmas) == len(expected) and torch.allclose(1 / (sigmas**2 + 1), expected, atol=1e-3):
            return changes
    return None


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
        "MODEL predicts neither v nor ε (LCM, EDM, x0 …); remove its ModelSampling node, or use a plain model of "
        f"{SUPPORTED}"
    )


def kv_weights(model: Any, patched: bool = True) -> dict[str, Tensor]:
    """MODEL's cross-attention K/V [channels, context width] by layer name, with or without the graph's patches."""
    found = read_weights(model, "diffusion_model.", (".attn2.to_k.weight", ".attn2.to_v.weight"), patched)
    return {k.removeprefix("diffusion_model.").removesuffix(".weight"): v for k, v in found.items()}


def check_family(model: Any, clip: Any) -> Family:
    """The family of MODEL and CLIP. Raises BaseModelError for families that FaR doesn't train."""
    _check_kind("model", model, "MODEL", ("model", "get_key_patches"))
    _check_kind("clip", clip, "CLIP", ("tokenizer", "patcher", "cond_stage_model"))
    config = model.model.model_config
    kind = type(config).__name__
    return layout.find_family(config.unet_config, kind, text_encoder_names(clip))


def _check_base(model: Any, clip: Any, vae: Any) -> Family:
    family = check_family(model, clip)
    _check_kind("vae", vae, "VAE", ("patcher", "first_stage_model"))
    for called, patcher in (("MODEL", model), ("CLIP", clip.patcher), ("VAE", vae.patcher)):
        check_weights_are_all(called, patcher)
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


def patch_model(model: Any, weights: FarWeights, strength: float) -> Any:
    """MODEL with ``strength`` × what the weights change; the input stays as it is. Raises WeightsError."""
    patched = model.clone()
    own = weight_shapes(model, "diffusion_model.")
    # The host drops unknown keys without a word and logs wrong shapes only when it samples.
    for name, shape in weights.shapes().items():
        key = _model_key(name)
        if own.get(key) != shape:
            has = "lacks it" if key not in own else f"has {list(own[key])}"
            raise WeightsError(f"weights: {key} is {list(shape)}, MODEL {has}; use the base that they belong to")
    patched.add_patches({_model_key(n): ("diff", (training_copy(d),)) for n, d in weights.deltas.items()}, strength)
    halves = {f"{n}.lora_up.weight": training_copy(d.up) for n, d in weights.low_rank_deltas.items()}
    halves |= {f"{n}.lora_down.weight": training_copy(d.down) for n, d in weights.low_rank_deltas.items()}
    patched.add_patches(comfy.lora.load_lora(halves, {n: _model_key(n) for n in weights.low_rank_deltas}), strength)
    return patched


def _model_key(layer: str) -> str:
    return f"diffusion_model.{layer}.weight"
