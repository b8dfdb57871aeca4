"""Weight names both ways, and the shipped SD 2.1 configs and tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

import far_train
from far_train.models import keys
from far_train.models.families import SD21
from far_train.utils.errors import BaseModelError

CONFIGS = Path(far_train.__file__).parent / "configs" / "sd21"
OPENCLIP_PREFIX = SD21.text_encoders[0].prefixes[0]
PREFIX = {"unet": keys.UNET_PREFIX, "vae": keys.VAE_PREFIX, "text_encoder": OPENCLIP_PREFIX}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def tiny_configs(down, up, layers=1, transformer_layers=1, linear=True, vae_levels=2, vae_layers=1, text_layers=2):
    return {
        "unet": {
            "block_out_channels": [8] + [16] * (len(down) - 1),
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": layers,
            "transformer_layers_per_block": transformer_layers,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "sample_size": 8,
            "use_linear_projection": linear,
        },
        "vae": {
            "block_out_channels": [8, 16, 16, 16][:vae_levels],
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
            "layers_per_block": vae_layers,
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        "text_encoder": {
            "vocab_size": 50,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 2,
            "projection_dim": 8,
            "hidden_act": "gelu",
        },
    }


SHAPES = {
    "one level": tiny_configs([CROSS_DOWN], [CROSS_UP], vae_levels=1, text_layers=1),
    "two levels": tiny_configs([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP], vae_levels=3),
    "sd shaped": tiny_configs(
        [CROSS_DOWN] * 3 + ["DownBlock2D"], ["UpBlock2D"] + [CROSS_UP] * 3, 2, vae_levels=4, vae_layers=2, text_layers=3
    ),
    "sdxl shaped": tiny_configs(
        ["DownBlock2D", CROSS_DOWN, CROSS_DOWN], [CROSS_UP, CROSS_UP, "UpBlock2D"], 2, [1, 2, 3]
    ),
    "convolutions": tiny_configs([CROSS_DOWN, CROSS_DOWN], [CROSS_UP, CROSS_UP], 3, 2, linear=False, text_layers=12),
}


def state_dicts(configs) -> dict[str, dict[str, torch.Tensor]]:
    models = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    }
    parts = {part: model.state_dict() for part, model in models.items()}
    parts["text_encoder"] = keys.strip_text_model(parts["text_encoder"])
    parts["text_encoder"].pop("embeddings.position_ids", None)
    for part in parts.values():
        for tensor in part.values():
            if not tensor.is_meta:
                tensor.normal_()  # biases and norms start out equal, which would hide an exchange
    return parts


def random_parts(configs) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    with torch.no_grad():
        return state_dicts(configs)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def configs(request):
    return request.param


@pytest.fixture(scope="module")
def sd21():
    """(configs, state dicts on the meta device) of SD 2.1."""
    configs = {part: json.loads((CONFIGS / part / "config.json").read_text()) for part in PREFIX}
    with torch.device("meta"):
        return configs, state_dicts(configs)


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_there_and_back(configs):
    parts = random_parts(configs)
    back, unplaced = keys.ldm_to_diffusers(keys.diffusers_to_ldm(parts, configs, SD21), configs, SD21)
    assert unplaced == []
    for part in PREFIX:
        assert_same(parts[part], back[part])


def test_agrees_with_diffusers(configs):
    ldm = keys.diffusers_to_ldm(random_parts(configs), configs, SD21, unused_text_layers=False)
    ours, _ = keys.ldm_to_diffusers(ldm, configs, SD21)
    assert_same(ours["unet"], convert_ldm_unet_checkpoint(dict(ldm), configs["unet"]))
    assert_same(ours["vae"], convert_ldm_vae_checkpoint(dict(ldm), configs["vae"]))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=configs["text_encoder"]["hidden_size"]))
    theirs = keys.strip_text_model(convert_open_clip_checkpoint(model, dict(ldm)))
    assert_same(ours["text_encoder"], theirs)


def test_an_exchange_of_two_names_is_seen(configs):
    ldm = keys.diffusers_to_ldm(random_parts(configs), configs, SD21, unused_text_layers=False)
    first, second = (f"{keys.UNET_PREFIX}middle_block.{index}.in_layers.2.weight" for index in (0, 2))
    theirs = convert_ldm_unet_checkpoint(dict(ldm), configs["unet"])
    ldm[first], ldm[second] = ldm[second], ldm[first]
    with pytest.raises(AssertionError, match="mid_block.resnets"):
        assert_same(keys.ldm_to_diffusers(ldm, configs, SD21)[0]["unet"], theirs)


def test_tables_are_one_to_one(configs):
    for table in (
        keys.unet_table(configs["unet"]),
        keys.vae_table(configs["vae"]),
        keys.text_table(configs["text_encoder"]),
    ):
        assert len(set(table.values())) == len(table)


def test_layers_per_block_as_list_mirrors_going_up():
    configs = tiny_configs([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP], [1, 2])
    parts = random_parts(configs)
    back, unplaced = keys.ldm_to_diffusers(keys.diffusers_to_ldm(parts, configs, SD21), configs, SD21)
    assert unplaced == []
    assert_same(parts["unet"], back["unet"])
    table = keys.unet_table(configs["unet"])
    assert table["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert table["up_blocks.1.attentions.1"] == "output_blocks.4.1"


def test_unused_text_layers_is_a_copy_and_is_dropped_on_reading():
    configs = SHAPES["one level"]
    parts = random_parts(configs)
    ldm = keys.diffusers_to_ldm(parts, configs, SD21)
    last, extra = (f"{OPENCLIP_PREFIX}transformer.resblocks.{index}." for index in (0, 1))
    copies = {name: tensor for name, tensor in ldm.items() if name.startswith(extra)}
    assert len(copies) == 12
    for name, tensor in copies.items():
        original = ldm[last + name.removeprefix(extra)]
        assert torch.equal(tensor, original) and tensor.data_ptr() != original.data_ptr()
    assert not any(
        name.startswith(extra) for name in keys.diffusers_to_ldm(parts, configs, SD21, unused_text_layers=False)
    )
    back, unplaced = keys.ldm_to_diffusers(ldm, configs, SD21)
    assert unplaced == [] and set(back["text_encoder"]) == set(parts["text_encoder"])


def test_layouts_prefixes_and_extras_of_real_files():
    configs = SHAPES["two levels"]
    parts = random_parts(configs)
    ldm = keys.diffusers_to_ldm(parts, configs, SD21)
    nothing = torch.zeros(1)
    harmless = [
        "model_ema.diffusion_modelinput_blocks00weight", "betas", "alphas_cumprod", "posterior_mean_coef2", "v_pred",
        "sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod", "first_stage_model.loss.logvar",
        "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.attn_mask", "cond_stage_model.transformer.text_model.embeddings.position_ids",
    ]  # fmt: skip
    strange = ["control_model.x", "first_stage_model.other", "model.diffusion_model.label_emb.0.0.weight"]
    back, unplaced = keys.ldm_to_diffusers(ldm | dict.fromkeys(harmless + strange, nothing), configs, SD21)
    assert unplaced == sorted(strange)
    for part in PREFIX:
        assert_same(parts[part], back[part])

    without_text = {name: tensor for name, tensor in ldm.items() if not name.startswith(OPENCLIP_PREFIX)}
    layer_beyond = {"encoder.layers.2.layer_norm1.weight": nothing}
    for prefix in ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."):
        text = {prefix + name: tensor for name, tensor in (parts["text_encoder"] | layer_beyond).items()}
        back, unplaced = keys.ldm_to_diffusers(without_text | text, configs, SD21)
        assert unplaced == []
        assert_same(parts["text_encoder"], back["text_encoder"])

    sgm = {name.replace(OPENCLIP_PREFIX, "conditioner.embedders.0.model."): t for name, t in ldm.items()}
    assert_same(parts["text_encoder"], keys.ldm_to_diffusers(sgm, configs, SD21)[0]["text_encoder"])


def test_text_model_prefix_is_accepted_on_writing():
    configs = SHAPES["one level"]
    parts = random_parts(configs)
    expected = keys.diffusers_to_ldm(parts, configs, SD21)
    parts["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in parts["text_encoder"].items()}
    parts["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)
    assert_same(expected, keys.diffusers_to_ldm(parts, configs, SD21))


def test_errors_name_the_weight():
    configs = SHAPES["one level"]
    parts = random_parts(configs)
    ldm = keys.diffusers_to_ldm(parts, configs, SD21)
    with pytest.raises(BaseModelError, match="input_blocks.9"):
        keys.unet_from_ldm("input_blocks.9.1.proj_in", configs["unet"])
    with pytest.raises(BaseModelError, match="AttnDownBlock2D"):
        keys.unet_table(configs["unet"] | {"down_block_types": ["AttnDownBlock2D"]})
    with pytest.raises(BaseModelError, match="equally many"):
        keys.unet_table(configs["unet"] | {"down_block_types": ["DownBlock2D"] * 2})
    with pytest.raises(BaseModelError, match="mid_block_type"):
        keys.unet_table(configs["unet"] | {"mid_block_type": None})
    with pytest.raises(BaseModelError, match="block_out_channels is missing"):
        keys.vae_table({})
    with pytest.raises(BaseModelError, match="lora_A"):
        keys.diffusers_to_ldm(parts | {"unet": {"lora_A.weight": torch.zeros(1)}}, configs, SD21)
    with pytest.raises(BaseModelError, match="twice"):
        twice = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
        keys.ldm_to_diffusers(ldm | {twice: torch.zeros(8)}, configs, SD21)
    with pytest.raises(BaseModelError, match="in_proj_weight"):
        broken = f"{OPENCLIP_PREFIX}transformer.resblocks.0.attn.in_proj_weight"
        keys.ldm_to_diffusers(ldm | {broken: torch.zeros(8, 8)}, configs, SD21)
    with pytest.raises(BaseModelError, match="attn.k.bias"):
        del parts["text_encoder"]["encoder.layers.0.self_attn.k_proj.bias"]
        keys.diffusers_to_ldm(parts, configs, SD21)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v",
            "input_blocks.8.1.transformer_blocks.0.attn2.to_v",
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "middle_block.1.transformer_blocks.0.attn2.to_k"),
        (
            "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "output_blocks.3.1.transformer_blocks.0.attn2.to_k",
        ),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
            "output_blocks.11.1.transformer_blocks.0.norm1.bias",
        ),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.0.resnets.0.norm1.weight", "output_blocks.0.0.in_layers.0.weight"),
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
    ],
)
def test_known_names_of_sd21(sd21, ours, theirs):
    config = sd21[0]["unet"]
    assert keys.unet_to_ldm(ours, config) == theirs
    assert keys.unet_from_ldm(theirs, config) == ours


def test_known_names_of_the_other_parts(sd21):
    configs, parts = sd21
    ldm = keys.diffusers_to_ldm(parts, configs, SD21)
    for name, shape in {
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.23.mlp.c_proj.weight": (1024, 4096),
    }.items():
        assert tuple(ldm[name].shape) == shape, name
    assert "cond_stage_model.model.transformer.resblocks.24.ln_1.weight" not in ldm


def test_every_weight_of_sd21_has_the_place_that_diffusers_gives_it(sd21):
    configs, parts = sd21
    ldm = keys.diffusers_to_ldm(parts, configs, SD21)
    assert len(ldm) == 686 + 248 + 24 * 12 + 4
    # Real shapes with one number per name, expanded from a single element, so that 5 GB of weights take no memory.
    ldm = {name: torch.tensor(float(number)).expand(t.shape) for number, (name, t) in enumerate(ldm.items())}
    back, unplaced = keys.ldm_to_diffusers(ldm, configs, SD21)
    assert unplaced == []
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=1024))
    theirs = {
        "unet": convert_ldm_unet_checkpoint(dict(ldm), configs["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(ldm), configs["vae"]),
        "text_encoder": keys.strip_text_model(convert_open_clip_checkpoint(model, dict(ldm))),
    }
    for part in PREFIX:
        assert set(back[part]) == set(parts[part]) == set(theirs[part])
        for name, tensor in back[part].items():
            assert tensor.shape == parts[part][name].shape == theirs[part][name].shape
            index = (0,) * tensor.ndim
            assert tensor[index] == theirs[part][name][index], name


def test_sd21_sizes(sd21):
    _, parts = sd21
    count = {part: sum(t.numel() for t in state_dict.values()) for part, state_dict in parts.items()}
    assert count == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
    ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
    kv = [tuple(tensor.shape) for name, tensor in parts["unet"].items() if name.endswith(ends)]
    assert {shape: kv.count(shape) for shape in kv} == {(320, 1024): 10, (640, 1024): 10, (1280, 1024): 12}
    assert sum(map(math.prod, kv)) == 25_559_040
