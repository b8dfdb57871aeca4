"""Training sets of the other methods, built as published from the same photos and class pictures.

Each is a ``TrainingSet`` for the same recipe, so the arms differ only in what the methods differ in.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.nn import functional as F

from far_train.data.backgrounds import plain_background
from far_train.data.captions import write_caption
from far_train.data.concepts import Composite, Concept, TrainingSet
from far_train.data.images import Photo, from_pil, mask_from_pil, mask_to_pil, to_pil
from far_train.data.placement import cut_out, fit_inside, paste, place
from far_train.data.settings import ExtractConfig
from far_train.data.subjects import SubjectExtractor
from far_train.mini.identity import Identity
from far_train.mini.scenery import PLACES
from far_train.mini.world import render_scene

SEGMIX_SHARE = 0.3


class _Generated:
    """A training set whose pictures depend on (seed, index) alone."""

    kind = ""

    def __init__(self, concepts: Sequence[Concept], size: int, count: int, seed: int):
        self.concepts, self.size, self._count, self._seed = concepts, size, count, seed
        self.names = tuple(c.name for c in concepts)

    def digest(self) -> str:
        digest = hashlib.sha256(repr((self.kind, self.names, self.size, self._count, self._seed)).encode())
        for concept in self.concepts:
            for image in concept.images:
                digest.update(image.numpy().tobytes())
        return digest.hexdigest()

    def composite_count(self) -> int:
        return self._count

    def prior_count(self) -> int:
        return 0

    def prior(self, index: int) -> Composite:
        raise IndexError(index)

    def composite(self, index: int) -> Composite:
        raise NotImplementedError

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(self.kind.encode()), index])

    def _photo(self, rng: np.random.Generator) -> tuple[Concept, Image.Image, Image.Image]:
        concept = self.concepts[int(rng.integers(len(self.concepts)))]
        i = int(rng.integers(len(concept.images)))
        picture, mask = to_pil(concept.images[i]), mask_to_pil(concept.masks[i])
        if rng.random() < 0.5:
            picture, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (picture, mask))
        return concept, picture, mask


class ResizedPhotos(_Generated):
    """Custom Diffusion's pictures (Kumari et al. 2023, arXiv 2212.04488, section 3.2): one photo, shrunk or enlarged.

    Two thirds are shrunk to 0.4–1.0 of the canvas at a random place, and called "far away" below 0.6; one third is
    enlarged to 1.2–1.4, cropped, and called "close up". The loss counts the photo and not the grey around it: the
    mention's mask is the photo's rectangle, for a run with a background weight of 0.
    """

    kind = "resized photos"

    def composite(self, index: int) -> Composite:
        rng = self._rng(index)
        concept, picture, _ = self._photo(rng)
        share = rng.uniform(0.4, 1.0) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
        side = round(share * self.size)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        shift = self.size - side
        x, y = (int(rng.integers(min(shift, 0), max(shift, 0) + 1)) for _ in range(2))
        canvas = Image.new("RGB", (self.size, self.size), (128, 128, 128))
        canvas.paste(picture, (x, y))
        inside = Image.new("L", (self.size, self.size))
        inside.paste(255, (x, y, x + side, y + side))
        word = "far away" if share < 0.6 else "close up" if share > 1 else ""
        caption = write_caption([concept.name], rng, size_word=word)
        return Composite.build(from_pil(canvas), caption, [(concept.name, mask_from_pil(inside))], "original")


class SegMix(_Generated):
    """MuDI's pictures (Jang et al. 2024, arXiv 2404.04243, section 4.2): photos, and in 30 % two subjects cut out and
    put on a plain background, each fitted to half the canvas × U(0.75, 1), free to stand anywhere.

    Backgrounds have the colours of Concept Fusion's plain ones: with black ones the small base draws black pictures.
    """

    kind = "seg-mix, plain"

    def composite(self, index: int) -> Composite:
        rng = self._rng(index)
        if len(self.concepts) < 2 or rng.random() >= SEGMIX_SHARE:
            concept, picture, mask = self._photo(rng)
            picture, mask = picture.resize((self.size,) * 2), mask.resize((self.size,) * 2)
            caption = write_caption([concept.name], rng)
            return Composite.build(from_pil(picture), caption, [(concept.name, mask_from_pil(mask))], "original")
        chosen = [self.concepts[i] for i in rng.permutation(len(self.concepts))[:2]]
        cutouts = []
        for concept in chosen:
            i = int(rng.integers(len(concept.images)))
            fit = rng.uniform(0.75, 1.0) * self.size
            whole = cut_out(to_pil(concept.images[i]), mask_to_pil(concept.masks[i]))
            cutouts.append(fit_inside(whole, round(fit / 2), round(fit)))
        placed = place(cutouts, self.size, 0, 0.0, rng)
        ground, phrase = plain_background(self.size, rng)
        image, masks = paste(ground, placed, 0.0, 0)
        caption = write_caption([c.name for c in chosen], rng, background=phrase)
        return Composite.build(from_pil(image), caption, [(c.name, m) for c, m in zip(chosen, masks)], "pair")


class TrueScenes(_Generated):
    """The oracle arm's pictures: all subjects together, as the world draws them, in every place.

    All get the same room, so that the position doesn't give away the identity.
    """

    kind = "true scenes"

    def __init__(self, concepts: Sequence[Concept], identities: Sequence[Identity], size: int, count: int, seed: int):
        super().__init__(concepts, size, count, seed)
        self._identities = tuple(identities)

    def composite(self, index: int) -> Composite:
        rng = self._rng(index)
        order = [int(i) for i in rng.permutation(len(self._identities))[:3]]
        cast = [self._identities[i] for i in order]
        scene = render_scene(90_000 + self._seed, index, self.size, identities=cast, equal_room=True)
        mentioned = [int(i) for i in rng.permutation(len(order))]
        subjects = [(self.names[order[i]], scene.masks[i]) for i in mentioned]
        caption = write_caption([name for name, _ in subjects], rng, background=PLACES[scene.background][0])
        return Composite.build(scene.image, caption, subjects, "pair")


class _Changed:
    """A training set that changes the composites of another one."""

    kind = ""

    def __init__(self, training_set: TrainingSet):
        self._set = training_set
        self.names, self.size = training_set.names, training_set.size
        self.composite_count, self.prior_count = training_set.composite_count, training_set.prior_count
        self.prior = training_set.prior

    def digest(self) -> str:
        return hashlib.sha256(f"{self.kind} {self._set.digest()}".encode()).hexdigest()

    def composite(self, index: int) -> Composite:
        raise NotImplementedError


class TruePairs(_Changed):
    """FaR's training set with each composite of a pair replaced by a true picture of both.

    A control that separates the shortcomings of composites from the cost of learning each subject alone.
    """

    kind = "true pairs"

    def __init__(self, training_set: TrainingSet, scenes: TrueScenes):
        super().__init__(training_set)
        self._scenes = scenes

    def digest(self) -> str:
        return hashlib.sha256(f"{super().digest()} {self._scenes.digest()}".encode()).hexdigest()

    def composite(self, index: int) -> Composite:
        composite = self._set.composite(index)
        return self._scenes.composite(index) if composite.layout == "pair" else composite


class ShuffledMasks(_Changed):
    """A training set whose pictures of several subjects have the masks swapped.

    A control: it must be worse if the masks are what helps.
    """

    kind = "shuffled"

    def composite(self, index: int) -> Composite:
        composite = self._set.composite(index)
        mentions = composite.mentions
        moved = [replace(m, mask=mentions[i - 1].mask) for i, m in enumerate(mentions)]
        return replace(composite, mentions=tuple(moved))


def degrade(concept: Concept, seed: int) -> Concept:
    """A concept with masks as a poor segmenter gives them: two pixels too wide or too narrow, and a part missing."""
    rng = np.random.default_rng([seed, 0xDE6])
    masks = []
    for mask in concept.masks:
        sign = 1 if rng.random() < 0.5 else -1
        worn = sign * F.max_pool2d(sign * mask[None], 5, 1, 2)[0]
        rows, columns = worn.nonzero(as_tuple=True)
        point, half = int(rng.integers(len(rows))), round(0.2 * len(rows) ** 0.5)
        top, left = int(rows[point]), int(columns[point])
        worn[max(top - half, 0) : top + half, max(left - half, 0) : left + half] = 0
        masks.append(worn)
    return replace(concept, masks=tuple(masks))


def refine_masks(concept: Concept, sam: Any) -> Concept:
    """A concept whose masks a segment-anything model has refined.

    Raises SubjectError where it finds none.
    """
    extractor = SubjectExtractor(sam, ExtractConfig(use_masks="hint"))
    masks = []
    for i, (image, mask) in enumerate(zip(concept.images, concept.masks)):
        name = f"{concept.token}, photo {i + 1}"
        masks.append(extractor.extract(Photo(name, image, mask, Path(name))).mask)
    return replace(concept, masks=tuple(masks))
