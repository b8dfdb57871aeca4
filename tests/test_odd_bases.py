"""Base files in forms that people have and FaR must not misread: scaled fp8, whole numbers, parts of a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from far_train.mini.tiny import random_states, single_file_state, tiny_configs, write_folder
from far_train.models.loading import load_base
from far_train.utils.errors import BaseModelError

KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
OURS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def configs():
    return tiny_configs()


@pytest.fixture(scope="module")
def whole(configs):
    return single_file_state(configs, random_states(configs))


def scaled(weight: torch.Tensor, scale: torch.Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (weight / scale).to(kind)


@pytest.mark.parametrize("name", [f"{KEY}.scale_weight", f"{KEY}.weight_scale", f"{KEY}.weight.scale_weight"])
@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale for each row"])
def test_scaled_fp8_is_multiplied_out(whole, configs, tmp_path: Path, name: str, rows: bool, caplog):
    weight = whole[f"{KEY}.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 448 if rows else weight.abs().max() / 448
    small = scaled(weight, scale)
    extras = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), f"{KEY}.scale_input": torch.ones(())}
    save_file({**whole, f"{KEY}.weight": small, name: scale, **extras}, tmp_path / "fp8.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_base(tmp_path / "fp8.safetensors", config=configs).unet.get_parameter(OURS)
    assert torch.equal(loaded, small.float() * scale)
    assert float((loaded - weight).abs().max() / weight.abs().max()) < 0.04  # what fp8 itself loses
    assert not caplog.messages


def test_scaled_fp8_in_a_folder(configs, tmp_path: Path):
    states = random_states(configs)
    weight, scale = states["unet"][OURS], torch.tensor(0.001)
    states["unet"][OURS] = scaled(weight, scale)
    states["unet"][OURS.replace(".weight", ".scale_weight")] = scale
    loaded = load_base(write_folder(tmp_path, configs, states)).unet.get_parameter(OURS)
    assert torch.equal(loaded, states["unet"][OURS].float() * scale)


def test_plain_fp8_needs_no_scale(whole, configs):
    small = whole[f"{KEY}.weight"].to(torch.float8_e5m2)
    loaded = load_base({**whole, f"{KEY}.weight": small}, config=configs).unet.get_parameter(OURS)
    assert torch.equal(loaded, small.float())


def quant(**about: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{KEY}.weight": torch.ones(32, 32, dtype=torch.int8)}, r"to_k\.weight holds whole numbers \(int8\)"),
        ({f"{KEY}.weight.absmax": torch.ones(4)}, r"form that FaR doesn't read \(.*to_k\.weight\.absmax\)"),
        ({f"{KEY}.weight_scale_inv": torch.ones(1)}, "weight_scale_inv"),
        (
            {f"{KEY}.weight_scale": torch.ones(32, 2)},
            r"is \[32, 2\] for a weight of \[32, 32\], in blocks",
        ),
        ({f"{KEY}.comfy_quant": quant(format="nvfp4")}, "quantised as nvfp4"),
        ({f"{KEY}.comfy_quant": quant(kind="nvfp4")}, "quantised as an unknown form"),
        ({"model.diffusion_model.nowhere.scale_weight": torch.ones(())}, "the scale of a weight that isn't there"),
    ],
)
def test_other_quantised_files_are_refused(whole, configs, changes: dict, words: str):
    with pytest.raises(BaseModelError, match=words + ".*give the model in fp16, bf16 or fp32"):
        load_base({**whole, **changes}, config=configs)


def test_names_that_are_known_nowhere_are_reported(whole, configs, tiny_folder: Path, tmp_path: Path, caplog):
    """Also those below a known module, whose names would otherwise be translated and then fall away."""
    with caplog.at_level(logging.WARNING):
        load_base({**whole, f"{KEY}.extra": torch.ones(1), "control_model.x": torch.ones(1)}, config=configs)
    assert [m.partition("holds")[2] for m in caplog.messages] == [
        " 1 tensors that FaR doesn't use, such as control_model.x.",
        f" 1 tensors that FaR doesn't use, such as {OURS.replace('weight', 'extra')}.",
    ]


def below(prefix: str, state: dict) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda w: below("model.", w), "is a UNet alone: it holds no VAE and no text encoder"),
        (lambda w: below("model.diffusion_model.", w), "is a UNet alone: it holds no VAE and no text encoder"),
        (
            lambda w: {k: v for k, v in w.items() if k.startswith("model.diffusion_model.")},
            "is a UNet alone: it holds no VAE and no text encoder",
        ),
        (
            lambda w: {k: v for k, v in w.items() if not k.startswith("first_stage_model.")},
            "is no whole model: it holds no VAE",
        ),
    ],
    ids=["diffusion_model.", "bare names", "whole names", "no VAE"],
)
def test_a_part_of_a_model_is_called_so(whole, configs, tmp_path: Path, part, words: str):
    save_file(part(whole), tmp_path / "part.safetensors")
    with pytest.raises(BaseModelError, match=f"part.safetensors {words}; give the whole checkpoint"):
        load_base(tmp_path / "part.safetensors", config=configs)


def test_a_vae_or_a_text_encoder_is_no_base(whole, configs):
    for prefix in ("first_stage_model.", "cond_stage_model.model."):
        with pytest.raises(BaseModelError, match="holds no Stable Diffusion UNet; give a whole"):
            load_base(below(prefix, whole), config=configs)
