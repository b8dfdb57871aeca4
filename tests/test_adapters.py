"""Both kinds of adapter: each starts as the base, leaves it alone, and gives the weights that it was trained to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from far_train.models.adapters import Adapter, inject_adapter, set_learning_rates
from far_train.models.apply import apply_weights
from far_train.models.conditioning import TextConditioner
from far_train.models.layers import attention_projections
from far_train.models.tokens import Vocabulary
from far_train.models.weights import FarWeights
from far_train.training.callbacks import Callbacks
from far_train.training.recipe import TrainingRun, train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import Interrupted, WeightsError

SHORT = TrainConfig(steps=3, batch_size=2, prior_batch_size=1, sample_every=0, save_every=1, device="cpu")
KV, ATTENTION = SHORT.replace(trainable="kv", kv_lr=1e-3), SHORT.replace(lora_rank=3, lora_lr=1e-3)
KINDS = pytest.mark.parametrize("config", [KV, ATTENTION], ids=["kv", "lora"])


def outputs(base, seed=0):
    """What the UNet predicts on some noise."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 77, base.unet.config.cross_attention_dim, generator=generator)
    side = base.unet.config.sample_size
    with torch.no_grad():
        return base.unet(torch.randn(1, 4, side, side, generator=generator), torch.tensor([500]), context).sample


@KINDS
def test_it_begins_as_the_base_and_leaves_it_as_it_was(base, fusion, config):
    before, state = outputs(base), copy.deepcopy(base.unet.state_dict())
    vocabulary = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1)
    adapter = inject_adapter(base, vocabulary, config)
    assert torch.allclose(outputs(base), before, atol=1e-6)
    adapter.remove()
    assert state.keys() == base.unet.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in base.unet.state_dict().items())


@KINDS
def test_disabled_it_computes_as_the_base(base, fusion, config):
    before = outputs(base)
    adapter = inject_adapter(base, Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1), config)
    for parameter in adapter.unet_parameters().values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    changed = outputs(base)
    with adapter.disabled():
        assert torch.allclose(outputs(base), before, atol=1e-6)
    assert torch.equal(outputs(base), changed) and not torch.allclose(changed, before, atol=1e-3)
    adapter.remove()


@KINDS
def test_an_adapter_that_fails_halfway_leaves_the_base_as_it_was(base, fusion, config, monkeypatch):
    before = [*base.unet.modules(), *base.unet.attn_processors.values()]
    vocabulary = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1)
    replace, calls = Adapter._replace, []

    def run_out_of_memory(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        replace(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "_replace", run_out_of_memory)
        with pytest.raises(MemoryError):
            inject_adapter(base, vocabulary, config)
    after = [*base.unet.modules(), *base.unet.attn_processors.values()]
    assert len(after) == len(before) and all(a is b for a, b in zip(after, before))
    assert not TextConditioner(base).has_placeholders


@pytest.mark.parametrize(
    ("decay", "shares"),
    [(0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 0.5]), (1, [1, 0.75, 0.5, 0.25]), (0.25, [1, 1, 1, 1])],
)
def test_rates_fall_to_zero_over_the_last_steps(base, fusion, decay, shares):
    vocabulary = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1)
    adapter = inject_adapter(base, vocabulary, ATTENTION)
    optimizer, seen = adapter.optimizer(ATTENTION.replace(embedding_lr=0.01), 3), []
    for step in range(4):
        set_learning_rates(optimizer, step, 4, decay)
        seen.append([group["lr"] for group in optimizer.param_groups])
    adapter.remove()
    assert seen == [pytest.approx([0.01 * share, 3e-3 * share]) for share in shares]


def test_a_run_follows_its_decay(base, fusion, tmp_path):
    """Of two steps, a decay over both halves the second: an AdamW step is linear in its rate."""
    moves = []
    for decay in (0.0, 1.0):
        run = TrainingRun(base, fusion, ATTENTION.replace(steps=2, lr_decay=decay), tmp_path / str(decay))
        places = []
        for _ in range(2):
            run.take_step()
            places.append(torch.cat([p.detach().flatten() for p in run.state.adapter.unet_parameters().values()]))
        run.close()
        moves.append((places[0], places[1] - places[0]))
    assert torch.equal(moves[0][0], moves[1][0])
    assert torch.allclose(moves[0][1], 2 * moves[1][1], atol=1e-6) and moves[1][1].abs().max() > 1e-4


@KINDS
def test_what_is_learned_is_what_is_applied(base, fusion, config, tmp_path):
    state = copy.deepcopy(base.unet.state_dict())
    weights = train(base, fusion, config, tmp_path / "run")
    assert all(torch.equal(v, state[k]) for k, v in base.unet.state_dict().items())
    taught = copy.deepcopy(base)
    apply_weights(FarWeights.load(tmp_path / "run" / "weights.safetensors"), taught)
    deltas = {name: weights.delta(name) for name in weights.shapes()}
    layers = {name: getattr(owner, part) for name, (owner, part) in attention_projections(base.unet).items()}
    for name, (owner, part) in attention_projections(taught.unet).items():
        moved = getattr(owner, part).weight - layers[name].weight
        assert torch.allclose(moved, deltas.get(name, torch.zeros(())).float(), atol=1e-6), name
    assert deltas and all(delta.any() for delta in deltas.values())
    assert not torch.allclose(outputs(taught), outputs(base))


def test_lora_has_its_rank_on_all_attention(base, fusion, tmp_path):
    weights = train(base, fusion, ATTENTION, tmp_path / "run")
    assert not weights.deltas and weights.low_rank_deltas.keys() == attention_projections(base.unet).keys()
    kinds = {name.rpartition("transformer_blocks.0.")[2] for name in weights.low_rank_deltas}
    assert kinds == {f"attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert all(int(torch.linalg.matrix_rank(d.dense())) == 3 for d in weights.low_rank_deltas.values())


@KINDS
def test_it_goes_on_where_it_was_stopped(base, fusion, config, tmp_path):
    whole = train(base, fusion, config, tmp_path / "whole")
    steps = []
    stop = Callbacks(on_step=lambda step, _: steps.append(step), should_stop=lambda: len(steps) >= 2)
    with pytest.raises(Interrupted):
        train(base, fusion, config, tmp_path / "run", callbacks=stop)
    assert train(base, fusion, config, tmp_path / "run", resume=True).digest() == whole.digest()


def test_weights_of_another_kind_are_no_start(base, fusion, tmp_path: Path):
    whole = train(base, fusion, KV, tmp_path / "kv")
    lora = train(base, fusion, ATTENTION, tmp_path / "attention")
    with pytest.raises(WeightsError, match="trained with trainable lora; set it to lora"):
        train(base, fusion, KV, tmp_path / "a", start=lora)
    with pytest.raises(WeightsError, match="trained with trainable kv; set it to kv"):
        train(base, fusion, ATTENTION, tmp_path / "b", start=whole)
    with pytest.raises(WeightsError, match="have rank 3; set lora_rank to 3"):
        train(base, fusion, ATTENTION.replace(lora_rank=4), tmp_path / "c", start=lora)
    assert not any((tmp_path / name).exists() for name in "abc")  # before anything is drawn or encoded
    still = ATTENTION.replace(steps=1, embedding_lr=1e-9, lora_lr=0)
    on = train(base, fusion, still, tmp_path / "d", start=lora)
    assert all(torch.equal(d.up, lora.low_rank_deltas[name].up) for name, d in on.low_rank_deltas.items())
