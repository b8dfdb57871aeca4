"""Loading a base: from a single file, a diffusers folder or a state dict, checked to the last key."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.errors import BaseModelError, FarError, UnreadableFile
from ..utils.files import parse_json, read_tensors
from .base import BaseModel
from .families import FAMILIES, SUPPORTED, Family, detect
from .fingerprint import kv_digest
from .keys import IGNORED_TEXT_ENDS, check_whole, ldm_to_diffusers, strip_text_model
from .layers import kv_weights
from .part_files import weight_files
from .quantised import check_floats, unscale

if TYPE_CHECKING:
    from transformers import CLIPTokenizerFast

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"
SHARED = CONFIGS / "shared"  # all families have CLIP's vocabulary, and the same noise schedule
# Lin et al. 2024 (arXiv 2305.08891), sections 3.1 and 3.3: the schedule ends in pure noise, and sampling begins there.
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# The most that a component config may say: numbers, items of a list, layers of a block, layers of a text encoder.
MAX_NUMBER, MAX_LIST, MAX_LAYERS, MAX_ENCODER_LAYERS = 2**17, 16, 12, 64


def load_base(
    source: str | Path | Mapping[str, Tensor],
    *,
    prediction_type: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> BaseModel:
    """Load a base in fp32 on the CPU, offline.

    ``source``: a single ``.safetensors`` file in the original (LDM) layout, a diffusers folder, or such a file's
    state dict. ``config``: a folder (or a mapping of parts) with the component configs of a single file; default: those
    of its family. ``prediction_type``: "v_prediction" or "epsilon"; default: what the file shows.
    Raises BaseModelError when anything is missing, of another shape, or contradicts ``prediction_type``.
    """
    if prediction_type not in (None, "v_prediction", "epsilon"):
        raise BaseModelError(f"prediction_type: {prediction_type!r} is unknown; use v_prediction or epsilon")
    if isinstance(source, Mapping):
        return _from_state_dict(source, "the state dict", config, prediction_type)
    path = Path(source)
    try:
        if path.is_dir():
            if config is not None:
                raise BaseModelError(
                    f"base_config: {path} is a folder, which has its own; leave it out, or give a single file as base"
                )
            return _from_folder(path, prediction_type)
        if not path.exists():
            raise BaseModelError(f"base: there is no file or folder {path}; the README says where bases can be had")
        if path.suffix != ".safetensors":
            raise BaseModelError(f"base: {path.name} is no .safetensors file; FaR never unpickles, so convert it first")
        return _from_state_dict(_read(path), path.name, config, prediction_type)
    except (FarError, MemoryError):
        raise
    except Exception as e:  # the libraries that build the parts raise almost anything at configs that make no sense
        log.debug("%s can't be loaded", path, exc_info=True)
        raise BaseModelError(
            f"base: {path} can't be loaded ({type(e).__name__}: {str(e)[:300]}); it is damaged or of another model"
        ) from e


def read_configs(folder: Path) -> dict[str, Any]:
    """Component configs of a folder in diffusers' layout: unet, vae, text_encoder, scheduler, tokenizer (a path).

    Raises BaseModelError.
    """
    families = [family.parts for family in FAMILIES.values()]
    known = dict.fromkeys(chain(*families))
    held = [part for part in known if all(part in parts for parts in families) or (folder / part).is_dir()]
    configs: dict[str, Any] = {part: _read_json(folder / part / "config.json") for part in held}
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    configs["tokenizer"] = folder / "tokenizer"
    if not configs["tokenizer"].is_dir():
        raise BaseModelError(f"base: {folder} has no tokenizer folder; it must have diffusers' layout")
    return configs


def packaged_configs(family: Family, prediction_type: str) -> dict[str, Any]:
    """A family's own component configs, as :func:`read_configs` has them, in the variant with this prediction type."""
    folder = CONFIGS / family.configs
    configs: dict[str, Any] = {p: _read_json(folder / p / "config.json") for p in family.parts}
    for part, changes in _read_json(folder / "variants.json")[prediction_type].items():
        configs[part] |= changes
    configs["scheduler"] = _read_json(SHARED / "scheduler" / f"{prediction_type}.json")
    configs["tokenizer"] = SHARED / "tokenizer"
    return configs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        _check_config(config)
    except (OSError, ValueError) as e:
        raise BaseModelError(f"base: can't read {path} ({e}); the folder must have diffusers' layout") from e
    return config


def _check_config(config: Any) -> None:
    """Refuse configs that would have the libraries build for hours, or an endless schedule. Raises ValueError."""
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        limit = (MAX_ENCODER_LAYERS if name == "num_hidden_layers" else MAX_LAYERS) if "layers" in name else MAX_NUMBER
        if len(numbers) > MAX_LIST or any(isinstance(n, (int, float)) and not abs(n) <= limit for n in numbers):
            raise ValueError(f"its {name} is beyond any known model's")


def build_parts(family: Family, configs: Mapping[str, Any], device: str = "meta") -> dict[str, nn.Module]:
    """The components of these configs; without weights on the meta device, else with random ones.

    Raises BaseModelError where the libraries that build them can't be imported.
    """
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    except Exception as e:  # of any kind: transformers 4 imports whatever other framework it finds
        cause = str(e).strip().rpartition("\n")[2]
        raise BaseModelError(
            f"base: diffusers or transformers can't be imported ({cause}); repair that "
            "package. FaR doesn't need tensorflow: remove it, or set USE_TF=0 in the environment"
        ) from e

    with torch.device(device):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
        }
        for spec in family.text_encoders:
            kind = CLIPTextModelWithProjection if spec.pooled else CLIPTextModel
            parts[spec.part] = kind(CLIPTextConfig.from_dict(dict(configs[spec.part])))
    return parts


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except UnreadableFile as e:
        raise BaseModelError(f"base: can't read {path} ({e}); the file is damaged or incomplete, fetch it again") from e


def _read_part(folder: Path, part: str) -> dict[str, Tensor]:
    files = weight_files(folder / part)
    return unscale({k: v for f in files for k, v in _read(f).items()}, f"{folder.name}, {part}")


def _check_pipeline(folder: Path) -> None:
    """Refuse folders of models that have no UNet, by the name of their pipeline. Raises BaseModelError."""
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        index = folder / "model_index.json"
        kind = _read_json(index).get("_class_name") if index.exists() else None
        about = f" ({kind})" if isinstance(kind, str) else ""
        raise BaseModelError(f"base: {folder.name} is a diffusion transformer{about}; FaR needs {SUPPORTED}")


def _from_folder(folder: Path, prediction_type: str | None) -> BaseModel:
    _check_pipeline(folder)
    unet = _read_json(folder / "unet" / "config.json")
    states = {"unet": _read_part(folder, "unet")}
    family = detect(states["unet"], folder.name, unet["cross_attention_dim"])
    configs = read_configs(folder)
    states |= {part: _read_part(folder, part) for part in family.parts if part not in states}
    for spec in family.text_encoders:
        states[spec.part] = strip_text_model(states[spec.part])
    declared = configs["scheduler"].get("prediction_type", "epsilon")
    if prediction_type and prediction_type != declared:
        raise BaseModelError(
            f"prediction_type: {prediction_type} was asked for but {folder.name}/scheduler says {declared}; "
            "leave it unset"
        )
    check_prediction_type(declared, family.measure_prediction(states["unet"]), folder.name)
    return _assemble(family, configs, states, folder.name, declared)


def _from_state_dict(
    state: Mapping[str, Tensor], where: str, config: str | Path | Mapping[str, Any] | None, prediction_type: str | None
) -> BaseModel:
    if isinstance(config, (str, Path)):
        config = read_configs(Path(config))
    family = detect(state, where, config["unet"]["cross_attention_dim"] if config else None)
    shapes = config or packaged_configs(family, family.default_prediction)
    check_whole(state, where, family)
    states, unknown = ldm_to_diffusers(unscale(state, where), shapes, family)
    _report_unused(unknown, where)
    if averaged := sum(name.startswith("model_ema.") for name in state):
        log.info("%s also holds %d averaged (EMA) weights; FaR trains on the others.", where, averaged)
    # Trainers of merges leave the names v_pred and ztsnr in the file, as ComfyUI reads them.
    measured = "v_prediction" if "v_pred" in state else family.measure_prediction(states["unet"])
    check_prediction_type(prediction_type, measured, where)
    chosen = prediction_type or measured or shapes["scheduler"].get("prediction_type", "epsilon")
    configs = config or packaged_configs(family, chosen)
    if "ztsnr" in state and chosen == "v_prediction":
        configs = {**configs, "scheduler": configs["scheduler"] | ZERO_TERMINAL_SNR}
    elif "ztsnr" in state:
        log.warning("%s is marked ztsnr but predicts noise, which zero terminal SNR can't: ignored.", where)
    return _assemble(family, configs, states, where, chosen)


def check_prediction_type(stated: str | None, measured: str | None, where: str) -> None:
    if stated and measured and stated != measured:
        raise BaseModelError(
            f"prediction_type: {stated} is stated but {where} looks like {measured} "
            "(by its v_pred marker, or the spread of the last block's norm1 bias); use the right one, or another file"
        )


def _assemble(
    family: Family,
    configs: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    where: str,
    prediction_type: str,
) -> BaseModel:
    if configs["scheduler"].get("rescale_betas_zero_snr") and prediction_type != "v_prediction":
        raise BaseModelError(
            f"base: {where}: its schedule has zero terminal SNR (rescale_betas_zero_snr), where noise can't be "
            "predicted; use a v_prediction model, or correct its scheduler_config.json"
        )
    parts = build_parts(family, configs)
    for part, module in parts.items():
        _fill(module, states[part], f"{where}, {part}")
    unet, vae = parts["unet"], parts["vae"]
    return BaseModel(
        family=family,
        unet=unet,
        vae=vae,
        text_encoders=tuple(parts[spec.part] for spec in family.text_encoders),
        tokenizer=load_tokenizer(configs["tokenizer"]),
        scheduler={**configs["scheduler"], "prediction_type": prediction_type, "clip_sample": False},
        prediction_type=prediction_type,
        native_size=unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
        digest=kv_digest(kv_weights(unet)),
    )


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put the weights in; a key that is missing or of another shape would otherwise stay random without a word."""
    expected = module.state_dict()
    nested = {k.removeprefix("text_model."): k for k in expected}  # as transformers nests it, by class and release
    state = {nested.get(k, k): v for k, v in state.items()}
    _report_unused([k for k in state if k not in expected and not k.endswith(IGNORED_TEXT_ENDS)], where)
    state = {k: v for k, v in state.items() if k in expected}
    check_floats(state, where)
    state = {k: v.float() for k, v in state.items()}
    missing = [k for k in expected if k not in state and not k.endswith("position_ids")]
    if missing:
        raise BaseModelError(
            f"base: {where} lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}; "
            "the file is incomplete or of another model"
        )
    wrong = [k for k in state if state[k].shape != expected[k].shape]
    if wrong:
        raise BaseModelError(
            f"base: {where}: {wrong[0]} is {list(state[wrong[0]].shape)}, expected {list(expected[wrong[0]].shape)} "
            f"({len(wrong)} tensors differ); the file is of another model"
        )
    for name, value in state.items():
        if not math.isfinite(sum(extreme.item() for extreme in value.aminmax())):
            raise BaseModelError(f"base: {where}: {name} holds values that are not finite; the file is damaged")
    module.load_state_dict(state, strict=False, assign=True)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:  # only position_ids, which files don't always hold
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_buffer(
                leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False
            )
    module.requires_grad_(False).eval()


def _report_unused(names: Sequence[str], where: str) -> None:
    if names:
        log.warning("%s holds %d tensors that FaR doesn't use, such as %s.", where, len(names), names[0])


def load_tokenizer(folder: Path) -> CLIPTokenizerFast:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
