"""What a training will cost: counted to the picture, measured on its own steps, and nothing is left of the trial."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from far_train.data.concepts import ClassPicture
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models.conditioning import TextConditioner
from far_train.training.estimate import TRIAL_SAMPLING, TRIAL_STEPS, Cost, LiveBytes, measure_cost
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import Interrupted
from far_train.utils.wording import Countdown, duration, rate, size_in_words

CONFIG = TrainConfig(steps=40, sample_every=10, sample_steps=2, num_class_images=7, device="cpu")


def test_steps_and_pictures_are_counted(base, fusion):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    cost = measure_cost(base, fusion, CONFIG)
    assert (cost.steps, cost.encoded, cost.drawn, cost.sampled) == (40, 12 + 4, 0, 4 * 3)
    assert cost.step_seconds > 0 and cost.encode_seconds > 0 and cost.sample_seconds > 0
    assert all(torch.equal(before[k], v) for k, v in base.unet.state_dict().items())
    assert not TextConditioner(base).has_placeholders
    expected = 40 * cost.step_seconds + 16 * cost.encode_seconds + 12 * cost.sample_seconds
    assert cost.seconds == pytest.approx(expected)


def test_memory_is_that_of_the_weights_in_the_trainings_precision(base, concepts):
    small = ConceptFusion(concepts, config=FusionConfig(size=64, count=1))  # whose activations are few beside them
    weights = sum(p.nbytes for module in (base.unet, *base.text_encoders) for p in module.parameters())
    config = CONFIG.replace(batch_size=1, prior_batch_size=0)
    fp32, bf16 = (measure_cost(base, small, config.replace(precision=p)).memory for p in ("fp32", "bf16"))
    assert fp32 - bf16 >= weights / 2


def test_disk_counts_what_is_saved(base, concepts):
    bare = ConceptFusion(concepts, config=FusionConfig(size=128, count=3))
    without = CONFIG.replace(prior_batch_size=0, sample_every=0)
    plain = measure_cost(base, bare, without).disk
    checkpoint = plain - measure_cost(base, bare, without.replace(keep_checkpoints=1)).disk
    assert plain == 2 * checkpoint + checkpoint // 6  # each holds value and two moments in fp32; weights are in fp16
    pictures = measure_cost(base, bare, CONFIG).disk - plain
    assert pictures == (7 + 4 * 3) * 3 * 128 * 128


def test_regularization_images_of_earlier_runs_are_not_counted(base, concepts, tmp_path: Path):
    bare = ConceptFusion(concepts, config=FusionConfig(size=64, count=3))
    config = CONFIG.replace(class_image_cache=str(tmp_path / "cache"), class_image_steps=1, precision="bf16")
    config = config.replace(batch_size=1, prior_batch_size=1, num_class_images=2)  # few: a CPU takes long for them
    train(base, bare, config.replace(steps=1, sample_every=0), tmp_path / "run")
    cost = measure_cost(base, bare, config)
    assert (cost.drawn, cost.encoded) == (0, 3 + 2)
    more = measure_cost(base, bare, config.replace(num_class_images=4))
    assert (more.drawn, more.encoded) == (2, 3 + 4)
    assert measure_cost(base, bare, config.replace(class_image_steps=2)).drawn == 2  # they look otherwise


def test_images_that_an_8_bit_base_drew_are_not_counted_either(base, concepts, tmp_path: Path):
    bare = ConceptFusion(concepts, config=FusionConfig(size=128, count=3))
    config = CONFIG.replace(class_image_cache=str(tmp_path), class_image_steps=1, fp8_base=True)
    train(base, bare, config.replace(steps=1, sample_every=0), tmp_path / "run")
    assert measure_cost(base, bare, config).drawn == 0


def test_what_is_done_already_is_not_counted_again(base, concepts):
    bare = ConceptFusion(concepts, config=FusionConfig(size=128, count=3))
    cost = measure_cost(base, bare, CONFIG)
    assert (cost.drawn, cost.encoded) == (7, 3 + 7)  # one noun, seven class pictures
    assert cost.draw_seconds > cost.sample_seconds  # 50 sampling steps against 2
    resumed = measure_cost(base, bare, CONFIG, steps_done=25, is_checked=True)
    assert (resumed.steps, resumed.sampled, resumed.drawn) == (15, 3, 0)
    assert (cost.checked, resumed.checked) == (0, 4 * 3)  # four of both together, and of each alone
    assert resumed.encoded == 3 + 7  # they are on disk, but every session encodes anew
    without = measure_cost(base, bare, CONFIG.replace(prior_batch_size=0, sample_every=0))
    assert (without.drawn, without.encoded, without.sampled) == (0, 3, 0)


def test_settings_that_save_memory_are_seen_to_do_so(base, fusion):
    plain, lean, small = (
        measure_cost(base, fusion, CONFIG.replace(**s)).memory
        for s in ({}, {"gradient_checkpointing": True}, {"micro_batch": 1})
    )
    assert lean < plain and small < plain


def test_a_trial_leaves_no_files_and_can_be_stopped(base, fusion, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(Interrupted):
        measure_cost(base, fusion, CONFIG, should_stop=lambda: True)
    assert list(tmp_path.iterdir()) == []


ENCODING = 4 + 1  # it is asked before each of four pictures, and after the last
STEPS = 1 + TRIAL_STEPS
DRAWING = len(TRIAL_SAMPLING) + sum(TRIAL_SAMPLING)


@pytest.mark.parametrize("moment", [ENCODING, ENCODING + STEPS - 1, ENCODING + STEPS, ENCODING + STEPS + DRAWING - 1])
def test_it_can_be_stopped_between_its_steps_and_while_it_draws(base, fusion, moment):
    asked = itertools.count()
    with pytest.raises(Interrupted):
        measure_cost(base, fusion, CONFIG, should_stop=lambda: next(asked) == moment)
    assert next(asked) == moment + 1 and not TextConditioner(base).has_placeholders


def test_live_bytes_by_hand():
    layer, x = nn.Linear(10, 10, bias=False), torch.ones(100, 10)
    size = 100 * 10 * 4
    with LiveBytes() as counted:
        y = layer(x)  # the weight and x were there before
        assert counted.now == size
        y = y.exp()  # keeps its result for the backward pass; the layer's own output is gone
        assert counted.now == size and counted.peak == 2 * size
        z = y.view(10, 100)  # the same memory
        assert counted.now == size
        del y, z
        assert counted.now == 0
    with LiveBytes() as plain:
        layer(x).exp().exp().exp().sum().backward()
    with LiveBytes() as lean:
        y = checkpoint(lambda x: layer(x).exp().exp().exp(), x.clone().requires_grad_(), use_reentrant=False)
        assert lean.now < plain.peak / 1.5
        y.sum().backward()  # runs again, and that is counted, too
    assert lean.peak >= plain.peak


def test_the_words():
    cost = Cost("cuda", 1000, 0.5, 500, 0.1, 200, 3.0, 12, 6, 4.0, 6_100_000_000, 640_000_000)
    assert cost.words.splitlines() == [
        "regularization images to draw: 200, 10 min",
        "pictures to encode: 500, 50 s; fewer if earlier runs have kept them",
        "steps: 1000, 8 min (0.50 s each)",
        "sample pictures: 12, 48 s",
        "pictures for the check: 6, 24 s",
        "in all: 20 min on cuda",
        "memory: about 6.1 GB; disk: about 640 MB",
    ]
    assert [duration(s) for s in (40, 200, 12_000)] == ["40 s", "3 min", "3 h 20 min"]
    assert [rate(s) for s in (0.4, 4.0)] == ["2.5 steps/s", "4.0 s/step"]
    times = iter((100.0, 110.0, 130.0, 500.0))
    countdown = Countdown(lambda: next(times))
    told = [countdown.words(done, 32) for done in (10, 11, 12, 32)]  # 10 were there before
    assert told == ["10 of 32", "11 of 32, 4 min left", "12 of 32, 5 min left", "32 of 32"]
    assert size_in_words(51e6) == "51 MB"


def test_class_pictures_of_the_user_are_not_drawn(base, concepts):
    priors = [ClassPicture("ball", torch.rand(96, 96, 3)) for _ in range(2)]
    cost = measure_cost(base, ConceptFusion(concepts, priors, (), FusionConfig(size=128, count=3)), CONFIG)
    assert (cost.drawn, cost.encoded) == (0, 3 + 2)
