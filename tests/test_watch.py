"""A run that diverges or becomes slow is noticed, and one that learns is not: the rules, and a training that breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.mini.shipped import FUSING, SUBJECTS, TRAINING, small_base
from far_train.mini.world import reference_photos
from far_train.training.checkpoints import newest_step
from far_train.training.recipe import train
from far_train.training.run_folder import read_metrics
from far_train.training.watch import FEW, PACE_WINDOW, SETTLING_STEPS, WINDOW, DivergenceWatch, PaceWatch
from far_train.utils.errors import TrainingDiverged

# ---- divergence


def watched(ratios: list[float], base: float = 0.2) -> DivergenceWatch:
    watch = DivergenceWatch(with_base=True)
    for ratio in ratios:
        watch.add(ratio * base, base)
    return watch


def test_a_run_is_compared_with_the_base_on_the_same_noise():
    """However much the timesteps change the loss: here from 0.01 to 1."""
    watch = DivergenceWatch(with_base=True)
    for step in range(200):
        base = (0.01, 0.1, 1.0)[step % 3]
        watch.add(0.9 * base, base)
        assert not watch.broken and not watch.suspect
    for _ in range(FEW // 2 + 1):  # the median of seven is above the limit as soon as four are
        assert not watch.suspect
        watch.add(1.5, 1.0)
    assert watch.suspect and not watch.broken
    assert watch.words() == "1.5 times the untouched base model's on the same images"


def test_it_is_broken_when_most_steps_of_the_window_were_worse_than_the_base():
    half = WINDOW // 2
    assert not watched([0.8] * 100 + [1.5] * (half - 1)).broken
    assert watched([0.8] * 100 + [1.5] * (half + 1)).broken
    assert not watched([1.5] * (WINDOW - 1)).broken  # too early to tell
    assert watched([1.5] * WINDOW).broken


def test_a_little_worse_than_the_base_and_single_bad_steps_are_no_divergence():
    assert not watched([1.19] * 100).broken and not watched([1.19] * 100).suspect
    assert not watched([0.8, 0.8, 50.0] * 30).broken and not watched([0.8, 0.8, 50.0] * 30).suspect
    assert not watched([1.5] * WINDOW + [0.8] * WINDOW).broken  # it has recovered


def test_without_the_bases_error_the_first_steps_are_the_measure():
    watch = DivergenceWatch(with_base=False)
    for _ in range(WINDOW):
        watch.add(0.1, 0.0)
    for _ in range(WINDOW):
        watch.add(0.39, 0.0)
    assert not watch.broken
    for _ in range(WINDOW // 2 + 1):
        assert not watch.broken
        watch.add(0.41, 0.0)
    assert watch.broken and not watch.suspect and watch.words() == "4.1 times its first steps'"


def test_nothing_to_compare_with_is_no_divergence():
    watch = DivergenceWatch(with_base=True)
    for _ in range(2 * WINDOW):
        watch.add(1.0, 0.0)
    assert not watch.broken and not watch.suspect


# ---- pace


def told(seconds: list[float], on_gpu: bool = True) -> list[tuple[int, str]]:
    """The steps, from 1, at which something was said."""
    watch = PaceWatch(on_gpu)
    notes = [(step, watch.add(step, s)) for step, s in enumerate(seconds, 1)]
    return [(step, note) for step, note in notes if note]


START = [9.0] * SETTLING_STEPS + [0.9] * PACE_WINDOW  # steps 1 to 26


def test_steps_that_become_slow_are_told_once():
    ((step, note),) = told(START + [0.9] * 93 + [4.1] * 200)
    assert step == 119 + PACE_WINDOW // 2 + 1  # the first at which the median is one of the slow ones
    assert note.startswith("steps take 4.1 s since step 120, 0.9 s before. Likely the GPU's memory is full")
    assert "gradient_checkpointing" in note and "GPU" not in told(START + [4.1] * 40, on_gpu=False)[0][1]


@pytest.mark.parametrize(
    "seconds",
    [
        START + [2.6] * 100,  # less than three times as slow
        START + [0.9, 0.9, 30.0] * 50,  # single pauses
        [9.0] * SETTLING_STEPS + [0.9] * 100,  # slow only while it settles
        [s / 20 for s in START] + [0.2] * 100,  # four times as slow, but nobody waits
        START[:-1],
    ],
)
def test_an_even_pace_is_not_mentioned(seconds: list[float]):
    assert told(seconds) == []


# ---- a training


@pytest.fixture(scope="module")
def dogs() -> ConceptFusion:
    concepts = []
    for key in ("rex", "max"):
        name, identity = SUBJECTS[key]
        photos = reference_photos(identity, seed=1, count=2, size=FUSING.size)
        masks = tuple(mask.float() for _, mask in photos)
        concepts.append(Concept(name.token, name.noun, tuple(image for image, _ in photos), masks))
    return ConceptFusion(concepts, config=FUSING.replace(count=2, size=64))


def test_a_run_of_an_absurd_rate_is_never_saved(dogs, tmp_path: Path, caplog):
    """Its loss stays finite: the UNet's last layers, which aren't trained, bound what it can predict."""
    config = TRAINING.replace(steps=9, batch_size=1, prior_batch_size=0, lora_lr=0.3, save_every=8, device="cpu")
    with pytest.raises(TrainingDiverged, match=r"base model's.*No weights are saved\. Lower lora_lr \(now 0.3\)"):
        train(small_base(), dogs, config, tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert len(metrics) == 9 and all(m["finite"] and m["base_denoising"] > 0 for m in metrics)
    assert not (tmp_path / "weights.safetensors").exists() and newest_step(tmp_path / "checkpoints") == 0
    assert "Step 8 isn't saved: the loss is" in caplog.text
