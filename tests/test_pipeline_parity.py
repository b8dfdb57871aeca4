"""Each family against diffusers' own pipeline: conditioning, noise prediction and pictures, within 1e-4 in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizerFast

from far_train.data.captions import Name
from far_train.mini.tiny import random_states, single_file_state, tiny_configs
from far_train.models.base import BaseModel
from far_train.models.conditioning import Conditioning, TextConditioner, plain_vocabulary
from far_train.models.families import SDXL, Family
from far_train.models.loading import SHARED, load_base
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.models.tokens import Vocabulary

SIZE = (128, 64)
PROMPTS = ["a photo of a dog", "A red ball, on the beach; 8k", "dog " * 90, ""]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def with_own_norms(base: BaseModel) -> BaseModel:
    """The base with layer norms that do something: fresh ones would hide where they stand."""
    generator = torch.Generator().manual_seed(0)
    for encoder in base.text_encoders:
        for name, parameter in encoder.named_parameters():
            if "norm" in name:
                parameter.data.normal_(1.0, 0.5, generator=generator)
    return base


@pytest.fixture
def base(family_base: BaseModel) -> BaseModel:
    return with_own_norms(family_base)


def pipeline_of(base: BaseModel, token: str | None = None) -> Any:
    """diffusers' pipeline of the family, with its own tokenizers; ``token`` is added to them."""
    parts = {"unet": base.unet, "vae": base.vae, "scheduler": diffusers.DDIMScheduler.from_config(base.scheduler)}
    for spec, encoder in zip(base.family.text_encoders, base.text_encoders):
        name = spec.part.replace("text_encoder", "tokenizer")
        parts[name] = CLIPTokenizerFast.from_pretrained(SHARED / "tokenizer", pad_token=spec.pad_token)
        parts[name].add_tokens([token] if token else [])
        parts[spec.part] = encoder
    if base.family is not SDXL:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, base.family.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def theirs(pipeline: Any, prompts: list[str]) -> Conditioning:
    """What diffusers makes of the prompts, by its encode_prompt."""
    encoded = pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return Conditioning(encoded[0], encoded[2] if len(encoded) == 4 else None)


@torch.no_grad()
def ours(base: BaseModel, vocabulary: Vocabulary, prompts: list[str]) -> Conditioning:
    return TextConditioner(base).encode([vocabulary.tokenize(p, truncate=True) for p in prompts], SIZE)


def agree(a: Conditioning, b: Conditioning) -> bool:
    pairs = [(a.context, b.context), (a.pooled, b.pooled)]
    return all(x is y is None or torch.allclose(x, y, **CLOSE) for x, y in pairs)


def test_conditioning(base: BaseModel):
    found = ours(base, plain_vocabulary(base), PROMPTS)
    assert agree(found, theirs(pipeline_of(base), PROMPTS))
    assert found.context.shape[1:] == (77, base.unet.config.cross_attention_dim)
    assert (found.pooled is None) == (not base.family.size_conditions)


def other_spec(**changes: Any) -> Callable[[BaseModel], BaseModel]:
    """The base with a text encoder that is read otherwise than its family's first."""

    def changed(base: BaseModel) -> BaseModel:
        first, *others = base.family.text_encoders
        changed = {name: value(first) for name, value in changes.items()}
        encoders = (dataclasses.replace(first, **changed), *others)
        return dataclasses.replace(base, family=dataclasses.replace(base.family, text_encoders=encoders))

    return changed


def exchanged_layers(base: BaseModel) -> BaseModel:
    encoder = deepcopy(base.text_encoders[-1])
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    layers[0], layers[1] = layers[1], layers[0]
    return dataclasses.replace(base, text_encoders=(*base.text_encoders[:-1], encoder))


@pytest.mark.parametrize(
    "change",
    [
        other_spec(layer=lambda spec: -3 - spec.layer),  # −1 ↔ −2
        other_spec(final_norm=lambda spec: not spec.final_norm),
        other_spec(pad_token=lambda spec: "!" if spec.pad_token != "!" else "<|endoftext|>"),
        exchanged_layers,
    ],
    ids=["layer", "norm", "pad", "two layers exchanged"],
)
def test_conditioning_of_another_kind_differs(base: BaseModel, change: Callable[[BaseModel], BaseModel]):
    """Or the parity above would show nothing."""
    reference = theirs(pipeline_of(base), PROMPTS)
    assert agree(ours(base, plain_vocabulary(base), PROMPTS), reference)
    changed = change(base)
    assert not agree(ours(changed, plain_vocabulary(changed), PROMPTS), reference)


def test_the_empty_prompt_is_encoded_as_comfyui_does():
    """diffusers' own default for SDXL is zeros in its place, where no negative prompt is given."""
    configs = tiny_configs(family=SDXL)
    base = load_base(single_file_state(configs, random_states(configs, family=SDXL), SDXL), config=configs)
    found = ours(base, plain_vocabulary(base), [""])
    for zeros in (True, False):
        pipeline = pipeline_of(base)
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        _, context, _, pooled = pipeline.encode_prompt("a dog", device="cpu", do_classifier_free_guidance=True)
        assert agree(found, Conditioning(context, pooled)) != zeros
        _, context, _, pooled = pipeline.encode_prompt(
            "a dog", device="cpu", do_classifier_free_guidance=True, negative_prompt=""
        )
        assert agree(found, Conditioning(context, pooled))


# ---- learned tokens


def with_token_in_tables(base: BaseModel, rows: list[Tensor]) -> BaseModel:
    """A copy of the base whose own tables hold ``rows`` [1, width], one for each encoder, behind their last."""
    encoders = []
    for encoder, row in zip(base.text_encoders, rows):
        encoder = deepcopy(encoder)
        # From here on transformers looks for the end of a prompt by its id; before, it took the largest.
        getattr(encoder, "text_model", encoder).eos_token_id = base.tokenizer.eos_token_id
        table = encoder.get_input_embeddings().weight
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([table, row])))
        encoders.append(encoder)
    return dataclasses.replace(base, text_encoders=tuple(encoders))


LEARNED = ["a photo of a <my-dog> dog", "a dog beside a <my-dog>", "<my-dog>"]


def equally_wide(family: Family) -> BaseModel:
    """A tiny base whose encoders are equally wide, so that their rows can be exchanged."""
    configs = tiny_configs(family=family)
    if len(family.text_encoders) == 2:
        sizes = ("hidden_size", "intermediate_size", "projection_dim")
        configs["text_encoder_2"] |= {k: configs["text_encoder"][k] for k in sizes}
        configs["unet"]["cross_attention_dim"] = 2 * 32
        configs["unet"]["projection_class_embeddings_input_dim"] = 6 * 256 + 32
    states = random_states(configs, family=family)
    return with_own_norms(load_base(single_file_state(configs, states, family), config=configs))


def test_conditioning_with_learned_tokens(family: Family):
    """Also where the token ends the prompt: its id is above that of the end, where the pooled output is taken."""
    base = equally_wide(family)
    vocabulary = Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size)
    generator = torch.Generator().manual_seed(0)
    rows = [0.05 * torch.randn(1, 32, generator=generator) for _ in base.text_encoders]
    expected = theirs(pipeline_of(with_token_in_tables(base, rows), "<my-dog>"), LEARNED)
    conditioner = TextConditioner(base)
    conditioner.inject(rows)
    assert agree(ours(base, vocabulary, LEARNED), expected)
    conditioner.remove()
    others = rows[::-1] if len(rows) > 1 else [-row for row in rows]
    conditioner.inject(others)
    assert not agree(ours(base, vocabulary, LEARNED), expected)


# ---- the UNet and pictures


@torch.no_grad()
def test_noise_prediction(base: BaseModel):
    """The UNet gives with our conditioning what it gives inside of diffusers' pipeline."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(_module: nn.Module, args: tuple, _kwargs: dict, output: tuple) -> None:
        seen.append((args[0], args[1], output[0]))

    hook = base.unet.register_forward_hook(watch, with_kwargs=True)
    height, width = SIZE
    pipeline_of(base)(
        "a dog",
        negative_prompt="blurry",
        height=height,
        width=width,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    conditioning = ours(base, plain_vocabulary(base), ["blurry", "a dog"])
    assert len(seen) == 2
    for latents, time, predicted in seen:
        found = base.unet(latents, time, conditioning.context, **conditioning.unet_kwargs()).sample
        assert torch.allclose(found, predicted, **CLOSE)
    if conditioning.pooled is not None:
        for change in ({"pooled": conditioning.pooled.flip(0)}, {"time_ids": conditioning.time_ids + 512}):
            other = dataclasses.replace(conditioning, **change)
            found = base.unet(latents, time, other.context, **other.unet_kwargs()).sample
            assert not torch.allclose(found, predicted, **CLOSE)


@torch.no_grad()
def test_pictures(base: BaseModel):
    height, width = SIZE
    config = SampleConfig(sampling_steps=2, negative_prompt="blurry", height=height, width=width)
    drawn = draw_pictures(base, plain_vocabulary(base), ["a dog", "a cat"], config, seeds=[3, 4])
    expected = pipeline_of(base)(
        ["a dog", "a cat"],
        negative_prompt=["blurry"] * 2,
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=config.guidance,
        output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    assert drawn.shape == (2, *SIZE, 3)
    assert torch.allclose(drawn, torch.from_numpy(expected), atol=1e-4)


@torch.no_grad()
def test_pictures_of_a_base_in_bf16_with_learned_tokens(base: BaseModel):
    """The tokens' rows stay in fp32, and so does the VAE."""
    base.to("cpu", torch.bfloat16)
    vocabulary = Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size)
    conditioner = TextConditioner(base)
    conditioner.inject([table[:1] for table in conditioner.tables])
    config = SampleConfig(sampling_steps=2)
    assert torch.isfinite(draw_pictures(base, vocabulary, ["a <my-dog> dog"], config, size=SIZE)).all()
