"""Class pictures that a training draws: few steps, and kept for the runs that come after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from far_train.data.fusion import ConceptFusion
from far_train.data.images import load_photo
from far_train.data.settings import FusionConfig
from far_train.models.base import BaseModel
from far_train.models.loading import load_base
from far_train.models.settings import SampleConfig
from far_train.models.weights import FarWeights
from far_train.training import class_images
from far_train.training.class_images import (
    EVERYDAY_SCENES,
    EmptyScene,
    parse_scenes,
    prior_key,
    prior_sampling,
    scene_path,
)
from far_train.training.recipe import train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError

CONFIG = TrainConfig(steps=1, num_class_images=2, class_image_steps=1, sample_every=0, device="cpu")


def test_runs_with_the_same_inputs_share_them(tiny_folder, concepts, tmp_path: Path, monkeypatch):
    bare = ConceptFusion(concepts, (), (), FusionConfig(size=128, count=2))
    config = CONFIG.replace(class_image_cache=str(tmp_path / "cache"))
    train(load_base(tiny_folder), bare, config, tmp_path / "one")
    assert not (tmp_path / "one" / "priors").exists()
    pictures = sorted(p.name for p in (tmp_path / "cache").glob("*/ball/*"))
    assert pictures == ["0000.png", "0001.png"]

    def refuse(*_args, **_kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(class_images, "draw_pictures", refuse)
    train(load_base(tiny_folder), bare, config.replace(steps=2), tmp_path / "two")
    assert read_metrics(tmp_path / "two" / "metrics.jsonl")[1]["prior"] > 0
    with pytest.raises(AssertionError, match="drawn again"):
        train(load_base(tiny_folder), bare, config.replace(class_image_steps=2), tmp_path / "three")
    # The cache is this machine's affair: it shapes no result and doesn't travel with the weights.
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = config.replace(class_image_cache=str(tmp_path / "moved"))
    train(load_base(tiny_folder), bare, moved, tmp_path / "one", resume=True)
    assert FarWeights.load(tmp_path / "two" / "weights.safetensors").provenance.config["class_image_cache"] is None


def test_the_key_is_of_all_that_shapes_a_picture(base: BaseModel):
    sampling = prior_sampling(CONFIG)
    keys = {
        prior_key(base, sampling, 128),
        prior_key(base, sampling, 192),
        prior_key(base, sampling.replace(sample_seed=1), 128),
        prior_key(base, sampling.replace(sampling_steps=9), 128),
        prior_key(base, sampling.replace(guidance=2.0), 128),
    }
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.add_(0.01)
    keys.add(prior_key(base, sampling, 128))
    assert len(keys) == 6
    assert prior_key(base, sampling.replace(sample_batch=1), 128) in keys  # side by side or not, they are the same


def test_pictures_are_read_when_they_are_asked_for(base: BaseModel, tmp_path: Path, monkeypatch):
    """A training needs each only once, and hundreds would take gigabytes."""
    read = []
    monkeypatch.setattr(class_images, "load_photo", lambda path: read.append(path) or load_photo(path))
    config = SampleConfig(sampling_steps=1)
    pictures = class_images.draw_class_images(base, ["ball", "cup"], 2, tmp_path, config, size=64)
    assert len(pictures) == 4 and not read
    assert [p.noun for p in pictures] == ["ball", "ball", "cup", "cup"] and len(read) == 4
    assert torch.equal(pictures[-1].image, load_photo(tmp_path / "cup" / "0001.png").image)


def test_few_steps_are_the_default():
    sampling = prior_sampling(TrainConfig())
    assert (sampling.sampler, sampling.sampling_steps) == ("dpm++", 20)
    assert SampleConfig().sampler == "ddim"


def test_both_samplers_draw_and_differ(base: BaseModel, tmp_path: Path):
    drawn = [
        class_images.draw_class_images(
            base, ["ball"], 1, tmp_path / s, SampleConfig(sampler=s, sampling_steps=3), size=128
        )
        for s in ("ddim", "dpm++")
    ]
    assert all(p[0].image.shape == (128, 128, 3) and p[0].image.std() > 0 for p in drawn)
    assert not torch.equal(drawn[0][0].image, drawn[1][0].image)


# ---- empty scenes


def test_scenes_are_read_a_line_each():
    lines = ["an empty beach | on the  beach", "", "  an empty room", "a wall with a bar | in a bar | at night", "|"]
    assert parse_scenes(lines) == [
        EmptyScene("an empty beach", "on the beach"),
        EmptyScene("an empty room", ""),
        EmptyScene("a wall with a bar", "in a bar | at night"),
    ]
    everyday = parse_scenes(EVERYDAY_SCENES.splitlines())
    assert len(everyday) == 12 and all(scene.phrase for scene in everyday)
    for bad, words in (
        (["", " | "], "scenes: there are none"),
        (["a beach", "| at sea"], "scenes: line 2 says nothing"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_scenes(bad)


def test_files_of_scenes_stay_in_their_folder_and_apart(tmp_path: Path):
    prompts = ["an empty beach", "an empty beach!", "../../etc/passwd", "C:\\x", "ein leerer Strand", "空", "a" * 500]
    paths = [scene_path(tmp_path, prompt, 0) for prompt in prompts]
    assert len(set(paths)) == len(prompts)
    assert all(p.parent == tmp_path and len(p.name) < 80 and p.name.isascii() for p in paths)


def test_scenes_are_drawn_once_with_the_words_of_each(base: BaseModel, tmp_path: Path):
    config = SampleConfig(sampling_steps=1)
    scenes = [EmptyScene("a beach", "by the sea"), EmptyScene("a wall"), EmptyScene("a beach", "on sand")]
    counts = []
    drawn = class_images.draw_empty_scenes(
        base, scenes, 2, tmp_path, config, size=64, on_progress=lambda *count: counts.append(count)
    )
    assert [b.phrase for b in drawn] == ["by the sea", "by the sea", "", "", "on sand", "on sand"]
    assert len(list(tmp_path.glob("*.png"))) == 4 and counts[-1] == (4, 4)
    assert torch.equal(drawn[0].image, drawn[4].image)
    assert not torch.equal(drawn[0].image, drawn[1].image) and not torch.equal(drawn[0].image, drawn[2].image)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    more = class_images.draw_empty_scenes(base, scenes[:1], 3, tmp_path, config, size=64)
    assert len(more) == 3 and all(torch.equal(a.image, b.image) for a, b in zip(more, drawn[:2]))
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
