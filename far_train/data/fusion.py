"""Concept Fusion: cut subjects out of their photos and recombine them into training pictures with captions and masks.

A reconstruction of the paper's data side (docs/explanation/method.md, Concept Fusion). A composite depends on (seed,
index) alone, so any of them can be built in any order and in any process.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from ..utils.errors import SubjectError, TokenError
from .backgrounds import cover, infill, plain_background
from .captions import Name, write_caption
from .concepts import Background, ClassPicture, Composite, Concept
from .images import from_pil, mask_from_pil, mask_to_pil, to_pil
from .masks import check_own_mask
from .placement import Cutout, cut_out, cut_sides, fit_inside, paste, place, place_in_row
from .settings import BACKGROUND_SHARES, LAYOUT_SHARES, MANY_CONCEPTS, FusionConfig

# Part of every digest. Raise it with any change to what composites of the same inputs look like.
ALGORITHM = 2
# A single subject's longer side as a share of the canvas: its range, and the sizes below and above which the caption
# says "far away" and "close up".
SINGLE_SIZE = (0.35, 0.90)
FAR_AWAY, CLOSE_UP = 0.45, 0.80
GROUP_SCALE_MIN = 0.9  # smallest random scale of three subjects or more; of two it is the setting pair_scale_min
ROW_WIDTH_MAX = 1.2  # a subject in a row, where neighbours may overlap, is at most so many even columns wide
GROUP_HEIGHT_MAX = 0.95  # of the canvas, so that a tall subject leaves some background above it

WHY_SKIPPED = {
    "beside_prior": "there are no regularization images with masks that show the whole subject",
    "pair": "it needs two concepts",
    "triple": "it needs three concepts",
}


@dataclass(frozen=True, eq=False)
class _Source:
    """A subject for composites of ``size`` pixels: its name and the photo it is cut from."""

    name: Name
    picture: Image.Image
    mask: Image.Image
    size: int
    label: str = ""  # how messages name the photo

    @cached_property
    def cut(self) -> tuple[str, ...]:
        """The sides of the photo that cut the subject off."""
        return cut_sides(np.asarray(self.mask) > 127)

    @property
    def is_whole(self) -> bool:
        """Whether it can be pasted. If the photo cuts it off at the bottom, it goes on the canvas's lower edge."""
        return set(self.cut) <= {"bottom"}

    @cached_property
    def cutout(self) -> Cutout:
        """The subject, no larger than the canvas, because rotating a large photo for every composite is slow."""
        whole = cut_out(self.picture, self.mask)
        return fit_inside(whole, self.size, self.size) if max(whole.extent) > self.size else whole

    @cached_property
    def scenery(self) -> Image.Image:
        """The photo with the subject filled in. Cached: filling in is slow, and many composites use it."""
        return infill(self.picture, self.mask, self.size)


class ConceptFusion:
    """A lazy ``TrainingSet`` of composites of ``concepts``, regularization images (``priors``) and ``backgrounds``.

    ``notes`` tells the user what is skipped and why. Raises ConfigError, TokenError, SubjectError.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        priors: Sequence[ClassPicture] = (),
        backgrounds: Sequence[Background] = (),
        config: FusionConfig = FusionConfig(),
    ):
        if not concepts:
            raise SubjectError("concepts: none given; add at least one concept with its photos")
        tokens = [c.token for c in concepts]
        for token in tokens:
            if tokens.count(token) > 1:
                raise TokenError(f"token: {token} names two concepts; give each its own token")
        self.config = config
        self.size = config.size
        self.names = tuple(c.name for c in concepts)
        self.notes: list[str] = []
        # Stored as 8-bit images, which take a quarter of the tensors' memory.
        self._references = [
            [
                _Source(c.name, to_pil(c.images[i]), mask_to_pil(c.masks[i]), self.size, c.label(i))
                for i in self._good_photos(c)
            ]
            for c in concepts
        ]
        self._pictures = [(Name(p.noun), to_pil(p.image)) for p in priors]
        self._prior_subjects = [
            _Source(name, picture, mask_to_pil(prior.mask), self.size)
            for i, (prior, (name, picture)) in enumerate(zip(priors, self._pictures))
            if prior.mask is not None
            and self._is_good(prior.mask, prior.label or f"regularization image {i + 1}", "mask is ignored")
        ]
        self._scenes = [(to_pil(b.image), b.phrase) for b in backgrounds]
        self._distractors = [s for s in self._prior_subjects if s.is_whole]
        self.layouts = self._available_layouts()
        self.background_kinds = self._available_backgrounds()
        self._pasted = [self._whole(sources) for sources in self._references]
        if cut := len(self._prior_subjects) - len(self._distractors):
            self.notes.append(f"{cut} regularization image(s) crop their subject, so it is not placed beside yours.")

    def _good_photos(self, concept: Concept) -> list[int]:
        """Indices of the photos with a usable mask. Raises SubjectError if there are none."""
        noted = len(self.notes)
        good = [i for i, mask in enumerate(concept.masks) if self._is_good(mask, concept.where(i), "photo is skipped")]
        if not good:
            reasons = "\n".join(f"  {note}" for note in self.notes[noted : noted + 5])
            raise SubjectError(f"concept {concept.token}: no photo has a usable mask:\n{reasons}")
        return good

    def _is_good(self, mask: Tensor, label: str, consequence: str) -> bool:
        try:
            check_own_mask(mask, self.config.masks)
        except SubjectError as e:
            self.notes.append(f"{label}: {e}; the {consequence}.")
            return False
        return True

    def _whole(self, sources: list[_Source]) -> list[_Source]:
        """A concept's photos that can be pasted; what happens to the others is noted."""
        token, whole = sources[0].name.token, [s for s in sources if s.is_whole]
        cut = [s.label for s in sources if not s.is_whole]
        if cut and not whole:
            self.notes.append(
                f"{token}: every photo crops the subject at a side, so composites show it with straight edges; add "
                "photos that show the whole subject."
            )
            return sources
        if cut:
            fate = "are used for 'original' only" if "original" in self.layouts else "are skipped"
            self.notes.append(f"{token}: photos that crop the subject at a side {fate}: {', '.join(cut)}.")
        if low := [s.label for s in whole if s.cut]:
            self.notes.append(
                f"{token}: subjects cropped at the bottom are placed on the lower edge: {', '.join(low)}."
            )
        return whole

    def digest(self) -> str:
        settings = self.config.result_shaping()
        digest = hashlib.sha256(json.dumps([ALGORITHM, settings], sort_keys=True).encode())
        for source in self._all_sources():
            _update(digest, source.name.phrase, source.picture, source.mask)
        for name, picture in self._pictures:
            _update(digest, name.phrase, picture)
        for picture, phrase in self._scenes:
            _update(digest, phrase, picture)
        return digest.hexdigest()

    def _all_sources(self) -> list[_Source]:
        return list(chain(*self._references, self._prior_subjects))

    def composite_count(self) -> int:
        return self.config.count

    def prior_count(self) -> int:
        return len(self._pictures)

    def composite(self, index: int) -> Composite:
        """Build composite ``index``; its layout is drawn by the configured shares."""
        rng = self._rng("composite", index)
        layout = _draw(rng, self.layouts)
        if layout == "original":
            return self._original(rng)
        if layout == "beside_prior":
            reference = self._pick(rng, self._pasted[int(rng.integers(len(self.names)))])
            return self._fuse(rng, layout, [reference, self._distractor(rng, reference.name.noun)])
        count = {"solo": 1, "pair": 2, "triple": 3}[layout]
        chosen = rng.permutation(len(self.names))[:count]
        return self._fuse(rng, layout, [self._pick(rng, self._pasted[int(c)]) for c in chosen])

    def prior(self, index: int) -> Composite:
        """Build regularization image ``index``: as it is, or (a share of them) two class subjects in one picture."""
        rng = self._rng("prior", index)
        name, picture = self._pictures[index % len(self._pictures)]
        if len(self._distractors) > 1 and rng.random() < self.config.prior_composites:
            first, second = rng.choice(len(self._distractors), 2, replace=False)
            fused = self._fuse(rng, "prior_composite", [self._distractors[first], self._distractors[second]])
            return Composite(fused.image, fused.caption, (), fused.layout)
        image, _ = cover(picture, None, self.size, rng)
        return Composite(from_pil(image), write_caption([name], rng), (), "prior")

    def _rng(self, stream: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.config.fusion_seed, zlib.crc32(stream.encode()), index])

    def _available_layouts(self) -> dict[str, float]:
        shares = self.config.layout_weights or LAYOUT_SHARES.get(len(self.names), MANY_CONCEPTS)
        missing = set()
        if not self._distractors:
            missing.add("beside_prior")
        if len(self.names) < 2:
            missing.add("pair")
        if len(self.names) < 3:
            missing.add("triple")
        whole = sum(shares.values())
        for layout, why in WHY_SKIPPED.items():
            if layout in missing and shares.get(layout):
                share = shares[layout] / whole
                self.notes.append(f"Layout '{layout}' ({share:.0%} of the composites) is skipped: {why}.")
        layouts = _available(shares, missing, "layout_weights")
        shown = {source.name.noun for source in self._distractors}
        others = [str(name.token) for name in self.names if name.noun not in shown]
        if "beside_prior" in layouts and others:
            self.notes.append(
                f"Layout 'beside_prior' shows {', '.join(others)} beside another class: no regularization image of its "
                "own class has a mask that shows the whole subject."
            )
        return layouts

    def _available_backgrounds(self) -> dict[str, float]:
        shares = self.config.background_weights or BACKGROUND_SHARES
        missing = set()
        if not self._scenes:
            missing.add("scene")
        if not self._prior_subjects:
            missing.add("prior")
        kinds = _available(shares, missing, "background_weights")
        if "scene" in missing and shares.get("scene"):
            filled = kinds.get("infilled", 0) + kinds.get("prior", 0)
            self.notes.append(
                f"No background pictures are given: {filled:.0%} of the backgrounds are photos with their subject "
                "filled in, which leaves a blurred outline; the others are plain colors. Empty scenes work better "
                "(--backgrounds; 'far_train scenes' or FaR Empty Scenes draws some)."
            )
        return kinds

    def _pick(self, rng: np.random.Generator, sources: list[_Source]) -> _Source:
        return sources[rng.integers(len(sources))]

    def _distractor(self, rng: np.random.Generator, noun: str) -> _Source:
        """A subject of this class; of any class, which is noted, where there is none."""
        return self._pick(rng, [s for s in self._distractors if s.name.noun == noun] or self._distractors)

    def _original(self, rng: np.random.Generator) -> Composite:
        source = self._pick(rng, self._references[int(rng.integers(len(self.names)))])
        image, mask = cover(source.picture, source.mask, self.size, rng)
        if rng.random() < self.config.flip:
            image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
        caption = write_caption([source.name], rng)
        return Composite.build(from_pil(image), caption, [(source.name, mask_from_pil(mask))], "original")

    def _fuse(self, rng: np.random.Generator, layout: str, sources: list[_Source]) -> Composite:
        """Paste the subjects onto a background.

        Caption order and position are drawn independently. Otherwise the model would learn that the subject mentioned
        first stands on the left.
        """
        canvas, phrase = self._background(rng)
        in_row = len(sources) > 1 and self.config.row_probability > 0 and rng.random() < self.config.row_probability
        extents = [self._extent(rng, s.cutout, len(sources), in_row) for s in sources]
        cutouts = [self._augment(rng, s.cutout, extent) for s, extent in zip(sources, extents)]
        if in_row:
            placed = place_in_row(cutouts, self.size, self.config.max_covered, rng, self.config.vertical_jitter)
        else:
            may_cover = self.config.max_covered if rng.random() < self.config.occlusion else 0.0
            margin = round(self.config.margin * self.size)
            placed = place(cutouts, self.size, margin, may_cover, rng, self.config.vertical_jitter)
        feather, erode = self.config.feather * self.size, round(self.config.erode * self.size)
        image, masks = paste(canvas, placed, feather, erode, self.config.shadow)
        size_word = ""
        if len(sources) == 1 and layout == "solo":
            share = max(placed[0].cutout.extent) / self.size
            size_word = "far away" if share < FAR_AWAY else "close up" if share > CLOSE_UP else ""
        order = rng.permutation(len(sources))
        subjects = [(sources[i].name, masks[i]) for i in order]
        caption = write_caption(
            [name for name, _ in subjects],
            rng,
            background=phrase,
            size_word=size_word,
            collage=rng.random() < self.config.collage_caption_probability,
        )
        return Composite.build(from_pil(image), caption, subjects, layout)

    def _extent(
        self, rng: np.random.Generator, cutout: Cutout, count: int, in_row: bool = False
    ) -> tuple[float, float]:
        """Room for one of ``count`` subjects: its largest width and height, as shares of the canvas.

        Each of several subjects gets an even column of the canvas, times a random scale. The room has the subject's own
        aspect ratio and the area of a square as wide as the column, so subjects of all shapes look equally large. A
        wide subject is then limited to the column, or ``ROW_WIDTH_MAX`` columns in a row, and a tall one to
        ``GROUP_HEIGHT_MAX`` of the canvas.
        """
        if count == 1:
            side = rng.uniform(*SINGLE_SIZE)
            return side, side
        scale = rng.uniform(self.config.pair_scale_min if count == 2 else GROUP_SCALE_MIN, 1.0)
        column, (width, height) = scale / count, cutout.extent
        stretch = math.sqrt(height / width)
        width_max = column * (ROW_WIDTH_MAX if in_row else 1)
        return min(width_max, column / stretch), min(column * stretch, scale * GROUP_HEIGHT_MAX)

    def _augment(self, rng: np.random.Generator, cutout: Cutout, extent: tuple[float, float]) -> Cutout:
        """Randomly mirror, rotate and brighten a subject, and scale it into ``extent``."""
        picture, mask = cutout.picture, cutout.mask
        if rng.random() < self.config.flip:
            picture, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (picture, mask))
        angle = rng.uniform(-self.config.rotation, self.config.rotation)
        gain = 1 + rng.uniform(-self.config.brightness, self.config.brightness)
        picture = ImageEnhance.Brightness(picture).enhance(gain)
        width, height = (round(share * self.size) for share in extent)
        return fit_inside(Cutout(picture, mask, cutout.baseline_y, cutout.on_edge), width, height, angle)

    def _background(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        kind = _draw(rng, self.background_kinds)
        if kind == "scene":
            picture, phrase = self._scenes[rng.integers(len(self._scenes))]
        elif kind == "plain":
            return plain_background(self.size, rng)
        else:
            sources = self._prior_subjects if kind == "prior" else list(chain(*self._references))
            picture, phrase = self._pick(rng, sources).scenery, ""
        image, _ = cover(picture, None, self.size, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, phrase


def _update(digest: hashlib._Hash, text: str, *pictures: Image.Image) -> None:
    digest.update(repr((text, [p.size for p in pictures])).encode())
    for picture in pictures:
        digest.update(picture.tobytes())


def _available(shares: dict[str, float], missing: Collection[str], field: str) -> dict[str, float]:
    """The shares of the kinds that can be built, scaled to sum to 1. Raises SubjectError if there are none."""
    kept = {kind: share for kind, share in shares.items() if share > 0 and kind not in missing}
    if not kept:
        raise SubjectError(f"{field}: none of the chosen kinds can be built from the inputs given; allow another kind")
    total = sum(kept.values())
    return {kind: share / total for kind, share in kept.items()}


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))
