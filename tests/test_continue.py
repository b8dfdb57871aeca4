"""Learning on from given weights: they are the start, and a part of what the run is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models.weights import FarWeights
from far_train.training.recipe import TrainingRun, train
from far_train.training.run_folder import find_run, run_identity
from far_train.training.settings import TrainConfig
from far_train.utils.errors import CheckpointError, WeightsError

QUICK = TrainConfig(steps=2, batch_size=1, prior_batch_size=1, sample_every=0, device="cpu")


@pytest.fixture
def learned(base, fusion, tmp_path: Path) -> FarWeights:
    return train(base, fusion, QUICK.replace(lora_lr=1e-3), tmp_path / "first")


def opened(base, fusion, folder: Path, start: FarWeights | None) -> TrainingRun:
    return TrainingRun(base, fusion, QUICK, folder, start=start)


def test_it_starts_where_the_weights_are(base, fusion, learned, tmp_path):
    run = opened(base, fusion, tmp_path / "on", learned)
    assert torch.equal(
        run.state.adapter.rows[0].detach(), torch.cat([e["clip_h"] for e in learned.embeddings.values()])
    )
    _, deltas = run.state.adapter.export_state()
    for name, delta in learned.low_rank_deltas.items():
        assert torch.equal(deltas[name].up, delta.up) and torch.equal(deltas[name].down, delta.down)
    first = run.train_step()["loss"]
    run.close()
    fresh = opened(base, fusion, tmp_path / "fresh", None)
    assert first != fresh.train_step()["loss"]
    fresh.close()


def test_a_new_concept_joins_the_learned_ones(base, concepts, learned, tmp_path):
    green = Concept("<green-ball>", "ball", concepts[0].images, concepts[0].masks)
    wider = ConceptFusion([green, *concepts], config=FusionConfig(size=128, count=4))
    config = QUICK.replace(prior_batch_size=0)
    fresh = TrainingRun(base, wider, config, tmp_path / "fresh")
    new_row = fresh.state.adapter.rows[0].detach()[0].clone()
    fresh.close()
    run = TrainingRun(base, wider, config, tmp_path / "wider", start=learned)
    rows = run.state.adapter.rows[0].detach()
    assert torch.equal(rows[0], new_row)  # as it would begin without them
    assert torch.equal(rows[1:], torch.cat([e["clip_h"] for e in learned.embeddings.values()]))
    run.close()


def test_they_are_part_of_what_the_run_is(base, fusion, learned, tmp_path):
    plain, on = run_identity(base, fusion, QUICK), run_identity(base, fusion, QUICK, learned)
    assert plain != on and "continue_from" not in plain
    saved = tmp_path / "copy.safetensors"
    learned.save(saved)
    assert run_identity(base, fusion, QUICK, FarWeights.load(saved)) == on  # by content, whatever the file
    train(base, fusion, QUICK, tmp_path / "runs" / "dogs", start=learned)
    assert find_run(tmp_path / "runs", "dogs", on) == (tmp_path / "runs" / "dogs", True)
    assert find_run(tmp_path / "runs", "dogs", plain) == (tmp_path / "runs" / "dogs-2", False)
    with pytest.raises(CheckpointError, match=r"continue_from \(only then\)"):
        train(base, fusion, QUICK, tmp_path / "runs" / "dogs", resume=True)
    other = replace(learned, embeddings={t: {"clip_h": e["clip_h"] + 1} for t, e in learned.embeddings.items()})
    with pytest.raises(CheckpointError, match=r"continue_from \(other weights\)"):
        train(base, fusion, QUICK, tmp_path / "runs" / "dogs", start=other, resume=True)


def test_resumed_it_goes_on_from_its_checkpoint_and_not_from_the_start(base, fusion, learned, tmp_path):
    once = train(base, fusion, QUICK, tmp_path / "on", start=learned)
    again = train(base, fusion, QUICK, tmp_path / "on", start=learned, resume=True)
    assert all(torch.equal(once.embeddings[t]["clip_h"], again.embeddings[t]["clip_h"]) for t in once.embeddings)
    assert not any(torch.equal(once.embeddings[t]["clip_h"], learned.embeddings[t]["clip_h"]) for t in once.embeddings)


def test_weights_that_do_not_fit_are_refused(base, fusion, learned, concepts, tmp_path, caplog):
    about = replace(learned.provenance, prediction_type="epsilon")
    with pytest.raises(WeightsError, match="trained on a base with epsilon"):
        train(base, fusion, QUICK, tmp_path / "a", start=replace(learned, provenance=about))
    with pytest.raises(WeightsError, match="set vectors_per_token to 1"):
        train(base, fusion, QUICK.replace(vectors_per_token=2), tmp_path / "b", start=learned)
    with caplog.at_level(logging.WARNING):
        alone = ConceptFusion(concepts[:1], config=FusionConfig(size=128, count=2))
        weights = train(base, alone, QUICK.replace(prior_batch_size=0), tmp_path / "c", start=learned)
    assert "also know <blue-ball>" in caplog.text and list(weights.embeddings) == ["<red-ball>"]
