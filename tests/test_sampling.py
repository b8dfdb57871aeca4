"""Drawing pictures: seeds, batches, sizes, progress."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from far_train.data.captions import Name
from far_train.models.adapters import CrossAttentionKV
from far_train.models.apply import applied_weights
from far_train.models.conditioning import TextConditioner
from far_train.models.conditioning import plain_vocabulary as plain
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.models.tokens import Vocabulary
from far_train.models.weights import FarWeights
from far_train.training.callbacks import Callbacks
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError

QUICK = SampleConfig(sampling_steps=2)


def test_a_picture_depends_on_its_seed_and_not_on_the_batch(base):
    prompts = ["a dog", "a cat", "a dog"]
    together = draw_pictures(base, plain(base), prompts, QUICK)
    alone = draw_pictures(base, plain(base), prompts, QUICK.replace(sample_batch=1))
    assert together.shape == (3, 128, 128, 3) and 0 <= together.min() and together.max() <= 1
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-3)
    third = draw_pictures(base, plain(base), ["a dog"], QUICK.replace(sample_seed=2))
    assert torch.allclose(third[0], together[2], atol=1e-4)


def test_sizes(base):
    assert draw_pictures(base, plain(base), ["a dog"], QUICK.replace(height=64, width=128)).shape[1:3] == (64, 128)
    assert draw_pictures(base, plain(base), ["a dog"], QUICK, size=(128, 64)).shape[1:3] == (128, 64)
    with pytest.raises(ConfigError, match="width: 100 px .* multiple of 64"):
        draw_pictures(base, plain(base), ["a dog"], QUICK.replace(width=100))
    with pytest.raises(ConfigError, match="size: 100 px"):
        draw_pictures(base, plain(base), ["a dog"], QUICK, size=(100, 100))


def test_progress_counts_all_steps_and_may_stop(base):
    seen = []
    draw_pictures(base, plain(base), ["a"] * 3, QUICK.replace(sample_batch=2), on_progress=lambda *a: seen.append(a))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        draw_pictures(base, plain(base), ["a"], QUICK, on_progress=stop)


def test_a_base_in_bf16_draws_learned_words(base):
    """The modifiers' rows stay in fp32, in training and in loaded weights alike."""
    base.to("cpu", torch.bfloat16)
    vocabulary = Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size)
    adapter = CrossAttentionKV(base, vocabulary)
    assert torch.isfinite(draw_pictures(base, vocabulary, ["a <my-dog> dog"], QUICK)).all()
    adapter.remove()


def test_unknown_tokens_are_warned_of(base, caplog):
    draw_pictures(base, plain(base), ["a <corgi-dog> dog"], QUICK)
    assert "<corgi-dog>, which no loaded concept has" in caplog.text


def test_prompts_are_encoded_once_and_with_gradients_where_modifiers_stand(base):
    vocabulary = Vocabulary(base.tokenizer, [Name("dog", "<my-dog>")], base.tokenizer_size)
    adapter = CrossAttentionKV(base, vocabulary)
    texts = ["a <my-dog> dog", "a dog", "a <my-dog> dog"]
    conditioner = TextConditioner(base)
    calls = []
    hook = base.text_encoders[0].register_forward_hook(lambda *_: calls.append(1))
    states = conditioner.encode([vocabulary.tokenize(t) for t in texts], (64, 64)).context
    assert len(calls) == 2 and torch.equal(states[0], states[2])
    states[1].detach()
    conditioner.encode([vocabulary.tokenize("a dog")], (64, 64))
    assert len(calls) == 2  # what can't change comes from the cache
    states.sum().backward()
    assert adapter.rows[0].grad.abs().sum() > 0
    hook.remove()
    adapter.remove()


@pytest.mark.parametrize("trainable", ["lora", "kv"])
def test_a_trainings_samples_are_what_the_saved_weights_draw(base, fusion, tmp_path, trainable):
    """There W x + Δ x, here (W + Δ) x with Δ from a file in fp16."""
    shown = []
    config = TrainConfig(
        steps=3,
        sample_every=3,
        sample_steps=2,
        sample_prompts=("a <red-ball> ball",),
        device="cpu",
        trainable=trainable,
    ).replace(lora_lr=2e-3, kv_lr=2e-3, embedding_lr=1e-2)
    train(base, fusion, config, tmp_path, callbacks=Callbacks(on_samples=lambda *sample: shown.append(sample)))
    ((_, prompts, samples),) = shown
    weights = FarWeights.load(tmp_path / "weights.safetensors")
    with applied_weights(weights, base) as vocabulary:
        drawn = draw_pictures(base, vocabulary, prompts, QUICK, size=(fusion.size,) * 2, like_ksampler=True)
    with applied_weights(weights, base, SampleConfig(strength=0)) as vocabulary:
        without = draw_pictures(base, vocabulary, prompts, QUICK, size=(fusion.size,) * 2, like_ksampler=True)
    gap = float((drawn - samples).abs().mean())
    assert gap < 0.1 * float((without - samples).abs().mean())


@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_most_steps_begin_at_full_noise(base, sampler):
    """With more, diffusers' spacing of the timesteps begins in the middle, or past the end."""
    (steps,) = (f for f in fields(SampleConfig) if f.name == "sampling_steps")
    scheduler = sampler.from_config(base.scheduler)
    scheduler.set_timesteps(steps.metadata["high"])
    assert 990 <= int(scheduler.timesteps[0]) < scheduler.config.num_train_timesteps
