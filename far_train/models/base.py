"""The base model: read from a single file, a diffusers folder or a state dict, checked to the last key.

What differs between model families stands in :data:`FAMILIES`; nothing else asks which family a base has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import BaseModelError, FarError, UnreadableFile
from ..utils.files import parse_json, read_tensors
from .fingerprint import base_fingerprint, kv_digest
from .keys import IGNORED_TEXT_ENDS, check_whole, ldm_to_diffusers, strip_text_model, unet_to_ldm
from .quantised import check_floats, unscale

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"
PARTS = ("unet", "vae", "text_encoder")
# The most that a component config may say: numbers, items of a list, layers of a block, layers of a text encoder.
MAX_NUMBER, MAX_LIST, MAX_LAYERS, MAX_ENCODER_LAYERS = 2**17, 16, 12, 64


@dataclass(frozen=True)
class Family:
    """What FaR needs to know of a model family beyond its component configs."""

    name: str
    configs: str  # folder of the component configs
    embedding_key: str  # of an embedding file in the host


FAMILIES = {
    "sd21": Family("Stable Diffusion 2.1", "sd21", "clip_h"),
}
FOREIGN = {768: "Stable Diffusion 1.x", 2048: "Stable Diffusion XL", 1280: "the SDXL refiner"}

# The bias of the last block's first norm spreads further in v-prediction models (ComfyUI tells them apart so).
V_STATISTIC = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_THRESHOLD = 0.09


@dataclass(frozen=True)
class BaseModel:
    """A base with all that training and sampling need. Modules are frozen and in eval mode.

    ``alphas_cumprod`` [T] in fp32; ``digest`` identifies the cross-attention K/V by content; ``native_size`` in pixels.
    A base is to be changed within :meth:`placed` or :func:`.apply.applied_weights` alone, which leave it as it was.
    """

    family: str
    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: dict[str, Any]
    prediction_type: str
    native_size: int
    digest: str
    _fingerprint: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Identifies all weights by content. Computed anew only where a tensor was replaced or written to.

        Writes through ``.data`` are seen by samples of each tensor alone.
        """
        tensors, seen = self._tensors()
        # The objects themselves, since the memory of one that was replaced is given to another.
        known = self._fingerprint.get("tensors", [])
        same = len(known) == len(tensors) and all(a is b for a, b in zip(known, tensors))
        if not same or self._fingerprint["seen"] != seen:
            self.remember_fingerprint(base_fingerprint({part: getattr(self, part).state_dict() for part in PARTS}))
        return self._fingerprint["value"]

    def remember_fingerprint(self, value: str) -> None:
        """Take ``value`` for the fingerprint of the weights as they are: for callers that computed it elsewhere."""
        tensors, seen = self._tensors()
        self._fingerprint.update(tensors=tensors, seen=seen, value=value)

    def _tensors(self) -> tuple[list[Tensor], list[tuple]]:
        """All parameters and buffers, and by what a write to each of them is noticed."""
        states = (getattr(self, part).state_dict(keep_vars=True) for part in PARTS)
        tensors = [tensor for state in states for tensor in state.values()]
        return tensors, [(t.data_ptr(), t._version, *_samples(t)) for t in tensors]

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler).alphas_cumprod

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def tokenizer_size(self) -> int:
        """Rows of the text encoder's embedding table; modifier ids begin behind them."""
        return self.text_encoder.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        """Move all parts; ``dtype`` is for UNet and text encoder, the VAE stays in fp32, which it needs little of."""
        # nn.Module's own method: diffusers' would warn of every cast, modules to be kept in fp32 or not.
        nn.Module.to(self.unet, device=device, dtype=dtype)
        nn.Module.to(self.text_encoder, device=device, dtype=dtype)
        nn.Module.to(self.vae, device=device)
        return self

    @contextmanager
    def placed(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Iterator[BaseModel]:
        """Within, :meth:`to` this device and precision; afterwards as it was, to the bit, where it was.

        The original weights are held meanwhile, in what memory they are in.
        """
        modules = [m for part in PARTS for m in getattr(self, part).modules()]
        held = [(p, p.data) for m in modules for p in m.parameters(recurse=False)]
        buffers = [(m, name, buffer) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        self.to(device, dtype)
        try:
            yield self
        finally:
            for parameter, data in held:
                parameter.data = data
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


def _samples(tensor: Tensor) -> list[float]:
    """About sixteen values from all over a tensor."""
    values = tensor.detach().reshape(-1)
    return values[:: max(len(values) // 16, 1)].tolist()


def set_checkpointing(unet: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing, which trades time for memory."""
    if on:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    unet.train(on)  # diffusers checkpoints in training mode only; the UNet has no dropout


# Blocks share their code, and each kind of pass of each size is a graph of its own. Beyond its limit, 8 by default,
# torch runs what it has no graph for eagerly.
MOST_GRAPHS = 64


@contextmanager
def compiled(unet: nn.Module, **options: Any) -> Iterator[None]:
    """Within, the transformer blocks are compiled, which repeat (diffusers' regional compilation).

    ``options`` are torch.compile's.
    """
    limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    with torch._dynamo.config.patch(recompile_limit=limit):
        unet.compile_repeated_blocks(**options)
        try:
            yield
        finally:
            _run_eagerly(unet)


@contextmanager
def uncompiled(unet: nn.Module) -> Iterator[None]:
    """Within, the UNet runs as it is: sample pictures have other sizes, and few passes, to be compiled for."""
    calls = {m: m._compiled_call_impl for m in unet.modules() if m._compiled_call_impl is not None}
    _run_eagerly(unet)
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call


def _run_eagerly(unet: nn.Module) -> None:
    for module in unet.modules():
        module._compiled_call_impl = None  # compiling a module has no public way back


def attention_projections(unet: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Q, K, V and output of all self- and cross-attention: original (LDM) layer name → (the module that holds it, its
    name there).

    LDM names, ``input_blocks.1.1.transformer_blocks.0.attn2.to_k``, because FaR weights go to hosts that use them.
    """
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    found = {}
    for name in (n for n, _ in unet.named_modules() if n.endswith(tuple(f".{part}" for part in parts))):
        owner, _, last = name.rpartition(".")
        found[unet_to_ldm(name, unet.config)] = (unet.get_submodule(owner), last)
    return found


def kv_layers(unet: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The cross-attention K and V among :func:`attention_projections`: name → (attention layer, "to_k" or "to_v")."""
    ends = (".attn2.to_k", ".attn2.to_v")
    return {name: found for name, found in attention_projections(unet).items() if name.endswith(ends)}


def kv_weights(unet: nn.Module) -> dict[str, Tensor]:
    """The matrices of :func:`kv_layers`, each [channels, context width]."""
    return {name: getattr(layer, part).weight for name, (layer, part) in kv_layers(unet).items()}


def load_base(
    source: str | Path | Mapping[str, Tensor],
    *,
    prediction_type: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> BaseModel:
    """Load a base in fp32 on the CPU, offline.

    ``source``: a single ``.safetensors`` file in the original (LDM) layout, a diffusers folder, or such a file's
    state dict. ``config``: a folder (or a mapping of parts) with the component configs of a single file; default:
    Stable Diffusion 2.1's. ``prediction_type``: "v_prediction" or "epsilon"; default: what the file shows.
    Raises BaseModelError when anything is missing, of another shape, or contradicts ``prediction_type``.
    """
    if prediction_type not in (None, "v_prediction", "epsilon"):
        raise BaseModelError(f"prediction_type: {prediction_type!r} is unknown; use v_prediction or epsilon")
    if isinstance(source, Mapping):
        return _from_state_dict(source, "the state dict", config, prediction_type)
    path = Path(source)
    try:
        if path.is_dir():
            return _from_folder(path, prediction_type)
        if not path.exists():
            raise BaseModelError(f"base: there is no file or folder {path}; the README says where SD 2.1 can be had")
        if path.suffix != ".safetensors":
            raise BaseModelError(f"base: {path.name} is no .safetensors file; FaR never unpickles, so convert it first")
        return _from_state_dict(_read(path), path.name, config, prediction_type)
    except (FarError, MemoryError):
        raise
    except Exception as e:  # the libraries that build the parts raise almost anything at configs that make no sense
        raise BaseModelError(
            f"base: {path} can't be loaded ({type(e).__name__}: {str(e)[:300]}); it is damaged or of another model"
        ) from e


def read_configs(folder: Path) -> dict[str, Any]:
    """Component configs of a folder in diffusers' layout: unet, vae, text_encoder, scheduler, tokenizer (a path)."""
    configs: dict[str, Any] = {p: _read_json(folder / p / "config.json") for p in PARTS}
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    configs["tokenizer"] = folder / "tokenizer"
    if not configs["tokenizer"].is_dir():
        raise BaseModelError(f"base: {folder} has no tokenizer folder; it must have diffusers' layout")
    return configs


def packaged_configs(prediction_type: str) -> dict[str, Any]:
    """Component configs of Stable Diffusion 2.1: the 768 px v-prediction model or the 512 px ε-prediction one."""
    folder = CONFIGS / FAMILIES["sd21"].configs
    configs: dict[str, Any] = {p: _read_json(folder / p / "config.json") for p in PARTS}
    for part, changes in _read_json(folder / "variants.json")[prediction_type].items():
        configs[part] |= changes
    configs["scheduler"] = _read_json(folder / "scheduler" / f"{prediction_type}.json")
    configs["tokenizer"] = folder / "tokenizer"
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


def build_parts(configs: Mapping[str, Any], device: str = "meta") -> dict[str, nn.Module]:
    """UNet, VAE and text encoder of these configs; without weights on the meta device, else with random ones."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        return {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
        }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except UnreadableFile as e:
        raise BaseModelError(f"base: can't read {path} ({e}); the file is damaged or incomplete, fetch it again") from e


def _from_folder(folder: Path, prediction_type: str | None) -> BaseModel:
    configs = read_configs(folder)
    states = {}
    for part in PARTS:
        files = sorted((folder / part).glob("*.safetensors"))
        exact = [f for f in files if f.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
        shards = [f for f in files if "-of-" in f.name]
        chosen = exact or shards or files[:1]
        if not chosen:
            raise BaseModelError(f"base: {folder / part} holds no .safetensors weights; FaR never unpickles .bin files")
        states[part] = unscale({k: v for f in chosen for k, v in _read(f).items()}, f"{folder.name}, {part}")
    states["text_encoder"] = strip_text_model(states["text_encoder"])
    _check_family(states["unet"], folder.name, configs)
    declared = configs["scheduler"].get("prediction_type", "epsilon")
    if prediction_type and prediction_type != declared:
        raise BaseModelError(
            f"prediction_type: {prediction_type} was asked for but {folder.name}/scheduler says {declared}; "
            "leave it unset"
        )
    _check_prediction_type(declared, _measured_prediction_type(states["unet"]), folder.name)
    return _assemble(configs, states, folder.name, declared)


def _from_state_dict(
    state: Mapping[str, Tensor], where: str, config: str | Path | Mapping[str, Any] | None, prediction_type: str | None
) -> BaseModel:
    if isinstance(config, (str, Path)):
        config = read_configs(Path(config))
    shapes = config or packaged_configs("v_prediction")
    _check_family(state, where, shapes)
    check_whole(state, where)
    states, unknown = ldm_to_diffusers(unscale(state, where), shapes)
    _report_unused(unknown, where)
    # Trainers of merges leave these names in the file, as ComfyUI reads them.
    measured = "v_prediction" if "v_pred" in state else _measured_prediction_type(states["unet"])
    if "ztsnr" in state:
        log.warning(
            "%s was trained with zero terminal SNR; FaR trains on Stable Diffusion's own noise schedule.", where
        )
    _check_prediction_type(prediction_type, measured, where)
    chosen = prediction_type or measured or shapes["scheduler"].get("prediction_type", "epsilon")
    return _assemble(config or packaged_configs(chosen), states, where, chosen)


def _check_prediction_type(stated: str | None, measured: str | None, where: str) -> None:
    if stated and measured and stated != measured:
        raise BaseModelError(
            f"prediction_type: {stated} is stated but {where} looks like {measured} "
            "(by its v_pred marker, or the spread of the last block's norm1 bias); use the right one, or another file"
        )


def _check_family(unet: Mapping[str, Tensor], where: str, configs: Mapping[str, Any]) -> None:
    """Tell a file of another family by the width of its text context, before a list of wrong shapes does."""
    keys = [k for k in unet if k.endswith("attn2.to_k.weight")]
    if not keys:
        raise BaseModelError(
            f"base: {where} holds no Stable Diffusion UNet; give a whole SD 2.1 checkpoint, not a LoRA"
        )
    width, expected = unet[keys[0]].shape[-1], configs["unet"]["cross_attention_dim"]
    if width != expected:
        what = FOREIGN.get(width, f"a model of text width {width}")
        raise BaseModelError(f"base: {where} is {what}, FaR needs Stable Diffusion 2.1 (text width {expected})")


def _assemble(
    configs: Mapping[str, Any], states: Mapping[str, Mapping[str, Tensor]], where: str, prediction_type: str
) -> BaseModel:
    parts = build_parts(configs)
    for part, module in parts.items():
        _fill(module, states[part], f"{where}, {part}")
    unet = parts["unet"]
    return BaseModel(
        family="sd21",
        unet=unet,
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=load_tokenizer(configs["tokenizer"]),
        scheduler={**configs["scheduler"], "prediction_type": prediction_type, "clip_sample": False},
        prediction_type=prediction_type,
        native_size=unet.config.sample_size * 2 ** (len(parts["vae"].config.block_out_channels) - 1),
        digest=kv_digest(kv_weights(unet)),
    )


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put the weights in; a key that is missing or of another shape would otherwise stay random without a word."""
    expected = module.state_dict()
    if any(k.startswith("text_model.") for k in expected):  # transformers before 5.6 nests the text model once more
        state = {f"text_model.{k}": v for k, v in state.items()}
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


def _measured_prediction_type(unet: Mapping[str, Tensor]) -> str | None:
    bias = unet.get(V_STATISTIC)
    if bias is None or bias.numel() != 320:
        return None
    return "v_prediction" if float(bias.float().std(unbiased=False)) > V_THRESHOLD else "epsilon"


def load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
