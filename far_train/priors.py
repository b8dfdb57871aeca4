"""Class pictures: what the base itself shows for a noun, drawn where the user brings none."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .backbone import BaseModel
from .captions import Name, with_article, write_caption
from .concepts import ClassPicture, Composite, TrainingSet
from .config import SampleConfig, TrainConfig
from .parallel import World
from .photos import load_photo, save_picture
from .pool import derive_seed
from .sampling import draw_pictures, plain_vocabulary

log = logging.getLogger(__name__)


def draw_class_pictures(
    base: BaseModel,
    nouns: Sequence[str],
    count: int,
    folder: Path,
    config: SampleConfig,
    *,
    size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClassPicture]:
    """Draw ``count`` pictures "a photo of a NOUN" per noun into ``folder``/NOUN; those that are there already stay.

    ``size``: side in pixels, default the base's own. Picture i of a noun depends on its seed alone, so an
    interrupted call goes on where it stopped. ``on_progress(done, total)`` counts pictures, ``on_step(done, total)``
    the sampling steps of a batch; both may raise to stop.
    """
    nouns = sorted(set(nouns))
    wanted = [(noun, i, picture_path(folder, noun, i)) for noun in nouns for i in range(count)]
    missing = [w for w in wanted if not w[2].exists()]
    vocabulary = plain_vocabulary(base)
    side = size or base.native_size
    for start in range(0, len(missing), config.sample_batch):
        batch = missing[start : start + config.sample_batch]
        on_progress(len(wanted) - len(missing) + start, len(wanted))
        pictures = draw_pictures(
            base,
            vocabulary,
            [f"a photo of {with_article(noun)}" for noun, _, _ in batch],
            config,
            size=(side, side),
            seeds=[derive_seed(config.sample_seed, f"class {noun}", i) for noun, i, _ in batch],
            on_progress=on_step,
        )
        for (_, _, path), picture in zip(batch, pictures):
            save_picture(path, picture)
    on_progress(len(wanted), len(wanted))
    return [ClassPicture(noun, load_photo(path).image) for noun, _, path in wanted]


def prior_sampling(config: TrainConfig) -> SampleConfig:
    """How a training draws its class pictures.

    A class picture stands for its class, not for one result of one sampler, so a solver that needs few steps will do.
    """
    return SampleConfig(sampler="dpm++", sampling_steps=config.prior_steps, sample_seed=config.train_seed)


def prior_key(base: BaseModel, sampling: SampleConfig, size: int) -> str:
    """Hex key of all that decides what class picture i of a noun looks like."""
    key = hashlib.sha256(json.dumps([base.prediction_type, size, sampling.replace(sample_batch=1).to_dict()]).encode())
    for part in (base.unet, base.text_encoder, base.vae):
        for name, weight in sorted(part.state_dict().items()):
            # Some values of every weight: a fine-tune changes them all, and hashing five gigabytes would take long.
            values = weight.detach().flatten()
            values = values[:: max(len(values) // 256, 1)].to("cpu", torch.float32).contiguous()
            key.update(f"{name} {weight.dtype}".encode() + values.view(torch.uint8).numpy().tobytes())
    return key.hexdigest()[:16]


def picture_path(folder: Path, noun: str, index: int) -> Path:
    """Where :func:`draw_class_pictures` keeps picture ``index`` of a noun."""
    return folder / noun.replace(" ", "_") / f"{index:04d}.png"


def with_class_pictures(
    training_set: TrainingSet,
    base: BaseModel,
    config: TrainConfig,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> WithPriors:
    """A training set with the class pictures that ``config`` asks for; of several processes, one draws.

    They go into ``folder``, or into the config's cache, where a run with the same inputs finds them.
    ``on_progress(done, total)`` may raise to stop, also within a batch of pictures.
    """
    sampling = prior_sampling(config)
    if config.prior_cache:
        folder = Path(config.prior_cache) / prior_key(base, sampling, training_set.size)

    def draw(report: Callable[[int, int], None] = lambda done, total: None) -> list[ClassPicture]:
        last = (0, 1)

        def remember(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            report(*last)

        return draw_class_pictures(
            base,
            [n.noun for n in training_set.names],
            config.prior_pictures,
            folder,
            sampling,
            size=training_set.size,
            on_progress=remember,
            on_step=lambda *_: report(*last),
        )

    world = World.current()
    if world.writes:
        draw(on_progress)
    world.wait()
    return WithPriors(training_set, draw())


class WithPriors:
    """A training set with class pictures added as its prior half."""

    def __init__(self, training_set: TrainingSet, pictures: Sequence[ClassPicture]):
        self._pictures = list(pictures)
        self.names, self.size = training_set.names, training_set.size
        self.composite_count, self.composite = training_set.composite_count, training_set.composite
        self.digest = training_set.digest

    def prior_count(self) -> int:
        return len(self._pictures)

    def prior(self, index: int) -> Composite:
        picture = self._pictures[index]
        caption = write_caption([Name(picture.noun)], np.random.default_rng(index))
        return Composite(picture.image, caption, (), "prior")
