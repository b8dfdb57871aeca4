"""Weight names of SD 1.5 and SDXL: there and back, and as diffusers' own converters have them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from far_train.mini.tiny import random_states, single_file_state, tiny_configs
from far_train.models import keys
from far_train.models.families import SD15, SD21, SDXL, Family
from far_train.models.loading import build_parts, load_base, packaged_configs
from far_train.utils.errors import BaseModelError

State = dict[str, Tensor]
UNET = keys.UNET_PREFIX
BIG_G = SDXL.text_encoders[1].prefixes[0]


def distinct(family: Family) -> tuple[dict[str, Any], dict[str, State]]:
    """Configs and random states of a tiny base, in which no two tensors are equal.

    Of SDXL's projection one side is shorter than the other, so that its transposition shows in its shape, too.
    """
    configs = tiny_configs(family=family)
    if family is SDXL:
        configs["text_encoder_2"]["projection_dim"] = 40
        configs["unet"]["projection_class_embeddings_input_dim"] += 40 - 48
    states = random_states(configs, family=family)
    generator = torch.Generator().manual_seed(0)
    for part, state in states.items():
        states[part] = {k: torch.randn(v.shape, generator=generator) for k, v in keys.strip_text_model(state).items()}
    return configs, states


def assert_same(ours: State, theirs: State) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def as_diffusers_has_it(ldm: State, configs: dict[str, Any], family: Family) -> dict[str, State]:
    """A single file's parts by diffusers' converters."""
    parts = {
        "unet": convert_ldm_unet_checkpoint(dict(ldm), configs["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(ldm), configs["vae"]),
    }
    for spec in family.text_encoders:
        if spec.checkpoint_layout == "hf":
            text = convert_ldm_clip_checkpoint(dict(ldm), remove_prefix=spec.prefixes[0])
            text = {k: v for k, v in text.items() if k.startswith("text_model.")}
        else:
            sizes = SimpleNamespace(
                hidden_size=configs[spec.part]["hidden_size"], projection_dim=configs[spec.part]["projection_dim"]
            )
            text = convert_open_clip_checkpoint(SimpleNamespace(config=sizes), dict(ldm), prefix=spec.prefixes[0])
        parts[spec.part] = keys.strip_text_model(text)
    return parts


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda f: f.key)
def test_there_and_back_and_as_diffusers_has_it(family: Family):
    configs, states = distinct(family)
    ldm = single_file_state(configs, states, family)
    back, unplaced = keys.ldm_to_diffusers(ldm, configs, family)
    theirs = as_diffusers_has_it(ldm, configs, family)
    assert unplaced == [] and back.keys() == states.keys()
    for part in family.parts:
        assert_same(states[part], back[part])
        assert_same(back[part], theirs[part])


def test_an_exchange_of_two_of_sdxls_layers_is_seen():
    configs, states = distinct(SDXL)
    ldm = single_file_state(configs, states, SDXL)
    theirs = as_diffusers_has_it(ldm, configs, SDXL)
    for first, second in (
        (f"{BIG_G}transformer.resblocks.0.ln_1.weight", f"{BIG_G}transformer.resblocks.1.ln_1.weight"),
        (
            f"{UNET}middle_block.1.transformer_blocks.1.norm1.bias",
            f"{UNET}middle_block.1.transformer_blocks.2.norm1.bias",
        ),
    ):
        swapped = ldm | {first: ldm[second], second: ldm[first]}
        back, _ = keys.ldm_to_diffusers(swapped, configs, SDXL)
        part = "text_encoder_2" if first.startswith(BIG_G) else "unet"
        with pytest.raises(AssertionError, match="layers.0|transformer_blocks.1"):
            assert_same(back[part], theirs[part])


@pytest.mark.parametrize(
    ("family", "count"),
    # UNet, VAE, CLIP-L, bigG with its projection; real files also hold position_ids and logit_scale.
    [(SD15, 686 + 248 + 196), (SDXL, 1680 + 248 + 196 + 32 * 12 + 4 + 1)],
    ids=lambda f: getattr(f, "key", ""),
)
def test_every_weight_has_the_place_that_diffusers_gives_it(family: Family, count: int):
    configs = packaged_configs(family, "epsilon")
    states = {part: module.state_dict() for part, module in build_parts(family, configs).items()}
    ldm = single_file_state(configs, states, family)
    assert len(ldm) == count
    # Real shapes with one number per name, expanded from a single element, so that gigabytes take no memory.
    ldm = {name: torch.tensor(float(number)).expand(t.shape) for number, (name, t) in enumerate(ldm.items())}
    back, unplaced = keys.ldm_to_diffusers(ldm, configs, family)
    theirs = as_diffusers_has_it(ldm, configs, family)
    assert unplaced == []
    for part in family.parts:
        expected = keys.strip_text_model(states[part])
        assert set(back[part]) == set(theirs[part]) == set(expected) - {"embeddings.position_ids"}
        for name, tensor in back[part].items():
            assert tensor.shape == expected[name].shape == theirs[part][name].shape, name
            assert tensor[(0,) * tensor.ndim] == theirs[part][name][(0,) * tensor.ndim], name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("add_embedding.linear_2.bias", "label_emb.0.2.bias"),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn2", "input_blocks.4.1.transformer_blocks.1.attn2"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.attn1", "input_blocks.8.1.transformer_blocks.9.attn1"),
        ("mid_block.attentions.0.transformer_blocks.9.attn2.to_v", "middle_block.1.transformer_blocks.9.attn2.to_v"),
        ("up_blocks.0.attentions.1.transformer_blocks.5.attn2", "output_blocks.1.1.transformer_blocks.5.attn2"),
        ("up_blocks.1.attentions.2.proj_in.weight", "output_blocks.5.1.proj_in.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.2.resnets.2.conv1.weight", "output_blocks.8.0.in_layers.2.weight"),
    ],
)  # fmt: skip
def test_known_names_of_sdxl(ours: str, theirs: str):
    config = packaged_configs(SDXL, "epsilon")["unet"]
    assert keys.unet_to_ldm(ours, config) == theirs
    assert keys.unet_from_ldm(theirs, config) == ours


def with_harmless_extras(ldm: State, family: Family) -> State:
    """As children of the families have them: what trainers, mergers and ComfyUI left in their files."""
    nothing = torch.zeros(1)
    names = ["model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "alphas_cumprod", "denoiser.sigmas"]
    for spec in family.text_encoders:
        if spec.checkpoint_layout == "hf":
            text = ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale")
        else:
            text = ("logit_scale", "attn_mask", *(() if spec.pooled else ("text_projection",)))
        names += [spec.prefixes[0] + name for name in text]
    if family is SDXL:
        names.append("conditioner.embedders.0.logit_scale")
    return ldm | dict.fromkeys(names, nothing)


def test_harmless_extras_are_passed_over(family: Family, caplog: pytest.LogCaptureFixture):
    configs = tiny_configs(family=family)
    states = random_states(configs, family=family)
    ldm = with_harmless_extras(single_file_state(configs, states, family), family)
    with caplog.at_level(logging.INFO):
        base = load_base(ldm, config=configs)
    for part, state in states.items():
        assert_same(dict(base.parts[part].state_dict()), state)
    assert caplog.messages == ["the state dict also holds 2 averaged (EMA) weights; FaR trains on the others."]


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda f: f.key)
def test_clip_l_without_text_model_in_its_names(family: Family):
    configs, states = distinct(family)
    ldm = single_file_state(configs, states, family)
    prefix = family.text_encoders[0].prefixes[0]
    shorter = {k.replace(f"{prefix}text_model.", prefix): v for k, v in ldm.items()}
    assert shorter.keys() != ldm.keys()
    back, unplaced = keys.ldm_to_diffusers(shorter, configs, family)
    assert unplaced == []
    assert_same(back["text_encoder"], states["text_encoder"])


def test_a_projection_in_hugging_faces_layout_is_not_transposed():
    configs, states = distinct(SDXL)
    ldm = single_file_state(configs, states, SDXL)
    projection = ldm.pop(f"{BIG_G}text_projection")
    assert projection.shape == (48, 40)
    back, _ = keys.ldm_to_diffusers(ldm | {f"{BIG_G}text_projection.weight": projection.T}, configs, SDXL)
    assert_same(back["text_encoder_2"], states["text_encoder_2"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{UNET}label_emb.0.2.bias", "unet lacks 1 of .* such as add_embedding.linear_2.bias"),
        (f"{BIG_G}text_projection", "text_encoder_2 lacks 1 of .* such as text_projection.weight"),
        (f"{BIG_G}ln_final.bias", "text_encoder_2 lacks 1 of .* such as .*final_layer_norm.bias"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder lacks 1 of"),
        ("first_stage_model.quant_conv.bias", "vae lacks 1 of"),
    ],
)
def test_a_weight_that_sdxl_lacks_is_named(name: str, words: str):
    configs, states = distinct(SDXL)
    ldm = single_file_state(configs, states, SDXL)
    del ldm[name]
    with pytest.raises(BaseModelError, match=words):
        load_base(ldm, config=configs)


def test_a_file_without_its_second_encoder_is_called_so():
    configs, states = distinct(SDXL)
    ldm = {k: v for k, v in single_file_state(configs, states, SDXL).items() if not k.startswith(BIG_G)}
    with pytest.raises(BaseModelError, match="is no whole model: it holds no second text encoder"):
        load_base(ldm, config=configs)


def test_other_families_write_no_projection():
    configs = tiny_configs()
    states = random_states(configs)
    states["text_encoder"]["text_projection.weight"] = torch.zeros(32, 32)
    assert not [k for k in single_file_state(configs, states, SD21) if "projection" in k]
