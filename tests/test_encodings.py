"""Encoded images are found again by their content: after a stop, by the next training, never when they are wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.models.base import BaseModel
from far_train.models.loading import load_base
from far_train.models.tokens import Vocabulary
from far_train.training import encodings
from far_train.training.callbacks import Callbacks
from far_train.training.encodings import Encodings
from far_train.training.latent_cache import LatentCache, cache_latents
from far_train.training.recipe import train
from far_train.training.run_folder import ENCODINGS
from far_train.training.settings import TrainConfig
from far_train.utils.errors import Interrupted

from .cats import SIZE, fuse_cats

QUICK = TrainConfig(steps=2, sample_every=0, batch_size=2, prior_batch_size=1, device="cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetFolder:
    write_dataset(fuse_cats(), tmp_path / "cats")
    return DatasetFolder(tmp_path / "cats")


@pytest.fixture
def bare(tiny_folder: Path) -> BaseModel:
    return load_base(tiny_folder)


@pytest.fixture
def encoded(bare: BaseModel) -> list[int]:
    """How many images the base's VAE encoded in each call."""
    encode, counts = bare.vae.encode, []

    def count(pixels: torch.Tensor):
        counts.append(len(pixels))
        return encode(pixels)

    bare.vae.encode = count
    return counts


def cached(dataset: DatasetFolder, base, folder: Path | None, **given) -> LatentCache:
    words = Vocabulary(base.tokenizer, dataset.names, base.tokenizer_size, 1)
    if folder is None:
        return cache_latents(dataset, base, words, 4, seed=0, **given)
    with Encodings(folder, base.vae) as kept:
        return cache_latents(dataset, base, words, 4, seed=0, encodings=kept, **given)


def equal(one: LatentCache, other: LatentCache) -> bool:
    pairs = zip((*one.composites, *one.class_images), (*other.composites, *other.class_images))
    return all(torch.equal(a.latents, b.latents) for a, b in pairs)


def test_what_is_kept_is_what_would_be_encoded(dataset, bare, encoded, tmp_path: Path):
    without = cached(dataset, bare, None)
    first = cached(dataset, bare, tmp_path / "kept")
    assert sum(encoded) == 2 * (dataset.composite_count() + dataset.prior_count())
    encoded.clear()
    again = cached(dataset, bare, tmp_path / "kept")
    assert not encoded
    assert equal(without, first) and equal(without, again)


def test_only_an_edited_image_is_encoded(dataset, bare, encoded, tmp_path: Path):
    cached(dataset, bare, tmp_path / "kept")
    encoded.clear()
    Image.new("RGB", (SIZE, SIZE), (200, 30, 90)).save(tmp_path / "cats" / "composites" / "0000.png")
    edited = DatasetFolder(tmp_path / "cats")
    after = cached(edited, bare, tmp_path / "kept")
    assert sum(encoded) == 1
    assert equal(after, cached(edited, bare, None))


def test_another_vae_or_precision_finds_nothing(dataset, bare, tmp_path: Path):
    cached(dataset, bare, tmp_path / "kept")
    image = dataset.composite(0).image
    assert Encodings(tmp_path / "kept", bare.vae).find(image) is not None
    assert Encodings(tmp_path / "kept", bare.vae.to(torch.bfloat16)).find(image) is None
    bare.vae.to(torch.float32)
    with torch.no_grad():
        next(bare.vae.decoder.parameters()).add_(1)
    assert Encodings(tmp_path / "kept", bare.vae).find(image) is None


@pytest.mark.parametrize("place", [4, -3], ids=["header", "content"])
def test_a_damaged_file_is_not_used(dataset, bare, encoded, tmp_path: Path, place: int):
    right = cached(dataset, bare, tmp_path / "kept")
    (path,) = (tmp_path / "kept").rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)
    encoded.clear()
    assert equal(right, cached(dataset, bare, tmp_path / "kept"))
    assert sum(encoded) >= 1


def test_a_stop_keeps_what_is_encoded(dataset, bare, encoded, tmp_path: Path):
    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        cached(dataset, bare, tmp_path / "kept", on_progress=stop)
    encoded.clear()
    cached(dataset, bare, tmp_path / "kept")
    assert sum(encoded) == dataset.composite_count() + dataset.prior_count() - 3


def test_a_run_resumes_without_encoding_and_leaves_nothing_when_it_is_finished(dataset, bare, encoded, tmp_path: Path):
    steps = []
    callbacks = Callbacks(on_step=lambda step, _: steps.append(step), should_stop=lambda: len(steps) == 1)
    with pytest.raises(Interrupted):
        train(bare, dataset, QUICK, tmp_path / "run", callbacks=callbacks)
    assert list((tmp_path / "run" / ENCODINGS).rglob("*.safetensors"))
    encoded.clear()
    train(bare, dataset, QUICK, tmp_path / "run", resume=True)
    assert not encoded and not (tmp_path / "run" / ENCODINGS).exists()


def test_runs_share_a_folder_that_is_theirs_alone_to_know(dataset, bare, encoded, tmp_path: Path):
    shared = QUICK.replace(encoding_cache=str(tmp_path / "shared"))
    train(bare, dataset, shared, tmp_path / "one")
    encoded.clear()
    weights = train(bare, dataset, shared.replace(steps=1), tmp_path / "two")
    assert not encoded and not (tmp_path / "two" / ENCODINGS).exists()
    assert weights.provenance.config["encoding_cache"] is None  # files travel


def test_the_longest_unused_go_first(bare, tmp_path: Path, monkeypatch):
    images = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(4, 100, 100)
    monkeypatch.setattr(encodings, "MOST_BYTES", 700_000)  # two files of 320,000 bytes
    for number, image in enumerate(images):
        with Encodings(tmp_path, bare.vae) as kept:
            kept.keep(image, mean, mean)
        newest = max(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
        if number == 1:
            Encodings(tmp_path, bare.vae).find(images[0])  # used just now
    kept = Encodings(tmp_path, bare.vae)
    assert [kept.find(image) is not None for image in images] == [True, False, True]


def test_a_full_or_forbidden_place_is_said_and_costs_nothing_else(dataset, bare, tmp_path: Path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        right = cached(dataset, bare, tmp_path / "file" / "kept")
    assert "aren't kept" in caplog.text
    assert equal(right, cached(dataset, bare, None))


def test_a_file_larger_than_the_limit_stays(bare, tmp_path: Path, monkeypatch):
    images = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(encodings, "MOST_BYTES", 100_000)
    for image in images:
        with Encodings(tmp_path, bare.vae) as kept:
            kept.keep(image, *torch.zeros(2, 4, 100, 100))
    kept = Encodings(tmp_path, bare.vae)
    assert [kept.find(image) is not None for image in images] == [False, True]


def test_the_encodings_of_another_user_are_found(bare, tmp_path: Path, monkeypatch):
    image = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0))
    with Encodings(tmp_path, bare.vae) as kept:
        kept.keep(image, *torch.zeros(2, 4, 2, 2))

    def forbidden(*_: object) -> None:
        raise PermissionError("the file is another user's")

    monkeypatch.setattr(os, "utime", forbidden)
    assert Encodings(tmp_path, bare.vae).find(image) is not None
