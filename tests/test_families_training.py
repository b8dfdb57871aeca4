"""The recipe on a tiny base of each model family: it learns, goes on where it stopped, and leaves the base alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models.apply import applied_weights
from far_train.models.attention_maps import cross_attention_layers
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner, plain_vocabulary
from far_train.models.families import SD21, SDXL, Family
from far_train.models.layers import kv_weights
from far_train.models.loading import build_parts, load_base, packaged_configs
from far_train.models.settings import SampleConfig
from far_train.models.tokens import RARE_WORDS
from far_train.models.weights import FarWeights, describe
from far_train.training import step
from far_train.training.build import MOST_PARAMETERS
from far_train.training.callbacks import Callbacks
from far_train.training.estimate import measure_cost
from far_train.training.recipe import TrainingRun, train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError, Interrupted, WeightsError

from .test_recipe import QUICK, state_of, stop_at

TOKENS = ("<red-ball>", "<blue-ball>")


def losses_on_one_batch(
    base: BaseModel, fusion: ConceptFusion, folder: Path, monkeypatch, **settings
) -> tuple[Tensor, Tensor]:
    """Denoising and refinement loss [2] of one repeated batch, before and after the training."""
    for layer in cross_attention_layers(base.unet).values():
        layer.to_q.weight.data.mul_(6)  # random maps are flat; as in a trained model, these have peaks to begin with
    rates = {"lora_rank": 32, "lora_lr": 4e-3, "embedding_lr": 1e-2, "weight_decay": 0.0, "min_snr_gamma": None}
    shares = {"refinement_weight": 1.0, "refinement_ramp": 0.0, "competition_weight": 0.1}
    counts = {"batch_size": 1, "prior_batch_size": 0, "sample_every": 0, "device": "cpu"}
    with TrainingRun(base, fusion, TrainConfig(**rates | shares | counts | settings), folder) as run:
        batch = run.state.latent_cache.sample_batch((1, 0), 1000, seed=0, step=0)
        batch.timesteps.fill_(600)
        monkeypatch.setattr(step, "sample_batch", lambda _: batch)
        before = step.run_eagerly(run.state, batch, 1.0)[1:3]
        for _ in range(run.state.steps):
            run.train_step()
        return before, step.run_eagerly(run.state, batch, 1.0)[1:3]


def test_both_losses_fall_by_half(family: Family, family_base: BaseModel, concepts, tmp_path: Path, monkeypatch):
    fusion = ConceptFusion(concepts, config=FusionConfig(size=128, count=4))
    steps = 200 if family == SDXL else 80  # SDXL's UNet has no attention, hence no LoRA, where its maps are finest
    before, after = losses_on_one_batch(family_base, fusion, tmp_path / "run", monkeypatch, steps=steps)
    assert (after < 0.5 * before).all(), (before, after)


def test_a_run_from_its_start_to_its_files(family: Family, family_base: BaseModel, fusion, tmp_path: Path):
    """Stopped and resumed equals uninterrupted to the bit; sample pictures are drawn; the base is as it was."""
    before = state_of(family_base)
    config = QUICK.replace(sample_every=4, sample_steps=2)
    weights = train(family_base, fusion, config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
        train(family_base, fusion, config, tmp_path / "parts", callbacks=stop_at(3))
    assert train(family_base, fusion, config, tmp_path / "parts", resume=True).digest() == weights.digest()
    after = state_of(family_base)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 3

    learned = FarWeights.load(tmp_path / "whole" / "weights.safetensors")
    assert learned.digest() == weights.digest() and describe(learned)["family"] == family.key
    widths = dict(zip(family.comfy_names, (32, 48)))  # of the tiny encoders
    for token in TOKENS:
        assert {e: tuple(rows.shape) for e, rows in learned.embeddings[token].items()} == {
            e: (1, width) for e, width in widths.items()
        }
    assert all(learned.delta(name).any() for name in learned.shapes())
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 and all(m["finite"] and m["refinement"] > 0 for m in metrics)
    assert all(m["prior"] > 0 for m in metrics[1:])  # at first it predicts what the base does


def test_every_encoder_has_rows_and_limits_of_its_own(family: Family, family_base: BaseModel, fusion, tmp_path: Path):
    """Rows begin at a rare word, and are capped at their noun's norm, in the table of their encoder."""
    words = family_base.tokenizer([RARE_WORDS[0], "ball"], add_special_tokens=False)["input_ids"]
    tables = [encoder.get_input_embeddings().weight.clone() for encoder in family_base.text_encoders]
    with TrainingRun(family_base, fusion, QUICK, tmp_path / "run") as run:
        adapter = run.state.adapter
        groups = {id(p) for p in run.state.optimizer.param_groups[0]["params"]}
        assert groups == {id(rows) for rows in adapter.rows} and len(groups) == len(family.text_encoders)
        for table, rows in zip(tables, adapter.rows, strict=True):
            rare, noun = table[words[0]].mean(0), table[words[1]].mean(0)
            assert torch.allclose(rows[0], rare * noun.norm() / rare.norm(), atol=1e-6)
            with torch.no_grad():
                rows[0].mul_(7)
                rows[1].mul_(0.5)
            half = rows[1].detach().clone()
            adapter.cap_norms()
            assert torch.isclose(rows[0].norm(), noun.norm(), rtol=1e-5) and torch.equal(rows[1], half)
        run.train_step()
        assert all((rows.grad.abs().amax(1) > 0).all() for rows in adapter.rows)


def test_strength_zero_is_the_base_to_the_bit(family_base: BaseModel, fusion, tmp_path: Path):
    weights = train(family_base, fusion, QUICK.replace(lora_lr=1e-2), tmp_path / "run")

    def predict(strength: float | None) -> torch.Tensor:
        with torch.no_grad():
            conditioner = TextConditioner(family_base)
            given = conditioner.encode([plain.tokenize("a ball")], (128, 128))
            noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            return family_base.unet(noisy, torch.tensor([500]), given.context, **given.unet_kwargs()).sample

    plain = plain_vocabulary(family_base)
    before = predict(None)
    with applied_weights(weights, family_base, SampleConfig(strength=0.0)):
        assert torch.equal(predict(0.0), before)
    with applied_weights(weights, family_base):
        assert not torch.allclose(predict(1.0), before, atol=1e-4)
    assert torch.equal(predict(None), before)


def test_costs_are_estimated(family_base: BaseModel, fusion):
    cost = measure_cost(family_base, fusion, TrainConfig(steps=40, sample_every=10, sample_steps=2, device="cpu"))
    assert (cost.steps, cost.encoded, cost.sampled) == (40, 12 + 4, 4 * 3) and cost.memory > 0


def test_a_training_goes_on_from_weights_of_its_family_alone(family: Family, family_base, fusion, base, tmp_path: Path):
    learned = train(family_base, fusion, QUICK, tmp_path / "run")
    still = QUICK.replace(steps=1, embedding_lr=1e-9, lora_lr=0)
    on = train(family_base, fusion, still, tmp_path / "on", start=learned)
    for token in TOKENS:
        for encoder, rows in on.embeddings[token].items():
            assert torch.allclose(rows, learned.embeddings[token][encoder], atol=1e-6)
    if family != SD21:
        with pytest.raises(WeightsError, match=f"trained on {family.title}, this base is Stable Diffusion 2.1; use a"):
            train(base, fusion, QUICK, tmp_path / "other", start=learned)
        assert not (tmp_path / "other").exists()


def test_kv_of_sdxl_is_refused_before_anything_is_written(family: Family, family_base, fusion, tmp_path: Path):
    run = tmp_path / "run"
    if family.kv_parameters < MOST_PARAMETERS:
        assert train(family_base, fusion, QUICK.replace(trainable="kv"), run).deltas
        return
    message = "kv are 341 million parameters in Stable Diffusion XL: 1.4 GB in fp32 and 2.7 GB for AdamW's moments; use"
    with pytest.raises(ConfigError, match=message):
        train(family_base, fusion, QUICK.replace(trainable="kv"), run)
    assert not run.exists()


def test_the_table_counts_the_parameters_of_full_size_models(family: Family):
    unet = build_parts(family, packaged_configs(family, family.default_prediction))["unet"]
    assert sum(weight.numel() for weight in kv_weights(unet).values()) == family.kv_parameters


def test_another_size_than_the_bases_own_is_said(family_folder: Path, fusion, concepts, tmp_path: Path):
    notes: list[str] = []
    told = Callbacks(on_note=notes.append)
    TrainingRun(load_base(family_folder), fusion, QUICK, tmp_path / "own", callbacks=told).close()
    assert not notes
    larger = ConceptFusion(concepts, config=FusionConfig(size=192, count=2))
    bare = QUICK.replace(prior_batch_size=0)
    TrainingRun(load_base(family_folder), larger, bare, tmp_path / "larger", callbacks=told).close()
    assert notes == ["The dataset has 192 px, this base was made for 128 px, where it learns and draws best."]
