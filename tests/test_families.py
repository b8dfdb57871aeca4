"""The families' table, and what the package ships for each: configs, schedules, tokenizers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTokenizerFast

from far_train.models.families import FAMILIES, SD15, SD21, SDXL, Family, detect
from far_train.models.loading import CONFIGS as SHIPPED
from far_train.models.loading import build_parts, packaged_configs
from far_train.utils.errors import BaseModelError

SHARED = SHIPPED / "shared"


PREFIX = "model.diffusion_model."
TO_K = f"{PREFIX}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
SIZES = {f"{PREFIX}label_emb.0.0.weight": torch.zeros(8, 8)}


def unet(width: int, linear: bool = True, sized: bool = False, channels: int = 4) -> dict[str, torch.Tensor]:
    """The weights by which a UNet is told, in LDM's names."""
    projection = torch.zeros(8, 8) if linear else torch.zeros(8, 8, 1, 1)
    weights = {TO_K: torch.zeros(8, width), f"{PREFIX}input_blocks.4.1.proj_in.weight": projection}
    first = {f"{PREFIX}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
    return first | weights | (SIZES if sized else {})


@pytest.mark.parametrize(
    ("family", "weights"),
    [(SD15, unet(768, linear=False)), (SD21, unet(1024)), (SDXL, unet(2048, sized=True))],
    ids=FAMILIES,
)
def test_a_family_is_told_by_its_unet(family: Family, weights: dict[str, torch.Tensor]):
    assert detect(weights, "file") is family
    small = {**weights, TO_K: torch.zeros(8, 40)}
    assert detect(small, "file", context_width=40) is family
    with pytest.raises(BaseModelError, match="file is a model of text width 40.*; FaR needs Stable Diffusion 1.5, "):
        detect(small, "file")


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (unet(768, linear=False, channels=9), "an inpainting model"),
        (unet(2048, sized=True, channels=9), "an inpainting model"),
        (unet(768, linear=False, channels=8), "an InstructPix2Pix model"),
        (unet(1024, channels=5), "a depth-to-image model"),
        (unet(1280, sized=True), "the SDXL refiner"),
        (unet(1024, sized=True), "an unCLIP model"),
        (unet(1024, linear=False), "a model of text width 1024"),
        (unet(2048, sized=True) | {"edm_mean": torch.zeros(1)}, r"Playground v2\.5"),
        (unet(2048, sized=True) | {"edm_vpred.sigma_max": torch.zeros(1)}, "CosXL"),
    ],
)
def test_other_unets_are_refused_by_name(weights: dict[str, torch.Tensor], name: str):
    with pytest.raises(BaseModelError, match=f"base: file is {name}.*; FaR needs .*{SDXL.title}"):
        detect(weights, "file")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"{PREFIX}joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3 or 3.5"),
        (f"{PREFIX}double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("transformer_blocks.0.norm1_context.linear.weight", "Stable Diffusion 3 or a Flux model"),
        ("net.llm_adapter.blocks.0.cross_attn.q_proj.weight", "Anima"),
        (f"{PREFIX}noise_refiner.0.attention.qkv.weight", "Z-Image or Lumina"),
        ("transformer_blocks.0.attn2.to_k.weight", "a diffusion transformer"),  # as PixArt's and Cosmos' in diffusers
    ],
)
def test_transformers_are_refused_by_name(key: str, name: str):
    with pytest.raises(BaseModelError, match=f"base: file is {name}; FaR needs"):
        detect({key: torch.zeros(8, 1024)}, "file")


def test_names_beside_a_unet_make_no_transformer_of_it():
    extra = {"blocks.0.weight": torch.zeros(1), "layers.0\n.weight": torch.zeros(1)}
    assert detect(unet(1024) | extra, "file") is SD21


def test_a_lora_of_a_transformer_is_called_no_model():
    with pytest.raises(BaseModelError, match="holds no Stable Diffusion UNet.*not a LoRA"):
        detect({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.zeros(8, 8)}, "file")


def test_the_table_agrees_with_the_packaged_configs(family: Family):
    configs = packaged_configs(family, family.default_prediction)
    assert configs["unet"]["cross_attention_dim"] == family.context_width
    assert configs["unet"].get("use_linear_projection", False) == family.linear_projections
    widths = [configs[spec.part]["hidden_size"] for spec in family.text_encoders]
    assert sum(widths) == family.context_width
    assert configs["scheduler"]["prediction_type"] == family.default_prediction
    for spec in family.text_encoders:
        assert configs[spec.part]["architectures"] == [f"CLIPTextModel{'WithProjection' if spec.pooled else ''}"]


# As published; the parameters of each part.
SIZES_OF_PARTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
# Native side in pixels, what latents are scaled with, and the id that fills up each encoder's prompts.
CONSTANTS = {"sd15": (512, 0.18215, [49407]), "sd21": (768, 0.18215, [0]), "sdxl": (1024, 0.13025, [49407, 0])}


def test_published_sizes_and_constants(family: Family, tokenizer: CLIPTokenizerFast):
    configs = packaged_configs(family, family.default_prediction)
    parts = build_parts(family, configs)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    assert counts == SIZES_OF_PARTS[family.key]
    side, scale, pads = CONSTANTS[family.key]
    assert configs["unet"]["sample_size"] * 8 == configs["vae"]["sample_size"] == side
    assert configs["vae"]["scaling_factor"] == scale
    assert [tokenizer.convert_tokens_to_ids(spec.pad_token) for spec in family.text_encoders] == pads


def test_variants_and_schedules(family: Family):
    folder = SHIPPED / family.configs
    variants = json.loads((folder / "variants.json").read_text())
    assert set(variants) == {path.stem for path in (SHARED / "scheduler").iterdir()} == {"v_prediction", "epsilon"}
    for prediction, changes in variants.items():
        config = json.loads((SHARED / "scheduler" / f"{prediction}.json").read_text())
        scheduler = DDIMScheduler.from_config(config)
        assert scheduler.config.prediction_type == prediction
        assert not scheduler.config.clip_sample and scheduler.config.steps_offset == 1
        # Stable Diffusion's schedule ends at a signal of 0.0047, not at zero.
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)
        assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
        for part, fields in changes.items():
            assert fields.keys() <= json.loads((folder / part / "config.json").read_text()).keys()
    defaults = {part: json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae")}
    for part, fields in variants[family.default_prediction].items():
        assert fields.items() <= defaults[part].items()


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizerFast.from_pretrained(SHARED / "tokenizer", local_files_only=True)


def test_tokenizer(tokenizer):
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 0)
    assert tokenizer.model_max_length == 77
    ids = [49406, 320, 1125, 539, 320, 1929, 49407]
    assert tokenizer("A photo of a  Dog").input_ids == ids
    assert tokenizer("a photo of a dog", padding="max_length").input_ids == ids + [0] * 70
    assert len(tokenizer("dog " * 100, truncation=True).input_ids) == 77


def test_an_exclamation_mark_is_not_padding_and_added_tokens_stay_whole(tokenizer):
    assert tokenizer("dog!").input_ids == [49406, 1929, 256, 49407]
    own = CLIPTokenizerFast.from_pretrained(SHARED / "tokenizer", local_files_only=True)
    own.add_tokens(["<corgi-dog>"])
    assert own("a <corgi-dog>!").input_ids == [49406, 320, 49408, 256, 49407]


# Ids of open_clip's own SimpleTokenizer (open_clip_torch 3.3.0), without start and end.
OPENCLIP_IDS = {
    "a photo of a <corgi-dog> dog": [320, 1125, 539, 320, 283, 31320, 268, 1929, 285, 1929],
    "It's 3 o'clock!! (masterpiece:1.2)": [585, 568, 274, 334, 262, 6716, 748, 263, 12066, 281, 272, 269, 273, 264],
    "naïve café ÜBER": [1097, 35689, 563, 15304, 6522, 1516],
    "don't  stop   believing": [847, 713, 1691, 19551],
    "12345 67.89%": [272, 273, 274, 275, 276, 277, 278, 269, 279, 280, 260],
    "日本語 テキスト": [39121, 44353, 34002, 508, 2429, 228, 47121, 32421, 486],
    "emoji 🐶🐕 here": [16327, 14466, 41069, 763],
    "state-of-the-art, hyper_realistic; 8k": [
        1295,
        268,
        539,
        268,
        518,
        268,
        794,
        267,
        22146,
        318,
        16157,
        282,
        279,
        330,
    ],
    "!": [256],
}


@pytest.mark.parametrize("text", OPENCLIP_IDS)
def test_tokenizer_agrees_with_openclip(tokenizer, text):
    assert tokenizer(text).input_ids == [49406, *OPENCLIP_IDS[text], 49407]
