"""Examine photos, concepts and datasets for what spoils a training without stopping it.

What can't be used at all is refused where it is read. This finds what can be used but will be learned as part of the
subject: its one place, the same photo twice, a word that its captions have in common.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..utils.ahead import computed_ahead, spare_threads
from ..utils.errors import SubjectError
from .alike import background_histogram, difference_hash, hash_distance, intersection
from .captions import COLLAGE_TEMPLATES, SOME_TOKEN, TEMPLATES, Name
from .concepts import Composite, Concept, TrainingSet, picture_at
from .dataset import DatasetFolder
from .images import Photo
from .masks import check_own_mask, mask_box
from .placement import cut_sides
from .settings import ExtractConfig

FEW_PHOTOS = 3
# Of 64 bits. Krawetz calls up to 10 "a variation"; photos of one subject in one place may differ by as little as 7.
SAME_PHOTO = 5
# Of a histogram intersection. In the small world two views of one place have .86 in the median, those of two places
# .65 at most.
SAME_PLACE = 0.75
SUBJECT_SHARE = 0.5  # of the size of composites: the room of one of two subjects
COMPOSITE_MASKS = ExtractConfig(min_area=0.002)  # composites show subjects smaller than their photos do
COMMON, RARE = 0.8, 0.2  # shares of captions
HOW_WHOLE = "use a photo of the whole subject"
FEW_CAPTIONS = 5  # with fewer, every word is common
# "far away" and "close up" are what Concept Fusion says of sizes.
STOP_WORDS = frozenset(
    "a about above across after against all along also among an and another are around as at away back before behind "
    "below beneath beside between both by close down each far for from front has have her his in inside into is it its "
    "left near next no not of off on one onto or other out outside over right side some that the their there these "
    "this through to together top toward two under up very was were which while who with without".split()
)
WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
VOCABULARY = Path(__file__).parents[1] / "configs" / "shared" / "tokenizer" / "vocab.json"
WORD_END = "</w>"  # how CLIP's vocabulary marks entries that end a word


@dataclass(frozen=True)
class Finding:
    """Something that will be learned wrongly, or is easily mistaken.

    ``concept``: its placeholder token, or what else the photos are called; ``file``: a photo or composite. Either may
    be "".
    """

    severity: Literal["warning", "note"]
    concept: str
    file: str
    sentence: str
    fix: str

    @property
    def line(self) -> str:
        where = ", ".join(part for part in (self.concept, self.file) if part)
        return f"{self.severity}: {f'{where}: ' if where else ''}{self.sentence}; {self.fix}"


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Each finding once, warnings first."""
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity != "warning")


def examine_concepts(concepts: Sequence[Concept], size: int | None = None) -> list[Finding]:
    """Examine the names, photos and masks of all concepts. ``size``: the base's native size in pixels, if known."""
    findings = examine_names([concept.name for concept in concepts])
    for concept in concepts:
        labels = [concept.label(i) for i in range(len(concept.images))]
        findings += _examine(concept.token, concept.images, concept.masks, labels, size)
    return findings


def examine_photos(photos: Sequence[Photo], size: int | None = None, concept: str = "") -> list[Finding]:
    """Examine photos of one subject, with masks or without. ``concept``: what findings call them."""
    labels = [photo.path.name for photo in photos]
    return _examine(concept, [photo.image for photo in photos], [photo.mask for photo in photos], labels, size)


def examine_dataset(
    dataset: TrainingSet,
    size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Examine the names, masks and captions of a dataset; reads or builds every picture of it.

    Raises DatasetError, CaptionError, PhotoError where one can't be used.
    """
    findings = examine_names(dataset.names)
    if size is not None and dataset.size < size:
        sentence = f"its pictures are {dataset.size} px a side, less than the base's native {size} px"
        findings.append(Finding("warning", "", "", sentence, "make it again with the base's native size"))
    count, total = dataset.composite_count(), dataset.composite_count() + dataset.prior_count()
    labels = [f"composite {i}" for i in range(count)]
    if isinstance(dataset, DatasetFolder):
        labels = [str(path.with_suffix(".png")) for path, _ in dataset.captions()][:count]

    def look(i: int) -> tuple[str, list[Finding]]:
        composite = picture_at(dataset, i)
        return composite.caption, list(_examine_composite(composite, labels[i])) if i < count else []

    captions = []
    on_progress(0, total)
    with computed_ahead(look, total, spare_threads()) as looked_at:
        for done, (caption, found) in enumerate(looked_at, 1):
            captions.append(caption)
            findings += found
            on_progress(done, total)
    return findings + examine_captions(captions, dataset.names)


# ---- names


def examine_names(names: Sequence[Name]) -> list[Finding]:
    """Notes on placeholder tokens that are easily mistaken for a word or for one another."""
    findings = []
    tokens = [name.token for name in names if name.token]
    for token in tokens:
        word = token.strip("<>")
        if word in clip_words():
            findings.append(
                Finding(
                    "note",
                    token,
                    "",
                    f"without < and > its token is the ordinary word '{word}', which prompts may mean as such",
                    f"choose a name that is no word, or always write {token}",
                )
            )
    for first, second in combinations(tokens, 2):
        if _within_one_edit(*(re.sub(r"[<>_-]", "", token) for token in (first, second))):
            sentence = f"its token and {first} are alike, and one typing mistake in a prompt draws the other subject"
            findings.append(Finding("note", second, "", sentence, "choose tokens that differ in a whole word"))
    return findings


@cache
def clip_words() -> frozenset[str]:
    """The words of three letters or more that are one token for CLIP, whose vocabulary all supported bases have."""
    entries = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    words = (entry.removesuffix(WORD_END) for entry in entries if entry.endswith(WORD_END))
    return frozenset(word for word in words if len(word) >= 3 and word.isascii() and word.isalpha())


def _within_one_edit(first: str, second: str) -> bool:
    """Whether the texts are equal, or one letter is changed, added or removed between them."""
    short, long = sorted((first, second), key=len)
    start = next((i for i, (a, b) in enumerate(zip(short, long)) if a != b), len(short))
    changed, added = short[start + 1 :] == long[start + 1 :], short[start:] == long[start + 1 :]
    return changed if len(short) == len(long) else added


# ---- photos


def _examine(
    concept: str, images: Sequence[Tensor], masks: Sequence[Tensor | None], labels: Sequence[str], size: int | None
) -> list[Finding]:
    findings = []
    if len(images) < FEW_PHOTOS:
        number = "one photo, which is allowed" if len(images) == 1 else f"only {len(images)} photos"
        sentence = f"it has {number}, but then pose, light and place are learned as part of the subject"
        findings.append(Finding("warning", concept, "", sentence, "add photos with other poses and places, 4 or more"))
    findings += _near_duplicates(concept, images, labels)
    sound = []
    for image, mask, label in zip(images, masks, labels):
        findings += _too_small(concept, image, mask, label, size)
        if mask is None:
            continue
        try:
            check_own_mask(mask)
        except SubjectError as e:
            fix = "correct it, or Concept Fusion skips this photo"
            findings.append(Finding("warning", concept, label, str(e), fix))
            continue
        findings += _cut_off(concept, mask, label)
        sound.append((image, mask))
    return [*findings, *_one_place(concept, sound)]


def _near_duplicates(concept: str, images: Sequence[Tensor], labels: Sequence[str]) -> Iterator[Finding]:
    hashes = [difference_hash(image) for image in images]
    for i, label in enumerate(labels):
        earlier = next((j for j in range(i) if hash_distance(hashes[i], hashes[j]) <= SAME_PHOTO), None)
        if earlier is not None:
            sentence = f"it looks nearly the same as {labels[earlier]}, so that this view counts twice"
            yield Finding("warning", concept, label, sentence, "remove one of them")


def _too_small(concept: str, image: Tensor, mask: Tensor | None, label: str, size: int | None) -> Iterator[Finding]:
    """The whole photo below the native size, or else its subject below what composites make of it."""
    if size is None:
        return
    height, width = image.shape[:2]
    if min(height, width) < size:
        sentence = f"it has {width}×{height} px, less than the base's native {size} px, and is enlarged to a blur"
        yield Finding("warning", concept, label, sentence, "use the photo in a larger size")
    elif mask is not None and bool((mask >= 0.5).any()):
        left, top, right, bottom = mask_box(mask)
        side = round(max(right - left, bottom - top))
        if side < SUBJECT_SHARE * size:
            sentence = f"its subject is {side} px large and is enlarged to {SUBJECT_SHARE:.0%} of {size} px or more"
            yield Finding("warning", concept, label, sentence, "use a photo that shows it larger")


def _cut_off(concept: str, mask: Tensor, label: str) -> Iterator[Finding]:
    sides = cut_sides((mask > 0.5).numpy())
    if not sides:
        return
    sentence = f"the photo cuts the subject off at the {' and '.join(sides)}"
    if sides == ("bottom",):
        yield Finding("note", concept, label, f"{sentence}: composites show it on the lower edge only", HOW_WHOLE)
    else:
        yield Finding(
            "warning", concept, label, f"{sentence}: it is pasted with a straight edge, or not at all", HOW_WHOLE
        )


def _one_place(concept: str, photos: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Finding]:
    """Whether the surroundings of the subject have the same colors in all photos with a good mask."""
    if len(photos) < FEW_PHOTOS:
        return
    histograms = [background_histogram(image, mask) for image, mask in photos]
    least = min(intersection(first, second) for first, second in combinations(histograms, 2))
    if least >= SAME_PLACE:
        sentence = f"its {len(photos)} photos seem to be taken in one place: outside of the masks, any two share at "
        sentence += f"least {least:.0%} of their colors, so that the place is learned with the subject"
        yield Finding("warning", concept, "", sentence, "add photos from other places")


# ---- datasets


def _examine_composite(composite: Composite, label: str) -> Iterator[Finding]:
    for mention in composite.mentions:
        try:
            check_own_mask(mention.mask, COMPOSITE_MASKS)
        except SubjectError as e:
            fix = "repaint this mask, or delete the composite"
            yield Finding("warning", mention.name.phrase, label, str(e), fix)


def examine_captions(captions: Sequence[str], names: Sequence[Name]) -> list[Finding]:
    """Words in more than 80 % of the captions that name a concept and in less than 20 % of the others.

    Left out are placeholder tokens, class nouns, and the words of the caption templates.
    """
    known = STOP_WORDS.union(*map(_words, (*TEMPLATES, *COLLAGE_TEMPLATES)), *(_words(name.noun) for name in names))
    tokens = [{token.lower() for token in SOME_TOKEN.findall(caption)} for caption in captions]
    words = [_words(caption) - known for caption in captions]
    findings = []
    for name in names:
        own = _shares([w for w, t in zip(words, tokens) if name.token in t], FEW_CAPTIONS)
        others = _shares([w for w, t in zip(words, tokens) if name.token not in t])
        telling = [word for word, share in own.items() if share > COMMON and others.get(word, 0.0) < RARE]
        if telling:
            found = ", ".join(f"'{word}' ({own[word]:.0%})" for word in sorted(telling))
            lack = " that others lack" if len(captions) > sum(name.token in t for t in tokens) else ""
            sentence = f"its captions have words in common{lack}: {found}. They are learned in place of {name.token}"
            fix = "remove them from most captions, unless prompts shall need them"
            findings.append(Finding("warning", str(name.token), "", sentence, fix))
    return findings


def _shares(captions: Sequence[frozenset[str]], enough: int = 1) -> dict[str, float]:
    """Each word's share of the captions; none if there aren't ``enough`` to tell."""
    if len(captions) < enough:
        return {}
    counts = Counter(word for words in captions for word in words)
    return {word: count / len(captions) for word, count in counts.items()}


def _words(text: str) -> frozenset[str]:
    """The words of a text in lower case, without placeholder tokens."""
    return frozenset(WORD.findall(SOME_TOKEN.sub(" ", text).lower()))
