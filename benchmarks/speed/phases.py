"""Measure each phase of a whole run on a part of its work, and scale it up to two concepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from far_train.data.concepts import ClassPicture
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.data.subjects import Prompt, SubjectExtractor
from far_train.mini.shipped import small_sam
from far_train.models.base import BaseModel
from far_train.models.conditioning import plain_vocabulary
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.training.class_images import prior_sampling
from far_train.training.latent_cache import cache_latents
from far_train.training.settings import TrainConfig
from far_train.utils.ahead import computed_ahead, threads_beside

from .work import POOL, our_run, random_concepts

PHOTOS = 5  # of each concept
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Phase:
    """``count`` times a ``unit`` that takes ``each`` seconds."""

    name: str
    unit: str
    count: int
    each: float

    @property
    def seconds(self) -> float:
        return self.count * self.each


def measure_phases(
    base: BaseModel,
    size: int,
    config: TrainConfig,
    loading: float,
    clock: Clock,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Phase]:
    """The phases of a run of two concepts at the defaults of ``config``; loading the base took ``loading`` seconds.

    ``clock(work)`` returns the seconds that ``work`` takes until the device has finished it.
    """
    names = ("class pictures", "extraction", "fusion", "training")
    phases = [Phase("load the base", "base", 1, loading)]
    pictures = config.num_class_images  # both concepts are dogs

    on_progress("phases", 0, len(names))
    sampling = prior_sampling(config)
    phases.append(Phase("class pictures", "picture", pictures, _drawing(base, size, sampling, clock)))

    on_progress("phases", 1, len(names))
    concepts = random_concepts(size, PHOTOS)
    extractor = SubjectExtractor(small_sam(base.device))
    photo = concepts[0].images[0]
    extractor.predict(photo, Prompt())
    seconds = clock(lambda: extractor.predict(photo, Prompt()))
    phases.append(Phase("extraction (with the small SAM)", "photo", PHOTOS * len(concepts), seconds))

    on_progress("phases", 2, len(names))
    fusion_config = FusionConfig(size=size)
    priors = [ClassPicture("dog", photo, concepts[0].masks[0])]
    fusion = ConceptFusion(concepts, priors, (), fusion_config)
    threads = threads_beside(base.device)

    def fuse() -> None:
        with computed_ahead(fusion.composite, 8 * threads, threads) as composites:
            for _ in composites:
                pass

    seconds = clock(fuse) / (8 * threads)
    phases.append(Phase("fusion", "composite", fusion_config.count, seconds))

    on_progress("phases", 3, len(names))
    with our_run(base, size, config) as run:
        data, vocabulary = run.state.training_set, run.state.vocabulary
        encode = clock(lambda: cache_latents(data, base, vocabulary, 1, seed=0)) / (2 * POOL)
        phases.append(Phase("encoding", "picture", fusion_config.count + pictures, encode))
        for _ in range(3):
            run.take_step()
        step = clock(lambda: [run.take_step() for _ in range(5)]) / 5
        steps = config.steps_for(len(concepts))
        phases.append(Phase("training", "step", steps, step))
        saves = steps // config.save_every
        phases.append(Phase("checkpoints", "checkpoint", saves, clock(run.save_checkpoint)))
        phases.append(Phase("weights", "file", 1, clock(run.save_weights)))
    on_progress("phases", len(names), len(names))
    return phases


def _drawing(base: BaseModel, size: int, sampling: SampleConfig, clock: Clock) -> float:
    """Seconds per picture of a batch, extrapolated from two and four sampling steps."""
    vocabulary = plain_vocabulary(base)
    prompts = ["a photo of a dog"] * sampling.sample_batch

    def draw(steps: int) -> None:
        draw_pictures(base, vocabulary, prompts, sampling.replace(sampling_steps=steps), size=(size, size))

    draw(2)
    two, four = clock(lambda: draw(2)), clock(lambda: draw(4))
    return (two + (four - two) / 2 * (sampling.sampling_steps - 2)) / len(prompts)
