"""Bases in whatever form the host holds them: read right, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node, tiny_base
from .test_training import run_folder, training


def test_models_of_the_hosts_loader_are_read_right(comfy: ComfyServer):
    """In half precision, fp8, scaled fp8, int8 and fp4; with patches; loaded as on CUDA."""
    ways = json.loads(comfy.run({"1": node("FaRTest_Forms")})["1"]["text"][0])
    assert {"fp16", "fp8", "scaled_fp8", "nvfp4"} <= ways["plain"].keys()
    for way, forms in ways.items():
        for form, errors in forms.items():
            assert errors.pop("changed") > 0.1
            assert max(errors.values()) < 1e-3, f"{form}, {way}: {errors}"


def test_the_small_base_is_the_same_where_models_are_loaded_dynamically(comfy: ComfyServer):
    found = comfy.run({"1": node("FaRTest_DynamicBase")})["1"]["text"][0]
    if found == "none":
        pytest.skip("this host has no dynamic loading")
    assert json.loads(found) == [True, True, True]


@pytest.mark.parametrize(("form", "told"), [("class", "is a PackedTensor of another pack"), ("int8", "whole numbers")])
def test_forms_that_are_not_read_are_refused(comfy: ComfyServer, form: str, told: str):
    """A seed of its own: the layer is exchanged for good."""
    prompt = training(comfy, "other-tensors", model=["8", 0])
    prompt |= {"1": tiny_base(weights_seed=9), "8": node("FaRTest_OtherTensors", model=["1", 0], form=form)}
    with pytest.raises(ExecutionFailed, match=f"node 4 .FaR_Train.*{told}.*fp16, bf16 or fp32"):
        comfy.run(prompt)


def test_a_lora_that_is_not_in_the_weights_is_refused(comfy: ComfyServer):
    if "LoraLoaderBypass" not in comfy.object_info():
        pytest.skip("this host has no LoRAs in bypass mode")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    halves = {"lora_up.weight": torch.ones(128, 4), "lora_down.weight": torch.ones(4, 64)}
    path = comfy.folder("models/loras") / "bypass.safetensors"
    save_file({f"{layer}.{name}": half for name, half in halves.items()}, path)
    prompt = training(comfy, "bypass", model=["8", 0], clip=["8", 1])
    prompt["8"] = node("LoraLoaderBypass", model=["1", 0], clip=["1", 1], lora_name=path.name, strength_model=1.0,
                       strength_clip=1.0)  # fmt: skip
    with pytest.raises(ExecutionFailed, match="node 4 .FaR_Train.*MODEL is changed by bypass_lora, not in its weights"):
        comfy.run(prompt)
    assert not run_folder(comfy, "bypass").exists()
