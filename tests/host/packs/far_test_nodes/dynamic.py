"""Test-only nodes: models that the host loads dynamically, as it does on CUDA since 2026, and quantised ones.

The loader, the layers and the patcher are the host's own; only the GPU is missing, so weights never leave the CPU.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import save_file

from .probes import far
from .tiny import randomize, unet_config

CPU = torch.device("cpu")
LAYER = "middle_block.1.transformer_blocks.0.attn2.to_k"
KEY = f"diffusion_model.{LAYER}.weight"  # large enough to be loaded when it is used
BIAS = "diffusion_model.out.0.bias"  # so small that it is loaded, with its patch, before


def prepare_dynamic_loading() -> bool:
    """Whether this host can load models dynamically: it is new enough, and its library is there for this system."""
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        return False
    import comfy_aimdo.control
    import comfy_aimdo.host_buffer

    loaded = comfy_aimdo.control.init("cuda")
    importlib.reload(comfy_aimdo.host_buffer)  # it takes the library that is there when it is imported
    return bool(loaded)


@contextmanager
def dynamic_loading() -> Iterator[type]:
    """What the host's main.py switches on where there is CUDA; yields the class of patchers."""
    import comfy.memory_management  # which older hosts have not

    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        """Stays dynamic on the CPU, for which the host's own makes a plain patcher."""

        def __new__(cls, *_: Any, **__: Any) -> Any:
            return object.__new__(cls)

    comfy.model_patcher.CoreModelPatcher, comfy.memory_management.aimdo_enabled = Dynamic, True
    try:
        yield Dynamic
    finally:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
        comfy.memory_management.aimdo_enabled = False


def thin_unet() -> dict[str, torch.Tensor]:
    """Weights in fp16 of a Stable Diffusion 2.x UNet of one level, which the host's loader recognises."""
    levels = {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}
    shape = unet_config(1) | {"model_channels": 320, "context_dim": 1024, **levels}
    config = comfy.supported_models.SD20(shape)
    config.set_inference_dtype(torch.float32, None)
    unet = comfy.model_base.BaseModel(config, device=CPU).diffusion_model
    randomize(unet, 3)
    return {f"diffusion_model.{k}": v.detach().half() for k, v in unet.state_dict().items()}


def file_in(form: str, unet: dict[str, torch.Tensor]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of ``unet`` with one layer in ``form``, or all that are large in fp8; and its weights in fp32."""
    state = dict(unet)
    if form == "fp8":
        state = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in state.items()}
    weights = {k: v.float() for k, v in state.items()}
    if form == "scaled_fp8":  # by the names of 2025
        scale = weights[KEY].abs().max() / 448
        state[KEY] = (weights[KEY] / scale).to(torch.float8_e4m3fn)
        state |= {
            f"diffusion_model.{LAYER}.scale_weight": scale,
            "diffusion_model.scaled_fp8": state[KEY][0, :2].clone(),
        }
        weights[KEY] = state[KEY].float() * scale
    elif form not in ("fp16", "fp8"):
        layout = comfy.quant_ops.QUANT_ALGOS[form]["comfy_tensor_layout"]
        packed = comfy.quant_ops.QuantizedTensor.from_float(weights[KEY], layout)
        note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
        state |= packed.state_dict(KEY) | {f"diffusion_model.{LAYER}.comfy_quant": note}
        weights[KEY] = packed.dequantize()
    path = Path(folder_paths.get_temp_directory()) / f"thin-{form}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"model.{k}": v.contiguous() for k, v in state.items()}, path)
    return path, weights


def worst(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference in units of its tensor's largest value; infinite if there are other tensors."""
    if read.keys() != expected.keys():
        return float("inf")
    return max(float((read[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


def errors(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """How wrong the pack reads what the host's loader makes of a file, and how much the patches change of it."""
    read, patch = far("nodes.host_state").read_weights, far("nodes.host_models").patch_model
    weights, prefix = far("far_train.models.weights"), "diffusion_model."
    about = {"family": "sd21", "base_digest": "", "prediction_type": "epsilon", "nouns": {}, "steps": 1, "size": 64}
    delta = torch.full(expected[KEY].shape, 0.5)
    changed = expected | {KEY: expected[KEY] + delta, BIAS: expected[BIAS] + 0.25}

    model, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)
    patched = patch(model, weights.FarWeights({}, {LAYER: delta.half()}, weights.Provenance(**about)), 1.0)
    patched.add_patches({BIAS: ("diff", (torch.full(expected[BIAS].shape, 0.25),))}, 1.0)
    before = read(patched, prefix)
    patched.partially_load(CPU, 1e12)
    return {
        "patched": worst(before, changed),
        "patched and loaded": worst(read(patched, prefix), changed),
        "plain, while patches are loaded": worst(read(model, prefix), expected),
        "changed": worst(before, expected),
    }


class Forms(io.ComfyNode):
    """How wrong the pack reads models in each form that this host has, loaded plainly and dynamically."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FaRTest_Forms", category="FaR/test", inputs=[], is_output_node=True)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        ways = {"plain": nullcontext} | ({"dynamic": dynamic_loading} if prepare_dynamic_loading() else {})
        forms = {"int8_tensorwise", "nvfp4"} & comfy.quant_ops.QUANT_ALGOS.keys()
        found: dict[str, dict[str, dict[str, float]]] = {way: {} for way in ways}
        unet = thin_unet()
        for form in ("fp16", "fp8", "scaled_fp8", *forms):
            path, expected = file_in(form, unet)
            for way, loading in ways.items():
                with loading():
                    found[way][form] = errors(path, expected)
            path.unlink()
        return io.NodeOutput(ui={"text": (json.dumps(found),)})


class DynamicBase(io.ComfyNode):
    """Whether the small base is the same base where the host loads dynamically, before and while it is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FaRTest_DynamicBase", category="FaR/test", inputs=[], is_output_node=True)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        if not prepare_dynamic_loading():
            return io.NodeOutput(ui={"text": ("none",)})
        models, make = far("nodes.host_models"), far("nodes.host_base").as_host_models
        base = far("far_train.mini.shipped").small_base()
        model, clip, vae = make(base)
        expected = [models.identify_base(model, clip, vae).fingerprint, encode(clip)]
        with dynamic_loading() as patcher:
            # On CUDA, CLIP isn't loaded while it is made; on the CPU a plain patcher is, which has no part in it.
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
            model, clip, vae = make(base)
            model = patcher(model.model, CPU, CPU)
            clip.patcher, vae.patcher = (patcher(m, CPU, CPU) for m in (clip.cond_stage_model, vae.first_stage_model))
            found = [models.identify_base(model, clip, vae).fingerprint, encode(clip)]
            for part in (model, clip.patcher, vae.patcher):
                part.partially_load(CPU)
            with torch.inference_mode(False):
                found.append(models.read_base(model, clip, vae).fingerprint)
        same = [a == b for a, b in zip(found, [*expected, expected[0]], strict=True)]
        return io.NodeOutput(ui={"text": (json.dumps(same),)})


def encode(clip: comfy.sd.CLIP) -> list:
    return clip.encode_from_tokens(clip.tokenize("a photo of a red cat")).tolist()


class OtherTensors(io.ComfyNode):
    """MODEL with the weights of one layer as a tensor class of another pack, or as whole numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model"), io.Combo.Input("form", options=["class", "int8"])]
        return io.Schema(
            node_id="FaRTest_OtherTensors", category="FaR/test", inputs=inputs, outputs=[io.Model.Output()]
        )

    @classmethod
    def execute(cls, model, form: str) -> io.NodeOutput:
        class PackedTensor(torch.Tensor):
            pass

        layer = model.model.diffusion_model.get_submodule(LAYER)
        weight = torch.ones(layer.weight.shape)
        weight = weight.as_subclass(PackedTensor) if form == "class" else weight.to(torch.int8)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return io.NodeOutput(model)


NODES: list[type[io.ComfyNode]] = [Forms, DynamicBase, OtherTensors]
