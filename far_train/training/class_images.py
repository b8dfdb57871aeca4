"""Regularization images and empty backgrounds, drawn by the base model itself where the user has none."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.captions import Name, with_article, write_caption
from ..data.concepts import Background, ClassPicture, Composite, TrainingSet
from ..data.images import load_photo, save_picture
from ..models.base import BaseModel
from ..models.conditioning import plain_vocabulary
from ..models.fp8 import Fp8Layers
from ..models.sampling import draw_pictures
from ..models.settings import DrawConfig, SampleConfig
from ..utils.devices import choose_device
from ..utils.errors import ConfigError
from ..utils.seeding import derive_seed
from .distributed import World
from .settings import TrainConfig

log = logging.getLogger(__name__)


def draw_class_images(
    base: BaseModel,
    nouns: Sequence[str],
    count: int,
    folder: Path,
    config: DrawConfig,
    *,
    size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Sequence[ClassPicture]:
    """Draw ``count`` images of "a photo of a NOUN" for each noun into ``folder``/NOUN; those that exist are kept.

    ``size``: side in pixels, by default the base model's own. Image i of a noun depends on its seed alone, so that an
    interrupted call resumes. ``on_progress(done, total)`` counts images, ``on_step(done, total)`` the sampling steps of
    a batch; both may raise to stop.
    """
    each = [(noun, i) for noun in sorted(set(nouns)) for i in range(count)]
    wanted = [
        _Wanted(
            picture_path(folder, noun, i),
            f"a photo of {with_article(noun)}",
            derive_seed(config.sample_seed, f"class {noun}", i),
        )
        for noun, i in each
    ]
    _draw_missing(base, wanted, config, size, on_progress, on_step)
    return SavedClassImages([(noun, w.path) for (noun, _), w in zip(each, wanted)])


class SavedClassImages(Sequence[ClassPicture]):
    """Regularization images on disk, noun and path, that are read when they are asked for: together they are large."""

    def __init__(self, files: Sequence[tuple[str, Path]]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> ClassPicture:
        noun, path = self._files[index]
        return ClassPicture(noun, load_photo(path).image)


class EmptyScene(NamedTuple):
    """A background without a subject: the ``prompt`` that draws it, and the ``phrase`` that captions add for it, such
    as "on the beach", or ""."""

    prompt: str
    phrase: str = ""


# Places in which most subjects can stand, in the form that parse_scenes reads.
EVERYDAY_SCENES = """\
an empty beach by the sea | on the beach
an empty meadow in summer | in a meadow
an empty forest path | in a forest
an empty garden with a lawn | in a garden
an empty field covered with snow | in the snow
an empty desert with sand dunes | in the desert
an empty street in a city at daytime | in a city
an empty street in a city at night | in a city at night
an empty living room with a wooden floor | in a living room
an empty kitchen | in a kitchen
an empty wooden table in front of a wall | on a wooden table
empty mountains at sunset | in the mountains at sunset"""


def parse_scenes(lines: Sequence[str]) -> list[EmptyScene]:
    """Parse empty scenes, one a line: "an empty beach | on the beach". Blank lines are skipped; without a bar, captions
    don't mention the place. Raises ConfigError."""
    scenes = []
    for number, line in enumerate(lines, 1):
        prompt, _, phrase = (" ".join(part.split()) for part in line.partition("|"))
        if not prompt and phrase:
            raise ConfigError(
                f"scenes: line {number} says nothing before the bar; write what to draw, a bar, and what captions say "
                "of it: 'an empty beach | on the beach'"
            )
        if prompt:
            scenes.append(EmptyScene(prompt, phrase))
    if not scenes:
        raise ConfigError("scenes: there are none; write one a line, such as 'an empty beach | on the beach'")
    return scenes


def draw_empty_scenes(
    base: BaseModel,
    scenes: Sequence[EmptyScene],
    each: int,
    folder: Path,
    config: DrawConfig,
    *,
    size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Background]:
    """Draw ``each`` images of every scene into ``folder``, scene by scene; those that exist are kept.

    The other arguments are those of :func:`draw_class_images`.
    """
    wanted = [
        _Wanted(scene_path(folder, s.prompt, i), s.prompt, derive_seed(config.sample_seed, f"scene {s.prompt}", i))
        for s in scenes
        for i in range(each)
    ]
    _draw_missing(base, list(dict.fromkeys(wanted)), config, size, on_progress, on_step)
    return read_empty_scenes(scenes, each, folder)


def read_empty_scenes(scenes: Sequence[EmptyScene], each: int, folder: Path) -> list[Background]:
    """What :func:`draw_empty_scenes` has drawn. Raises PhotoError for a picture that isn't there."""
    files = ((scene_path(folder, scene.prompt, i), scene.phrase) for scene in scenes for i in range(each))
    return [Background(load_photo(path).image, phrase) for path, phrase in files]


class _Wanted(NamedTuple):
    path: Path
    prompt: str
    seed: int


def _draw_missing(
    base: BaseModel,
    wanted: Sequence[_Wanted],
    config: DrawConfig,
    size: int | None,
    on_progress: Callable[[int, int], None],
    on_step: Callable[[int, int], None],
) -> None:
    missing = [w for w in wanted if not w.path.exists()]
    vocabulary = plain_vocabulary(base)
    side = size or base.native_size
    for start in range(0, len(missing), config.sample_batch):
        batch = missing[start : start + config.sample_batch]
        on_progress(len(wanted) - len(missing) + start, len(wanted))
        pictures = draw_pictures(
            base,
            vocabulary,
            [w.prompt for w in batch],
            config,
            size=(side, side),
            seeds=[w.seed for w in batch],
            on_progress=on_step,
        )
        for w, picture in zip(batch, pictures):
            save_picture(w.path, picture)
    on_progress(len(wanted), len(wanted))


def prior_sampling(config: TrainConfig) -> SampleConfig:
    """How a training draws its regularization images.

    Such an image stands for its class, not for the result of a certain sampler, so a solver that needs few steps is
    good enough.
    """
    return SampleConfig(sampler="dpm++", sampling_steps=config.class_image_steps, sample_seed=config.train_seed)


def prior_key(base: BaseModel, sampling: SampleConfig, size: int) -> str:
    """Hex key of everything that decides what regularization image i of a noun looks like; their number doesn't.

    ``base`` as it draws them: in bf16 it draws other images than in fp32.
    """
    settings = sampling.replace(sample_batch=1).to_dict()
    about = [base.fingerprint, base.prediction_type, size, settings]
    about += ["zero terminal SNR"] if base.zero_terminal_snr else []
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def picture_path(folder: Path, noun: str, index: int) -> Path:
    """Where :func:`draw_class_images` saves image ``index`` of a noun."""
    return folder / noun.replace(" ", "_") / f"{index:04d}.png"


def scene_path(folder: Path, prompt: str, index: int) -> Path:
    """Where :func:`draw_empty_scenes` saves image ``index`` of a prompt.

    The name starts with the prompt's words, for people; a digest distinguishes prompts that share them.
    """
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:48]
    return folder / f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}-{index:04d}.png"


def with_class_images(
    training_set: TrainingSet,
    base: BaseModel,
    config: TrainConfig,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> WithClassImages:
    """A training set with the regularization images that ``config`` asks for; the main process draws them.

    They are saved in ``folder``, or in the config's ``class_image_cache``, where a run with the same inputs finds them.
    ``on_progress(done, total)`` may raise to stop, also within a batch of images.
    """
    sampling = prior_sampling(config)
    if config.class_image_cache:
        folder = cache_folder(base, config, training_set.size)

    def draw(report: Callable[[int, int], None] = lambda done, total: None) -> Sequence[ClassPicture]:
        last = (0, 1)

        def remember(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            report(*last)

        return draw_class_images(
            base,
            [n.noun for n in training_set.names],
            config.num_class_images,
            folder,
            sampling,
            size=training_set.size,
            on_progress=remember,
            on_step=lambda *_: report(*last),
        )

    world = World.current()
    if world.is_main_process:
        draw(on_progress)
    world.barrier()
    return WithClassImages(training_set, draw())


def count_missing(training_set: TrainingSet, base: BaseModel, config: TrainConfig) -> int:
    """How many regularization images :func:`with_class_images` would draw: all but those in ``class_image_cache``."""
    wanted = [(noun, i) for noun in {n.noun for n in training_set.names} for i in range(config.num_class_images)]
    if not config.class_image_cache:
        return len(wanted)
    device, dtype = choose_device(config.device, config.precision)
    with ExitStack() as undo:
        if config.fp8_base:
            undo.callback(Fp8Layers(base.unet, device).remove)
        undo.enter_context(base.placed(device, dtype))
        folder = cache_folder(base, config, training_set.size)
    return sum(not picture_path(folder, *each).exists() for each in wanted)


def cache_folder(base: BaseModel, config: TrainConfig, size: int) -> Path:
    """Where in its ``class_image_cache`` a training keeps the images of ``base``, as it draws them."""
    return Path(config.class_image_cache) / prior_key(base, prior_sampling(config), size)


class WithClassImages:
    """A training set with regularization images added."""

    def __init__(self, training_set: TrainingSet, pictures: Sequence[ClassPicture]):
        self._pictures = pictures
        self.names, self.size = training_set.names, training_set.size
        self.composite_count, self.composite = training_set.composite_count, training_set.composite
        self.digest = training_set.digest

    def prior_count(self) -> int:
        return len(self._pictures)

    def prior(self, index: int) -> Composite:
        picture = self._pictures[index]
        caption = write_caption([Name(picture.noun)], np.random.default_rng(index))
        return Composite(picture.image, caption, (), "prior")
