"""Modifier tokens on the shipped tokenizer of SD 2.1: they never split, collide, or shift another token."""

from __future__ import annotations

import logging

import pytest
import torch

from far_train.data.captions import Name, locate_mentions
from far_train.models.loading import SHARED
from far_train.models.tokens import PlaceholderEmbedding, Vocabulary, initial_rows, norm_limits, unknown_tokens
from far_train.utils.errors import CaptionError, TokenError

ROWS = 49408
CORGI, CHOW = Name("dog", "<corgi-dog>"), Name("dog", "<chow>")
BOS, EOS, PAD = 49406, 49407, 0
TEXTS = (
    "a photo of a dog",
    "",
    "A Photo of a Café, at 3 o'clock; it's   naïve!\n東京 🐶",
    "<unknown> tokens stay plain text <corgi dog>",
    "one two three " * 25,
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(SHARED / "tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, [CORGI, CHOW], ROWS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("names", [(), (CORGI, CHOW)])
def test_prompts_without_modifiers_are_tokenized_as_always(tokenizer, names, text):
    plain = tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    ours = Vocabulary(tokenizer, names, ROWS).tokenize(text, truncate=True)
    assert list(ours.ids) == plain


def test_short_prompts_are_padded_with_id_0(vocabulary):
    prompt = vocabulary.tokenize("a dog")
    assert prompt.ids[:4] == (BOS, 320, 1929, EOS)
    assert prompt.ids[4:] == (PAD,) * 73


def test_modifiers_get_the_ids_behind_the_table(vocabulary):
    ids = vocabulary.tokenize("a <corgi-dog> dog and a <chow> dog").ids
    assert ids[:9] == (BOS, 320, ROWS, 1929, 537, 320, ROWS + 1, 1929, EOS)
    assert list(vocabulary.rows("<chow>")) == [1]


def test_the_words_around_a_modifier_are_coded_as_without_it(vocabulary):
    with_modifier = vocabulary.tokenize("a sleepy,<chow>dog's bowl").ids
    assert [i for i in with_modifier if i < ROWS] == [
        *vocabulary.tokenize("a sleepy, dog's bowl").ids[:-1],
    ]


def test_each_of_two_dogs_has_its_own_position(vocabulary):
    caption = "a photo of a <chow> dog and a <corgi-dog> dog, in a garden"
    prompt = vocabulary.tokenize(caption)
    chow, corgi = locate_mentions(caption, [CHOW, CORGI])
    at = [prompt.positions(s) for s in (chow.token, chow.noun, corgi.token, corgi.noun)]
    assert at == [(5,), (6,), (9,), (10,)]
    assert [prompt.ids[p[0]] for p in at] == [ROWS + 1, 1929, ROWS, 1929]


def test_all_tokens_of_a_long_noun_are_found(tokenizer):
    name = Name("schnauzer puppy", "<my-dog>")
    vocabulary = Vocabulary(tokenizer, [name], ROWS)
    caption = "my photo: a <my-dog>  schnauzer puppy!"
    (spans,) = locate_mentions(caption, [name])
    prompt = vocabulary.tokenize(caption)
    ids = [prompt.ids[p] for p in prompt.positions(spans.noun)]
    assert ids == vocabulary.words("schnauzer puppy") and len(ids) > 2


def test_a_modifier_of_several_vectors_stands_at_several_positions(tokenizer):
    vocabulary = Vocabulary(tokenizer, [CORGI, CHOW], ROWS, vectors=3)
    caption = "a <corgi-dog> dog and a <chow> dog"
    prompt = vocabulary.tokenize(caption)
    corgi, chow = locate_mentions(caption, [CORGI, CHOW])
    assert [prompt.ids[p] - ROWS for p in prompt.positions(corgi.token)] == [0, 1, 2]
    assert [prompt.ids[p] - ROWS for p in prompt.positions(chow.token)] == [3, 4, 5] == list(vocabulary.rows("<chow>"))
    assert prompt.positions(corgi.noun) == (5,)


def test_upper_case_modifiers_are_the_same(vocabulary):
    assert vocabulary.tokenize("A <Corgi-Dog> dog").ids == vocabulary.tokenize("a <corgi-dog> dog").ids


def test_too_long_captions_are_refused_and_prompts_cut_with_a_warning(vocabulary, caplog):
    fitting = "<chow> " + "dog " * 74
    assert len(vocabulary.tokenize(fitting).ids) == 77
    text = fitting + "dog"
    with pytest.raises(CaptionError, match="has 76 tokens, 75 fit"):
        vocabulary.tokenize(text)
    with caplog.at_level(logging.WARNING):
        prompt = vocabulary.tokenize(text, truncate=True)
    assert "after the first 75" in caplog.text
    assert len(prompt.ids) == 77 and prompt.ids[-1] == EOS and len(prompt.spans) == 75


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((CORGI, Name("cat", "<corgi-dog>")), "names two concepts"),
        ((Name("dog", "corgi"),), "write it as <corgi>"),
        ((Name("dog", None),), "write it as <my-dog>"),
    ],
)
def test_bad_tokens_are_refused(tokenizer, names, message):
    with pytest.raises(TokenError, match=message):
        Vocabulary(tokenizer, names, ROWS)


def test_a_token_that_the_base_has_already_is_refused():
    from transformers import CLIPTokenizerFast

    fine_tuned = CLIPTokenizerFast.from_pretrained(SHARED / "tokenizer", local_files_only=True)
    fine_tuned.add_tokens(["<chow>"])
    with pytest.raises(TokenError, match="<chow> is already a token of the base"):
        Vocabulary(fine_tuned, [CHOW], ROWS + 1)


def test_a_bad_noun_is_refused(tokenizer):
    with pytest.raises(CaptionError, match="'Dog' is not a class noun"):
        Vocabulary(tokenizer, [Name("Dog", "<x>")], ROWS)


def test_unknown_tokens_of_a_prompt():
    prompt = "a <Chow> dog, a <poodle> dog and 3 < 4 > 2"
    assert unknown_tokens(prompt, ["<chow>"]) == ["<poodle>"]
    assert unknown_tokens("a dog", []) == []


# ---- embedding rows


def test_modifier_rows_serve_their_ids_and_nothing_else():
    table = torch.nn.Embedding(10, 4, dtype=torch.float16)
    rows = torch.randn(2, 4)
    embedding = PlaceholderEmbedding(table, rows)
    out = embedding(torch.tensor([[9, 10, 11, 0]]))
    assert torch.equal(out[0, [0, 3]], table.weight[[9, 0]]) and out.dtype == torch.float16
    assert torch.equal(out[0, 1:3], rows.half())
    out.float().sum().backward()
    assert torch.equal(embedding.rows.grad, torch.ones(2, 4))
    assert embedding.rows.dtype == torch.float32


@pytest.mark.parametrize("count", [2, 9])
def test_first_rows_are_distinct_and_as_long_as_their_noun(tokenizer, count):
    """Nine concepts use up the rare words; two dogs must not start identical even then."""
    table = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    names = [Name("dog", f"<dog-{i}>") for i in range(count)]
    vocabulary = Vocabulary(tokenizer, names, ROWS)
    rows = initial_rows(table, vocabulary)
    dog = table[vocabulary.words("dog")[0]]
    assert rows.shape == (count, 8) and len(rows.unique(dim=0)) == count
    assert torch.allclose(rows.norm(dim=1), dog.norm().expand(count))
    assert torch.allclose(norm_limits(table, vocabulary), dog.norm().expand(count, 1))
    special = table[[BOS, EOS, PAD]]
    assert torch.cosine_similarity(rows[:, None], special[None], dim=-1).max() < 0.9999
