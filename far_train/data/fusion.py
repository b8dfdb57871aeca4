"""Concept Fusion: references, class pictures and backgrounds recombined into training pictures.

A reconstruction of the paper's data side (docs/explanation/method.md, Concept Fusion). Everything is derived from
(seed, index): any composite can be built alone, in any order, in any process.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from ..utils.config import BACKGROUND_SHARES, MANY_CONCEPTS, RECIPE_SHARES, FusionConfig
from ..utils.errors import SubjectError, TokenError
from .backgrounds import cover, infill, plain_background
from .captions import Name, write_caption
from .concepts import Background, ClassPicture, Composite, Concept
from .images import from_pil, mask_from_pil, mask_to_pil, to_pil
from .masks import check_own_mask
from .placement import Cutout, cut_out, cut_sides, fit_inside, paste, place, place_in_row

# Part of every digest: to be raised by whoever changes what composites of the same inputs look like.
ALGORITHM = 2
FAR_AWAY, CLOSE_UP = 0.45, 0.80  # sizes of a single subject, as shares of the canvas, that captions call so


@dataclass(frozen=True, eq=False)
class _Source:
    """A subject that composites of ``size`` pixels can show: its name and the photo it is cut from."""

    name: Name
    picture: Image.Image
    mask: Image.Image
    size: int
    label: str = ""  # what messages call the photo

    @cached_property
    def cut(self) -> tuple[str, ...]:
        """The sides of the photo that cut the subject off."""
        return cut_sides(np.asarray(self.mask) > 127)

    @property
    def is_whole(self) -> bool:
        """Whether it can stand on another background: cut off at the bottom it can, on the canvas's lower edge."""
        return set(self.cut) <= {"bottom"}

    @cached_property
    def cutout(self) -> Cutout:
        """The subject, no larger than the canvas: turning a large photo for every composite is slow."""
        whole = cut_out(self.picture, self.mask)
        return fit_inside(whole, self.size, self.size) if max(whole.extent) > self.size else whole

    @cached_property
    def scenery(self) -> Image.Image:
        """The photo without the subject; kept, because filling in is slow and many composites stand on it."""
        return infill(self.picture, self.mask, self.size)


class ConceptFusion:
    """A lazy training set: composites of ``concepts``, class pictures and ``backgrounds`` (see ``TrainingSet``).

    ``notes`` tells the user what was left out for want of input. Raises ConfigError, TokenError, SubjectError.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        priors: Sequence[ClassPicture] = (),
        backgrounds: Sequence[Background] = (),
        config: FusionConfig = FusionConfig(),
    ):
        if not concepts:
            raise SubjectError("concepts: none given; name at least one concept with its photos")
        tokens = [c.token for c in concepts]
        for token in tokens:
            if tokens.count(token) > 1:
                raise TokenError(f"token: {token} names two concepts; give each its own token")
        self.config = config
        self.size = config.size
        self.names = tuple(c.name for c in concepts)
        self.notes: list[str] = []
        # Kept in 8 bit, a quarter of what the tensors take.
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
            if prior.mask is not None and self._is_good(prior.mask, prior.label or f"class picture {i + 1}", "mask")
        ]
        self._scenes = [(to_pil(b.image), b.phrase) for b in backgrounds]
        self._companions = [s for s in self._prior_subjects if s.is_whole]
        self.recipes = self._available_recipes()
        self.background_kinds = self._available_backgrounds()
        self._pasted = [self._whole(sources) for sources in self._references]
        if cut := len(self._prior_subjects) - len(self._companions):
            self.notes.append(f"{cut} class picture(s) cut the subject off at a side, so it isn't put beside yours.")

    def _good_photos(self, concept: Concept) -> list[int]:
        """Those whose masks show a subject; the others are noted. Raises SubjectError if none is left."""
        told = len(self.notes)
        good = [i for i, mask in enumerate(concept.masks) if self._is_good(mask, concept.label(i), "photo")]
        if not good:
            reasons = "\n".join(f"  {note}" for note in self.notes[told : told + 5])
            raise SubjectError(f"concept {concept.token}: no photo has a mask that shows the subject:\n{reasons}")
        return good

    def _is_good(self, mask: Tensor, label: str, left_out: str) -> bool:
        try:
            check_own_mask(mask, self.config.masks)
        except SubjectError as e:
            self.notes.append(f"{label}: {e}; the {left_out} is left out.")
            return False
        return True

    def _whole(self, sources: list[_Source]) -> list[_Source]:
        """Those of a concept's photos that can be pasted; what becomes of the others is noted."""
        token, whole = sources[0].name.token, [s for s in sources if s.is_whole]
        cut = [s.label for s in sources if not s.is_whole]
        if cut and not whole:
            self.notes.append(
                f"{token}: every photo cuts the subject off at a side, so composites show straight cuts; give photos "
                "that show it whole."
            )
            return sources
        if cut:
            fate = "serve for 'original' alone" if "original" in self.recipes else "are left out"
            self.notes.append(f"{token}: photos that cut the subject off at a side {fate}: {', '.join(cut)}.")
        if low := [s.label for s in whole if s.cut]:
            self.notes.append(
                f"{token}: photos that cut the subject off at the bottom put it on the lower edge: {', '.join(low)}."
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
        return [s for group in (*self._references, self._prior_subjects) for s in group]

    def composite_count(self) -> int:
        return self.config.count

    def prior_count(self) -> int:
        return len(self._pictures)

    def composite(self, index: int) -> Composite:
        """Build instance ``index``: one of the recipes, drawn by its share."""
        rng = self._rng("composite", index)
        recipe = _draw(rng, self.recipes)
        if recipe == "original":
            return self._original(rng)
        if recipe == "beside_prior":
            reference = self._pick(rng, self._pasted[int(rng.integers(len(self.names)))])
            return self._fuse(rng, recipe, [reference, self._companion(rng, reference.name.noun)])
        count = {"solo": 1, "pair": 2, "triple": 3}[recipe]
        chosen = rng.permutation(len(self.names))[:count]
        return self._fuse(rng, recipe, [self._pick(rng, self._pasted[int(c)]) for c in chosen])

    def prior(self, index: int) -> Composite:
        """Build class picture ``index``: as it is, or (a share of them) two class subjects on one background."""
        rng = self._rng("prior", index)
        name, picture = self._pictures[index % len(self._pictures)]
        if len(self._companions) > 1 and rng.random() < self.config.prior_collages:
            first, second = rng.choice(len(self._companions), 2, replace=False)
            fused = self._fuse(rng, "prior_collage", [self._companions[first], self._companions[second]])
            return Composite(fused.image, fused.caption, (), fused.recipe)
        image, _ = cover(picture, None, self.size, rng)
        return Composite(from_pil(image), write_caption([name], rng), (), "prior")

    def _rng(self, stream: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.config.fusion_seed, zlib.crc32(stream.encode()), index])

    def _available_recipes(self) -> dict[str, float]:
        shares = self.config.recipe_weights or RECIPE_SHARES.get(len(self.names), MANY_CONCEPTS)
        missing = {}
        if not self._companions:
            missing["beside_prior"] = "there are no class pictures with masks that show the subject whole"
        if len(self.names) < 2:
            missing["pair"] = "it needs two concepts"
        if len(self.names) < 3:
            missing["triple"] = "it needs three concepts"
        for recipe, why in missing.items():
            if shares.get(recipe):
                self.notes.append(f"Recipe '{recipe}' ({shares[recipe]:.0%} of the composites) falls away: {why}.")
        return _renormalise({k: v for k, v in shares.items() if v > 0 and k not in missing}, "recipe_weights")

    def _available_backgrounds(self) -> dict[str, float]:
        shares = self.config.background_weights or BACKGROUND_SHARES
        missing = set()
        if not self._scenes:
            missing.add("scene")
        if not self._prior_subjects:
            missing.add("prior")
        kinds = _renormalise({k: v for k, v in shares.items() if v > 0 and k not in missing}, "background_weights")
        if "scene" in missing and shares.get("scene"):
            filled = kinds.get("infilled", 0) + kinds.get("prior", 0)
            self.notes.append(
                f"No background pictures are given: {filled:.0%} of the backgrounds are photos filled in where their "
                "subject was, which looks like fog in its outline, the others plain colours. Better give empty scenes "
                "(--backgrounds; 'far scenes' or FaR Empty Scenes draw some)."
            )
        return kinds

    def _pick(self, rng: np.random.Generator, sources: list[_Source]) -> _Source:
        return sources[rng.integers(len(sources))]

    def _companion(self, rng: np.random.Generator, noun: str) -> _Source:
        return self._pick(rng, [s for s in self._companions if s.name.noun == noun] or self._companions)

    def _original(self, rng: np.random.Generator) -> Composite:
        source = self._pick(rng, self._references[int(rng.integers(len(self.names)))])
        image, mask = cover(source.picture, source.mask, self.size, rng)
        if rng.random() < self.config.flip:
            image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
        caption = write_caption([source.name], rng)
        return Composite.build(from_pil(image), caption, [(source.name, mask_from_pil(mask))], "original")

    def _fuse(self, rng: np.random.Generator, recipe: str, sources: list[_Source]) -> Composite:
        """Paste the subjects onto a background. Caption order and position are drawn apart from each other: else the
        loss would teach that the first one mentioned stands on the left."""
        canvas, phrase = self._background(rng)
        in_row = len(sources) > 1 and self.config.row > 0 and rng.random() < self.config.row
        sizes = [self._extent(rng, s.cutout, len(sources), in_row) for s in sources]
        cutouts = [self._vary(rng, s.cutout, extent) for s, extent in zip(sources, sizes)]
        if in_row:
            placed = place_in_row(cutouts, self.size, self.config.max_covered, rng, self.config.height_drift)
        else:
            may_cover = self.config.max_covered if rng.random() < self.config.occlusion else 0.0
            margin = round(self.config.margin * self.size)
            placed = place(cutouts, self.size, margin, may_cover, rng, self.config.height_drift)
        feather, erode = self.config.feather * self.size, round(self.config.erode * self.size)
        image, masks = paste(canvas, placed, feather, erode, self.config.shadow)
        size_word = ""
        if len(sources) == 1 and recipe == "solo":
            share = max(placed[0].cutout.extent) / self.size
            size_word = "far away" if share < FAR_AWAY else "close up" if share > CLOSE_UP else ""
        order = rng.permutation(len(sources))
        subjects = [(sources[i].name, masks[i]) for i in order]
        caption = write_caption(
            [name for name, _ in subjects],
            rng,
            background=phrase,
            size_word=size_word,
            collage=rng.random() < self.config.collage_words,
        )
        return Composite.build(from_pil(image), caption, subjects, recipe)

    def _extent(
        self, rng: np.random.Generator, cutout: Cutout, count: int, in_row: bool = False
    ) -> tuple[float, float]:
        """Largest width and height of one of ``count`` subjects, as shares of the canvas.

        Several share its width. A narrow one may be taller than wide, but gets no more room than a square one. In a
        row, where neighbours may cover a little of each other, a wide one gets no less.
        """
        if count == 1:
            side = rng.uniform(0.35, 0.90)
            return side, side
        shrink = rng.uniform(self.config.pair_fill if count == 2 else 0.9, 1.0)
        side, (width, height) = shrink / count, cutout.extent
        stretch = math.sqrt(height / width)
        return min(side * (1.2 if in_row else 1), side / stretch), min(side * stretch, shrink * 0.95)

    def _vary(self, rng: np.random.Generator, cutout: Cutout, extent: tuple[float, float]) -> Cutout:
        """Mirror, turn, brighten and scale a subject."""
        picture, mask = cutout.picture, cutout.mask
        if rng.random() < self.config.flip:
            picture, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (picture, mask))
        angle = rng.uniform(-self.config.rotation, self.config.rotation)
        gain = 1 + rng.uniform(-self.config.brightness, self.config.brightness)
        picture = ImageEnhance.Brightness(picture).enhance(gain)
        width, height = (round(share * self.size) for share in extent)
        return fit_inside(Cutout(picture, mask, cutout.foot, cutout.on_edge), width, height, angle)

    def _background(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        kind = _draw(rng, self.background_kinds)
        if kind == "scene":
            picture, phrase = self._scenes[rng.integers(len(self._scenes))]
        elif kind == "plain":
            return plain_background(self.size, rng)
        else:
            pool = self._prior_subjects if kind == "prior" else [s for c in self._references for s in c]
            picture, phrase = pool[rng.integers(len(pool))].scenery, ""
        image, _ = cover(picture, None, self.size, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, phrase


def _update(digest: hashlib._Hash, words: str, *pictures: Image.Image) -> None:
    digest.update(repr((words, [p.size for p in pictures])).encode())
    for picture in pictures:
        digest.update(picture.tobytes())


def _renormalise(shares: dict[str, float], field: str) -> dict[str, float]:
    total = sum(shares.values())
    if total <= 0:
        raise SubjectError(f"{field}: nothing is left of the chosen kinds with what was given; allow another kind")
    return {k: v / total for k, v in shares.items()}


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))
