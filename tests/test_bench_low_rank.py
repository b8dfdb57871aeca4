"""The rival that learns low-rank changes: its weights put into a base what it learned, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch

from far_train.bench.low_rank import RANK, LowRankRun, LowRankTrainables, attention_projections
from far_train.callbacks import Callbacks
from far_train.config import TrainConfig
from far_train.errors import Interrupted
from far_train.recipe import train
from far_train.tokens import Vocabulary

CONFIG = TrainConfig(steps=3, batch_size=2, prior_batch_size=1, kv_lr=1e-3, sample_every=0, save_every=1, device="cpu")


def outputs(base, seed=0):
    """What the UNet predicts on some noise."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 77, base.unet.config.cross_attention_dim, generator=generator)
    side = base.unet.config.sample_size
    with torch.no_grad():
        return base.unet(torch.randn(1, 4, side, side, generator=generator), torch.tensor([500]), context).sample


def test_it_begins_as_the_base_and_leaves_it_as_it_was(base, fusion):
    before, state = outputs(base), copy.deepcopy(base.unet.state_dict())
    names = set(attention_projections(base.unet))
    vocabulary = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1)
    trainables = LowRankTrainables(base, vocabulary)
    assert set(trainables.low_rank) == names and len(names) % 8 == 0  # four each in self- and cross-attention
    assert torch.allclose(outputs(base), before, atol=1e-6)
    trainables.remove()
    assert state.keys() == base.unet.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in base.unet.state_dict().items())


def test_what_is_learned_is_what_is_applied(base, fusion, tmp_path):
    state = copy.deepcopy(base.unet.state_dict())
    weights = train(base, fusion, CONFIG, tmp_path / "run", run_type=LowRankRun)
    assert all(torch.equal(v, state[k]) for k, v in base.unet.state_dict().items())
    assert set(weights.changes) == set(attention_projections(base.unet))
    for change in weights.changes.values():
        assert change.any() and torch.linalg.matrix_rank(change) <= RANK
    assert not any(delta.any() for delta in weights.embeddings.deltas.values())
    taught = copy.deepcopy(base)
    weights.apply(taught)
    name, linear = next(iter(attention_projections(taught.unet).items()))
    assert torch.allclose(linear.weight, state[f"{name}.weight"] + weights.changes[name])
    assert not torch.allclose(outputs(taught), outputs(base))


def test_it_goes_on_where_it_was_stopped(base, fusion, tmp_path):
    whole = train(base, fusion, CONFIG, tmp_path / "whole", run_type=LowRankRun)
    steps = []
    stop = Callbacks(on_step=lambda step, _: steps.append(step), should_stop=lambda: len(steps) >= 2)
    with pytest.raises(Interrupted):
        train(base, fusion, CONFIG, tmp_path / "run", run_type=LowRankRun, callbacks=stop)
    again = train(base, fusion, CONFIG, tmp_path / "run", run_type=LowRankRun, resume=True)
    assert all(torch.equal(again.changes[k], v) for k, v in whole.changes.items())
