"""Attention maps of a picture's words, and what a content readout is asked to say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from far_train.data.captions import Name
from far_train.evaluation.attention_focus import attention_maps, focus, heat_over
from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner
from far_train.models.loading import load_base
from far_train.models.tokens import Vocabulary, initial_rows
from far_train.utils.errors import CaptionError

NAMES = (Name("dog", "<rex-dog>"), Name("cat"))
CAPTION = "a photo of a <rex-dog> dog and a cat"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseModel:
    configs = tiny_configs()
    return load_base(write_folder(tmp_path_factory.mktemp("base"), configs, random_states(configs)))


@pytest.fixture(scope="module")
def vocabulary(base) -> Vocabulary:
    conditioner = TextConditioner(base)
    words = Vocabulary(base.tokenizer, NAMES[:1], base.tokenizer_size)
    conditioner.inject([initial_rows(table, words) for table in conditioner.tables])
    return words


def test_maps_are_shares_of_attention_and_repeatable(base, vocabulary):
    image = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    maps = attention_maps(base, vocabulary, image, CAPTION, NAMES)
    assert maps.shape == (2, 16, 16)
    assert bool((maps > 0).all()) and bool((maps.sum(0) < 1).all())  # two of 77 tokens
    assert torch.equal(maps, attention_maps(base, vocabulary, image, CAPTION, NAMES))
    other = attention_maps(base, vocabulary, image, CAPTION, NAMES, noise_seed=1)
    assert not torch.equal(maps, other)


def test_the_unet_gets_its_processors_back(base, vocabulary):
    before = dict(base.unet.attn_processors)
    attention_maps(base, vocabulary, torch.zeros(128, 128, 3), CAPTION, NAMES)
    assert dict(base.unet.attn_processors) == before


def test_a_word_that_is_not_there_is_named(base, vocabulary):
    with pytest.raises(CaptionError, match="<rex-dog>"):
        attention_maps(base, vocabulary, torch.zeros(128, 128, 3), "a photo of a cat", NAMES)


def test_heat_is_brightest_where_attention_is_largest():
    heat = torch.zeros(16, 16)
    heat[4, 12] = 1.0
    shown = heat_over(torch.full((128, 128, 3), 0.5), heat)
    brightness = F.avg_pool2d(shown.mean(-1)[None], 8)[0]
    assert int(brightness.argmax()) == 4 * 16 + 12 and shown.min() >= 0 and shown.max() <= 1


def test_maps_of_several_noise_levels_are_averaged(base, vocabulary):
    image = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    each = [attention_maps(base, vocabulary, image, CAPTION, NAMES, timestep=[t]) for t in (100, 900)]
    assert not torch.allclose(*each)
    both = attention_maps(base, vocabulary, image, CAPTION, NAMES, timestep=[100, 900])
    assert torch.allclose(both, (each[0] + each[1]) / 2)


def test_focus_compares_the_attention_inside_a_mask_with_that_outside():
    heat = torch.tensor([[0.4, 0.2], [0.1, 0.1]])
    mask = torch.zeros(4, 4)
    mask[:2, :2] = 1  # the upper left cell
    mask[:2, 2] = 1  # and half of the one beside it
    found = focus(heat, mask)
    assert found.inside == pytest.approx((0.4 + 0.5 * 0.2) / 1.5)
    assert found.outside == pytest.approx((0.5 * 0.2 + 0.1 + 0.1) / 2.5)
    assert found.ratio == pytest.approx(found.inside / found.outside) and found.hottest_inside
    assert not focus(heat, 1 - mask).hottest_inside
    assert focus(torch.eye(2)[:1], torch.eye(2)[:1]).ratio == float("inf")
