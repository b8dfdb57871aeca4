"""The demo: the full pipeline in the small world, from photos of two look-alikes to new pictures of both.

It runs the same code as for Stable Diffusion on the small models that come with the package: extraction with SAM,
regularization images drawn by the base, Concept Fusion, training, sampling. In this world every picture can also be
judged, because the identities are known. Pictures are shown uncurated, with seeds 0, 1, 2 …
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.captions import Name, join_phrases
from ..data.concepts import Composite, Concept, TrainingSet
from ..data.dataset import write_dataset
from ..data.folders import list_photos
from ..data.fusion import ConceptFusion
from ..data.images import load_photo, save_picture, to_pil
from ..data.subjects import SubjectExtractor, extract_folder
from ..evaluation.attention_focus import attention_maps, heat_over
from ..evaluation.sheets import Page, checkerboard, contact_sheet, dataset_sheet, loss_curves, picture_grid
from ..models.apply import apply_weights
from ..models.base import BaseModel
from ..models.conditioning import plain_vocabulary
from ..models.sampling import draw_pictures
from ..models.tokens import Vocabulary
from ..training.recipe import Callbacks, train
from ..training.run_folder import METRICS_FILE, read_metrics
from ..training.settings import TrainConfig
from ..utils.devices import choose_device
from ..utils.files import check_empty
from .identity import Identity, describe
from .materials import cut_class_pictures, draw_places
from .oracle import read_pictures
from .scenery import PLACES
from .shipped import (
    DRAWING,
    FUSING,
    PLAIN_LOSS,
    SUBJECTS,
    TRAINING,
    sample_photos,
    small_base,
    small_oracle,
    small_sam,
)
from .verdicts import Verdict, judge_subjects

log = logging.getLogger(__name__)

PAIR = ("rex", "max")
CLASS_PICTURES, COMPOSITES, EMPTY_SCENES = 48, 120, 2  # empty scenes: of each place
PLACES_SHOWN = ("beach", "moon", "kitchen", "snow")
PICTURES_EACH = 4
# Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): the same regularization images and steps, but unchanged
# photos with one subject in each, the unmasked loss, and only K and V trainable.
ORIGINALS_ONLY = {"original": 1.0}
RIVAL = TRAINING.replace(trainable="kv", **PLAIN_LOSS)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shown:
    """Pictures of one model with the oracle's verdict on each."""

    title: str
    pictures: Tensor
    verdicts: tuple[Verdict, ...]

    @property
    def labels(self) -> list[str]:
        return [v.words for v in self.verdicts]

    @property
    def score(self) -> str:
        right, n = sum(v.right for v in self.verdicts), len(self.verdicts)
        return f"{self.title}: joint accuracy {right} of {n} pictures"


def run_demo(out: Path, device: str, on_progress: Progress = lambda phase, done, total: None) -> Path:
    """Run all stages below ``out`` and return the page that shows them.

    Raises OutputError if ``out`` isn't an empty folder, BaseModelError if the small models' weights aren't there.
    """
    check_empty(out)
    base, sam, oracle = small_base().to(choose_device(device)[0]), small_sam(), small_oracle()
    names = [SUBJECTS[key][0] for key in PAIR]
    identities = [SUBJECTS[key][1] for key in PAIR]
    page = Page("Fuse-and-Refine: two look-alikes, from photos to pictures")
    page.section(
        "About this page",
        "A small diffusion model with the architecture of Stable Diffusion 2.1, trained from scratch on drawn "
        "pictures, learns two dogs that it has never seen, on this machine. The code is the same as for the real "
        "model, but the small one knows only its drawn world (docs/explanation/small-models.md), so these pictures say "
        "nothing about the quality of the real one. All pictures are uncurated, with seeds 0, 1, 2 …",
    )
    extractor = SubjectExtractor(sam)
    concepts = [_concept(key, out, extractor, page, on_progress) for key in PAIR]
    priors = cut_class_pictures(
        base,
        extractor,
        ["dog"],
        CLASS_PICTURES,
        out / "class",
        on_progress=lambda *a: on_progress("regularization images", *a),
    )
    page.section("Regularization images", "Dogs drawn by the base. They preserve the meaning of 'dog' during training.")
    page.picture(picture_grid([p.image for p in priors[:16]], columns=8, cell=120))
    scenes = draw_places(base, EMPTY_SCENES, out / "scenes", lambda *a: on_progress("empty scenes", *a))

    settings = FUSING.replace(count=COMPOSITES)
    fused = write_dataset(
        ConceptFusion(concepts, priors, scenes, settings),
        out / "dataset",
        on_progress=lambda *a: on_progress("fusing", *a),
    )
    originals = ConceptFusion(concepts, priors, (), settings.replace(layout_weights=ORIGINALS_ONLY))
    page.section(
        "Concept Fusion",
        "Subjects recombined on empty scenes drawn by the base. Colors show the mask of each mention.",
    )
    page.picture(dataset_sheet([fused.composite(i) for i in range(16)], names, columns=4, cell=240))

    prompts = [(f"a photo of {join_phrases(names)}, {PLACES[place][0]}", place) for place in PLACES_SHOWN]
    title = "The base, prompted with 'a dog and another dog'"
    shown = [_judged(title, base, None, prompts, identities, oracle, on_progress)]
    probe = next(c for c in (fused.composite(i) for i in range(COMPOSITES)) if c.layout == "pair")
    heats = []
    for title, training_set, config, folder in (
        ("Custom Diffusion", originals, RIVAL, "run-custom-diffusion"),
        ("Fuse-and-Refine", fused, TRAINING, "run-far"),
    ):
        taught, vocabulary = _train(title, training_set, config.replace(device=device), out / folder, page, on_progress)
        shown.append(_judged(title, taught, vocabulary, prompts, identities, oracle, on_progress))
        heats += _heat(title, taught, vocabulary, probe)

    page.section(
        "Cross-attention of each placeholder token",
        "Attention maps of the two placeholder tokens on a noised composite: first for Custom Diffusion, then for "
        "Fuse-and-Refine, whose refinement loss keeps each token's attention on its own subject.",
    )
    maps, labels = zip(*heats)
    page.picture(contact_sheet(maps, labels, columns=3, cell=240))
    page.section(
        "Both in one picture",
        f"'{prompts[0][0]}' and so on. The label is the oracle's verdict: a picture is right if it shows exactly these "
        "two, each with its own attributes, in the place of the prompt.",
    )
    for result in shown:
        sheet = picture_grid(result.pictures, result.labels, columns=8, cell=160)
        page.picture(sheet, result.score)
        log.info("%s", result.score)
    save_picture(out / "main-grid.png", _as_picture(shown))
    page.save(out / "index.html")
    return out / "index.html"


def _as_picture(shown: Sequence[Shown]) -> Tensor:
    """One picture with a row for each model, as shown in the README."""
    return torch.cat([torch.cat(list(result.pictures[::2]), 1) for result in shown])


def _concept(key: str, out: Path, extractor: SubjectExtractor, page: Page, on_progress: Progress) -> Concept:
    name, identity = SUBJECTS[key]
    photos, subjects = out / "photos" / key, out / "subjects" / key
    for photo in sample_photos(key):
        save_picture(photos / f"{photo.name}.png", photo.image)
    extract_folder(photos, subjects, extractor, progress=lambda *a: on_progress("extracting", *a))
    found = [load_photo(p) for p in list_photos(subjects)]
    page.section(f"{name.token}: {describe(identity)}", "The photos, and the subject that SAM extracted from each.")
    page.picture(picture_grid([p.image for p in found], columns=5, cell=200))
    page.picture(contact_sheet([checkerboard(p.image, p.mask) for p in found], columns=5, cell=200))
    return Concept(name.token, name.noun, tuple(p.image for p in found), tuple(p.mask for p in found))


def _train(
    title: str, training_set: TrainingSet, config: TrainConfig, folder: Path, page: Page, on_progress: Progress
) -> tuple[BaseModel, Vocabulary]:
    callbacks = Callbacks(on_phase=on_progress, on_step=lambda step, _: on_progress(title, step, config.steps))
    base = small_base()  # training leaves it unchanged, on the training device
    weights = train(base, training_set, config, folder, callbacks=callbacks)
    page.section(f"Training: {title}")
    page.picture(loss_curves(read_metrics(folder / METRICS_FILE)))
    return base, apply_weights(weights, base)


def _judged(
    title: str,
    base: BaseModel,
    vocabulary: Vocabulary | None,
    prompts: Sequence[tuple[str, str]],
    identities: Sequence[Identity],
    oracle: Any,
    on_progress: Progress,
) -> Shown:
    """Draw every prompt several times and judge the pictures. Without a vocabulary, prompts have bare nouns."""
    texts = [text for text, _ in prompts]
    if vocabulary is None:
        nouns = join_phrases([Name(i.noun) for i in identities])
        texts = [f"a photo of {nouns}, {PLACES[place][0]}" for _, place in prompts]
    pictures = draw_pictures(
        base,
        vocabulary or plain_vocabulary(base),
        _repeat(texts),
        DRAWING,
        on_progress=lambda *a: on_progress(f"{title}: drawing", *a),
    )
    places = _repeat([place for _, place in prompts])
    readings = read_pictures(oracle, pictures)
    return Shown(title, pictures, tuple(judge_subjects(identities, p, r) for p, r in zip(places, readings)))


def _repeat(values: Sequence[str]) -> list[str]:
    """Each value ``PICTURES_EACH`` times in a row."""
    return [value for value in values for _ in range(PICTURES_EACH)]


def _heat(title: str, base: BaseModel, vocabulary: Vocabulary, probe: Composite) -> list[tuple[Any, str]]:
    """The composite and the attention maps of its concepts, each with a label."""
    mentioned = [m.name for m in probe.mentions]
    maps = attention_maps(base, vocabulary, probe.image, probe.caption, mentioned)
    shown = [(to_pil(probe.image), f"{title}: {probe.caption}")]
    return shown + [
        (to_pil(heat_over(probe.image, heat)), name.token or name.noun) for name, heat in zip(mentioned, maps)
    ]
