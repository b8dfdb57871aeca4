"""Detect-and-Compare: score whether pictures show the right subjects, each with its own appearance.

Jang et al. 2024, "Identity Decoupling for Multi-Subject Personalization" (MuDI, arXiv 2404.04243): the subjects found
in a picture are compared with the reference photos of every concept. The matrix of similarities is then compared with
that of the reference photos among themselves. Mixed, missing and duplicated subjects all increase the difference.

The matrices and the mean DINOv2 features of crops are the paper's. The paper doesn't say which norm it takes of the
difference; here it is the squared Frobenius norm. ``mixing`` and ``present`` are this project's own measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ..data.captions import Name
from ..data.concepts import Concept
from ..data.images import to_uint8
from ..data.sam import segment_anything
from ..utils.errors import EncoderError, SubjectError
from .image_encoders import Encoder

LEAST_MARGIN = 0.02  # the encoder can't tell two concepts apart whose reference photos are closer than this
MIXED = 0.5  # from here on a subject counts as mixed


@dataclass(frozen=True, eq=False)
class References:
    """The concepts' reference photos as features: for each concept [photos, d], of length 1."""

    names: tuple[Name, ...]
    features: tuple[Tensor, ...]

    @property
    def similarity(self) -> Tensor:
        """Mean cosine similarity of the photos of concepts i and k, [K, K]; of one concept, of different photos.

        NaN for a concept with one photo: with itself it would be 1, whatever the encoder.
        """
        rows = []
        for i, own in enumerate(self.features):
            row = [own @ other.T for other in self.features]
            row[i] = row[i][~torch.eye(len(own), dtype=torch.bool)]
            rows.append(torch.stack([values.mean() for values in row]))
        return torch.stack(rows)

    def compare(self, found: Tensor) -> Tensor:
        """Mean cosine similarity of subjects found [n, d] with each concept's photos, [n, K]."""
        found = F.normalize(found.float(), dim=-1)
        return torch.stack([(found @ own.T).mean(1) for own in self.features], 1)


def read_references(concepts: Sequence[Concept], encoder: Encoder) -> References:
    """Encode every reference photo's subject. Raises SubjectError for none, and for one photo of one concept, with
    which nothing can be compared."""
    if not concepts:
        raise SubjectError("concepts: there is none to compare with; connect FaR Concept")
    if len(concepts) == 1 and len(concepts[0].images) == 1:
        raise SubjectError(
            f"concepts: one photo of {concepts[0].name.token} alone can't tell what its subject has to look like; give "
            "two photos of it or more, or a second concept"
        )
    features = []
    for concept in concepts:
        each = [encoder.features(image, [mask]) for image, mask in zip(concept.images, concept.masks)]
        features.append(F.normalize(torch.cat(each).float(), dim=-1))
    if not all(bool(torch.isfinite(f).all()) for f in features):
        raise EncoderError("encoder: the features of the reference photos are not finite; fetch its weights again")
    return References(tuple(c.name for c in concepts), tuple(features))


@dataclass(frozen=True, eq=False)
class Match:
    """The subject matched to one concept.

    ``index``: which of the subjects found. ``similarity``: to each concept's photos, [K]. ``present``: whether it looks
    most like this concept, and enough like it if the concept has several photos. ``mixing``: 0 if it is as far from the
    other concepts as the reference photos are, 1 if it is as close to another one; None if the encoder can't tell this
    concept from the others, or if there is one photo of it.
    """

    index: int
    similarity: Tensor
    present: bool
    mixing: float | None

    @property
    def is_mixed(self) -> bool:
        return self.mixing is not None and self.mixing >= MIXED


@dataclass(frozen=True, eq=False)
class Comparison:
    """One picture compared with K concepts.

    ``matches``: the subject matched to each concept, None if no subject was left for it. ``extra``: number of subjects
    matched to none, None if they can't be counted. ``score``: Detect-and-Compare.
    """

    matches: tuple[Match | None, ...]
    extra: int | None
    score: float

    @property
    def similarity(self) -> Tensor:
        """Similarity of each concept's match to every concept, [K, K]; a row of NaN if there is no match."""
        nothing = torch.full((len(self.matches),), math.nan)
        return torch.stack([match.similarity if match else nothing for match in self.matches])

    @property
    def present(self) -> tuple[bool, ...]:
        """Whether each concept is present."""
        return tuple(match is not None and match.present for match in self.matches)

    @property
    def right(self) -> bool:
        """Whether every concept is present, none is mixed, and there is no extra subject."""
        return all(self.present) and not self.extra and not any(match.is_mixed for match in self.matches if match)

    def words(self, names: Sequence[Name]) -> str:
        """The verdict in a few words, as the label of a picture."""
        said = []
        for name, match in zip(names, self.matches):
            if match is not None and match.is_mixed:
                said.append(f"{name.token} mixed")
            elif match is None or not match.present:
                said.append(f"{name.token} missing")
        said += [f"{self.extra} too many"] if self.extra else []
        return ", ".join(said) or "right"


def compare_picture(
    found: Tensor, references: References, *, presence: float = 0.6, counts_extra: bool = True
) -> Comparison:
    """Match the subjects found in a picture, features [n, d], to the concepts one to one, and compare.

    ``presence``: a subject is present if it is at least this many times as similar to its concept's photos as they are
    to each other; with one photo of the concept, if it is nearest to it. ``counts_extra``: False if ``found`` holds
    more than a detector's subjects, such as every part of a picture.
    """
    truth, count = references.similarity, len(references.names)
    matches: list[Match | None] = [None] * count
    if len(found):
        each = references.compare(found)  # [n, K]
        for concept, index in zip(*linear_sum_assignment(-each.T.numpy())):
            matches[concept] = _match(int(index), each[index], int(concept), truth, presence)
    extra = max(len(found) - count, 0) if counts_extra else None
    unscored = Comparison(tuple(matches), extra, math.nan)
    known = ~truth.isnan()
    score = 1 - float((unscored.similarity.nan_to_num(0.0) - truth)[known].square().sum())
    return replace(unscored, score=score)


def _match(index: int, similarity: Tensor, concept: int, truth: Tensor, presence: float) -> Match:
    """Judge the subject ``index`` as ``concept``, by its similarity to all [K] and that among references [K, K]."""
    own, expected = similarity[concept], truth[concept, concept]
    other = torch.arange(len(similarity)) != concept
    margin = expected - truth[concept]
    distinct = other & (margin >= LEAST_MARGIN)
    mixing = None
    if distinct.any():
        distance = float(((own - similarity) / margin)[distinct].min())
        mixing = min(max(1 - distance, 0.0), 1.0)
    nearest = bool((similarity[other] <= own).all())
    alike = bool(expected.isnan()) or float(own) >= presence * float(expected)
    return Match(index, similarity, nearest and alike, mixing)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several pictures compared with the concepts ``names``; ``truth`` [K, K]: the references' own similarities."""

    names: tuple[Name, ...]
    truth: Tensor
    pictures: tuple[Comparison, ...]

    @property
    def similarity(self) -> Tensor:
        """Mean of the pictures' similarities [K, K], over those with a match for the row's concept."""
        return torch.stack([p.similarity for p in self.pictures]).nanmean(0)

    @property
    def presence(self) -> list[float]:
        """Share of the pictures in which each concept is present."""
        return np.mean([p.present for p in self.pictures], 0).tolist()

    @property
    def mixing(self) -> list[float]:
        """Mean mixing of each concept over the pictures in which it is known; NaN if there are none."""
        means = []
        for matches in zip(*(p.matches for p in self.pictures)):
            known = [m.mixing for m in matches if m is not None and m.mixing is not None]
            means.append(sum(known) / len(known) if known else math.nan)
        return means

    @property
    def score(self) -> float:
        """Mean Detect-and-Compare score: 1 if the subjects are as similar to each other as the references are."""
        return float(np.mean([p.score for p in self.pictures]))

    @property
    def right(self) -> float:
        """Share of the pictures that show every concept, unmixed, and nothing more."""
        return float(np.mean([p.right for p in self.pictures]))

    def indistinct(self) -> list[tuple[Name, Name]]:
        """Pairs of concepts whose reference photos the encoder can't tell apart, so their mixing is unknown."""
        found = []
        for first, second in combinations(range(len(self.names)), 2):
            within = [float(self.truth[i, i]) for i in (first, second)]
            if any(value - float(self.truth[second, first]) < LEAST_MARGIN for value in within):
                found.append((self.names[first], self.names[second]))
        return found

    def table(self) -> str:
        """The figures as a Markdown table with a row per concept, and a summary line."""
        head = ["concept", "similarity", "of its photos", "present", "mixing", *(f"like {n.token}" for n in self.names)]
        lines = [head, ["---"] * len(head)]
        similarity = self.similarity
        for i, name in enumerate(self.names):
            own = [similarity[i, i], self.truth[i, i]]
            line = [_number(v) for v in own] + [f"{self.presence[i]:.0%}", _number(self.mixing[i])]
            lines.append([name.phrase, *line, *map(_number, similarity[i])])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *self._whole()])

    @property
    def words(self) -> str:
        """The figures as plain text, a line per concept, where there is no room for a table."""
        lines = [
            f"{name.phrase}: in {present:.0%}, similarity {_number(similarity)}, mixing {_number(mixing)}"
            for name, present, similarity, mixing in zip(
                self.names, self.presence, self.similarity.diagonal(), self.mixing
            )
        ]
        return "\n".join([*self._whole(), *lines])

    def _whole(self) -> list[str]:
        pictures = f"{len(self.pictures)} picture{'s' if len(self.pictures) > 1 else ''}"
        lines = [f"{pictures}: right {self.right:.0%}, Detect-and-Compare {self.score:.3f}"]
        for a, b in self.indistinct():
            lines.append(f"This encoder can't tell the photos of {a.token} from those of {b.token}.")
        for name, own in zip(self.names, self.truth.diagonal()):
            if own.isnan():
                lines.append(f"There is one photo of {name.token}: its mixing is unknown; give two or more to know it.")
        return lines


def _number(value: Tensor | float) -> str:
    return "–" if math.isnan(float(value)) else f"{float(value):.2f}"


@torch.no_grad()
def propose_masks(sam: object, image: Tensor, min_area: float = 0.03, max_area: float = 0.6) -> list[Tensor]:
    """Masks of everything that a segment-anything model finds in a picture [H, W, 3], bool [H, W] each.

    ``min_area``, ``max_area``: shares of the frame. Only a comparison tells which of them are subjects.
    """
    generator = segment_anything().SamAutomaticMaskGenerator(sam, points_per_side=8, pred_iou_thresh=0.7)
    found = [torch.from_numpy(m["segmentation"]) for m in generator.generate(to_uint8(image))]
    return [mask for mask in found if min_area <= float(mask.float().mean()) <= max_area]
