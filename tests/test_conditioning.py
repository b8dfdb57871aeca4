"""Conditioning: what text encoders make of prompts, for one encoder and for two with pooled output and time ids."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from far_train.data.captions import Name
from far_train.models.base import BaseModel
from far_train.models.conditioning import Conditioning, TextConditioner
from far_train.models.families import SD21, TextEncoderSpec
from far_train.models.tokens import Vocabulary, initial_rows

SIZE = (96, 128)
(OPEN_CLIP,) = SD21.text_encoders
# Two encoders as SDXL has them: no final norm, the first filled up with the end token, the second pooled.
FIRST = dataclasses.replace(OPEN_CLIP, comfy_name="clip_l", layer=-2, final_norm=False, pad_token="<|endoftext|>")
SECOND = dataclasses.replace(FIRST, part="text_encoder_2", comfy_name="clip_g", pooled=True, pad_token="!")
TWO = dataclasses.replace(SD21, key="two", text_encoders=(FIRST, SECOND), size_conditions=True)


def encoder(spec: TextEncoderSpec, width: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A small text encoder with the old config, by which transformers takes the largest id for the end of a prompt."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, projection_dim=24, vocab_size=49408, eos_token_id=2)
    torch.manual_seed(width)
    model = (CLIPTextModelWithProjection if spec.pooled else CLIPTextModel)(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # a norm that does nothing would hide where it stands
            torch.nn.init.normal_(parameter, 1.0)
    return model


@pytest.fixture
def two(base: BaseModel) -> BaseModel:
    encoders = (encoder(FIRST, 32), encoder(SECOND, 48))
    return dataclasses.replace(base, family=TWO, text_encoders=encoders)


@pytest.fixture
def vocabulary(base: BaseModel) -> Vocabulary:
    return Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size)


def own_ids(base: BaseModel, text: str, pad: int) -> torch.Tensor:
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [base.tokenizer.bos_token_id, *ids, base.tokenizer.eos_token_id]
    return torch.tensor([ids + [pad] * (77 - len(ids))])


@pytest.mark.parametrize("vectors", (1, 3))
@pytest.mark.parametrize("filling", ("", " in the snow" * 20))  # the second is cut at the end of the prompt
def test_a_prompt_without_placeholder_tokens_names_the_class(base: BaseModel, vectors: int, filling: str):
    vocabulary = Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size, vectors)
    with_token = vocabulary.tokenize(f"a <my-dog> dog and a cat{filling}", truncate=True)
    found = TextConditioner(base).without_placeholders(with_token)
    plain = vocabulary.tokenize(f"a dog and a cat{filling}", truncate=True)
    assert len(found.ids) == len(plain.ids) == 77
    if not filling:
        assert found.ids == plain.ids
    else:
        assert found.ids[: 76 - vectors] == plain.ids[: 76 - vectors]  # what was cut off stays so


@torch.no_grad()
def test_one_encoder_gives_its_last_state(base: BaseModel, vocabulary: Vocabulary):
    found = TextConditioner(base).encode([vocabulary.tokenize("a dog")] * 2, SIZE)
    ids = own_ids(base, "a dog", base.tokenizer.pad_token_id)
    expected = base.text_encoders[0](ids).last_hidden_state
    assert torch.equal(found.context, expected.expand(2, -1, -1))
    assert found.unet_kwargs() == {} and found.pipeline_kwargs().keys() == {"prompt_embeds"}


@torch.no_grad()
def test_two_encoders_stand_side_by_side(two: BaseModel, vocabulary: Vocabulary):
    found = TextConditioner(two).encode([vocabulary.tokenize("a dog"), vocabulary.tokenize("a cat")], SIZE)
    first = two.text_encoders[0](own_ids(two, "a cat", two.tokenizer.eos_token_id), output_hidden_states=True)
    second = two.text_encoders[1](own_ids(two, "a cat", 0), output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    assert found.context.shape == (2, 77, 80) and torch.allclose(found.context[1:], expected, atol=1e-6)
    assert torch.allclose(found.pooled[1:], second.text_embeds, atol=1e-6)  # without placeholder tokens they agree
    assert found.time_ids.tolist() == [[96, 128, 0, 0, 96, 128]] * 2
    added = found.unet_kwargs()["added_cond_kwargs"]
    assert added["text_embeds"] is found.pooled and added["time_ids"] is found.time_ids
    assert found.pipeline_kwargs("negative_").keys() == {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}


@torch.no_grad()
def test_the_pooled_output_is_that_of_the_end_whatever_the_placeholder_tokens_ids(two: BaseModel, vocabulary):
    """With the rows of the word that they stand in for, a prompt must give what the word gives."""
    conditioner, ids = TextConditioner(two), two.tokenizer("dog", add_special_tokens=False)["input_ids"]
    plain = conditioner.encode([vocabulary.tokenize("a photo of a dog")], SIZE)
    conditioner.inject([table[ids] for table in conditioner.tables])
    assert conditioner.has_placeholders
    learned = TextConditioner(two).encode([vocabulary.tokenize("a photo of a <my-dog>")], SIZE)
    assert torch.allclose(learned.pooled, plain.pooled, atol=1e-6)
    assert torch.allclose(learned.context, plain.context, atol=1e-6)
    conditioner.remove()
    assert not conditioner.has_placeholders


def test_every_encoder_learns_rows_of_its_own(two: BaseModel, vocabulary: Vocabulary):
    conditioner = TextConditioner(two)
    rows = conditioner.inject([initial_rows(table, vocabulary) for table in conditioner.tables])
    assert [tuple(r.shape) for r in rows] == [(1, 32), (1, 48)]
    found = conditioner.encode([vocabulary.tokenize("a <my-dog>")], SIZE)
    (found.context.square().sum() + found.pooled.square().sum()).backward()
    assert all(bool(r.grad.any()) for r in rows)
    assert all(p.grad is None or p.requires_grad for e in two.text_encoders for p in e.parameters())


def test_what_a_base_does_not_have_is_not_passed_on():
    context = torch.zeros(1, 77, 8)
    assert Conditioning(context).unet_kwargs() == {}
