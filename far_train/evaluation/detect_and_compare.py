"""Are the right subjects in the pictures, each with its own looks? Detect-and-Compare on image features.

Jang et al. 2024, "Identity Decoupling for Multi-Subject Personalization" (MuDI, arXiv 2404.04243): the subjects found
in a picture are compared with the reference photos of every concept, and the matrix of their similarities with the one
that the reference photos have among themselves. Mixed, missing and doubled subjects all move the two apart.

The matrices are the paper's, and so are mean DINOv2 features of crops; which norm it takes of their difference is not
public to us: here it is the squared Frobenius norm. ``mixing`` and ``present`` are this project's own readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

LEAST_MARGIN = 0.02  # reference photos of two concepts that are no further apart can't be told apart
MIXED = 0.5  # from here on a subject counts as mixed


@dataclass(frozen=True, eq=False)
class References:
    """The concepts' reference photos as features: for each concept [photos, d], of length 1."""

    names: tuple[Name, ...]
    features: tuple[Tensor, ...]

    @property
    def similarity(self) -> Tensor:
        """Mean cosine similarity of the photos of concepts i and k, [K, K]; of one concept, of different photos."""
        rows = []
        for i, own in enumerate(self.features):
            row = [own @ other.T for other in self.features]
            photos = len(own)
            if photos > 1:  # a photo and itself would count as 1, whatever the encoder
                row[i] = row[i][~torch.eye(photos, dtype=torch.bool)]
            rows.append(torch.stack([values.mean() for values in row]))
        return torch.stack(rows)

    def compare(self, found: Tensor) -> Tensor:
        """Mean cosine similarity of subjects found [n, d] with each concept's photos, [n, K]."""
        found = F.normalize(found.float(), dim=-1)
        return torch.stack([(found @ own.T).mean(1) for own in self.features], 1)


def read_references(concepts: Sequence[Concept], encoder: Encoder) -> References:
    """Encode every reference photo's subject. Raises SubjectError without concepts."""
    if not concepts:
        raise SubjectError("concepts: there is none to compare with; connect FaR Concept")
    features = []
    for concept in concepts:
        each = [encoder.features(image, [mask]) for image, mask in zip(concept.images, concept.masks)]
        features.append(F.normalize(torch.cat(each).float(), dim=-1))
    if not all(bool(torch.isfinite(f).all()) for f in features):
        raise EncoderError("encoder: the features of the reference photos are not finite; fetch its weights again")
    return References(tuple(c.name for c in concepts), tuple(features))


@dataclass(frozen=True, eq=False)
class Comparison:
    """One picture against the references of K concepts.

    ``similarity`` [K, K]: row i is the subject matched to concept i against every concept, NaN where none was left.
    ``matches``: for each concept which of the subjects found. ``extra``: subjects left over, None where they can't be
    counted. ``present``: whether the matched subject looks most like this concept and enough like it. ``mixing``: 0
    where it stands as far from the other concepts as the reference photos do, 1 where it is as near to another one.
    ``score``: Detect-and-Compare.
    """

    similarity: Tensor
    matches: tuple[int | None, ...]
    extra: int | None
    present: tuple[bool, ...]
    mixing: tuple[float, ...]
    score: float

    @property
    def right(self) -> bool:
        """Every concept is there, none is mixed, and nothing is too many."""
        return all(self.present) and not self.extra and not any(m >= MIXED for m in self.mixing)

    def words(self, names: Sequence[Name]) -> str:
        """The verdict in a few words, for below a picture."""
        said = []
        for name, present, mixing in zip(names, self.present, self.mixing):
            if mixing >= MIXED:
                said.append(f"{name.token} mixed")
            elif not present:
                said.append(f"{name.token} missing")
        said += [f"{self.extra} too many"] if self.extra else []
        return ", ".join(said) or "right"


def compare_picture(
    found: Tensor, references: References, *, presence: float = 0.6, counts_extra: bool = True
) -> Comparison:
    """Match the subjects found in a picture, features [n, d], to the concepts one to one, and compare.

    ``presence``: a subject must be at least this many times as similar to a concept's photos as they are to each
    other. ``counts_extra``: False where ``found`` holds more than a detector's subjects, such as every part of a
    picture.
    """
    truth, count = references.similarity, len(references.names)
    similarity = torch.full((count, count), math.nan)
    matches: list[int | None] = [None] * count
    if len(found):
        each = references.compare(found)  # [n, K]
        for i, j in zip(*linear_sum_assignment(-each.T.numpy())):
            matches[i], similarity[i] = int(j), each[j]
    present, mixing = [], []
    for i in range(count):
        row, own = similarity[i], float(similarity[i, i])
        others = [k for k in range(count) if k != i]
        apart = [k for k in others if float(truth[i, i] - truth[i, k]) >= LEAST_MARGIN]
        kept = [float((row[i] - row[k]) / (truth[i, i] - truth[i, k])) for k in apart]
        mixing.append(float(np.clip(1 - min(kept), 0, 1)) if kept and not math.isnan(own) else math.nan)
        nearest = not any(float(row[k]) > own for k in others)
        present.append(own >= presence * float(truth[i, i]) and nearest)
    score = 1 - float((similarity.nan_to_num(0.0) - truth).square().sum())
    extra = max(len(found) - count, 0) if counts_extra else None
    return Comparison(similarity, tuple(matches), extra, tuple(present), tuple(mixing), score)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Pictures against concepts: the references' own similarities [K, K] and one comparison for each picture."""

    names: tuple[Name, ...]
    truth: Tensor
    pictures: tuple[Comparison, ...]

    @property
    def similarity(self) -> Tensor:
        """Mean of the pictures' similarities [K, K], over those that had a subject left for the row's concept."""
        return torch.stack([p.similarity for p in self.pictures]).nanmean(0)

    @property
    def presence(self) -> list[float]:
        """Share of the pictures in which each concept is present."""
        return np.mean([p.present for p in self.pictures], 0).tolist()

    @property
    def mixing(self) -> list[float]:
        """Mean mixing of each concept where it could be read; NaN where it never could."""
        each = np.array([p.mixing for p in self.pictures])
        known = np.isfinite(each)
        return np.where(known.any(0), np.where(known, each, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan).tolist()

    @property
    def score(self) -> float:
        """Mean Detect-and-Compare: 1 where the pictures' subjects are to each other as the references are."""
        return float(np.mean([p.score for p in self.pictures]))

    @property
    def right(self) -> float:
        """Share of the pictures that show every concept, unmixed, and nothing more."""
        return float(np.mean([p.right for p in self.pictures]))

    def indistinct(self) -> list[tuple[Name, Name]]:
        """Pairs of concepts whose reference photos the encoder can't tell apart: their mixing can't be read."""
        pairs = [(i, k) for i in range(len(self.names)) for k in range(i)]
        margins = [(min(self.truth[i, i], self.truth[k, k]) - self.truth[i, k], i, k) for i, k in pairs]
        return [(self.names[k], self.names[i]) for margin, i, k in margins if margin < LEAST_MARGIN]

    def table(self) -> str:
        """The figures as Markdown: a line for each concept, and one for the whole."""
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
        """The figures in a line for each concept, for where a table has no room."""
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
        return lines


def _number(value: Tensor | float) -> str:
    return "–" if math.isnan(float(value)) else f"{float(value):.2f}"


@torch.no_grad()
def propose_masks(sam: object, image: Tensor, min_area: float = 0.03, max_area: float = 0.6) -> list[Tensor]:
    """Everything in a picture [H, W, 3] that a segment-anything model takes for a thing, bool [H, W] each.

    ``min_area``, ``max_area``: shares of the frame. Which of them are subjects, only a comparison tells.
    """
    generator = segment_anything().SamAutomaticMaskGenerator(sam, points_per_side=8, pred_iou_thresh=0.7)
    found = [torch.from_numpy(m["segmentation"]) for m in generator.generate(to_uint8(image))]
    return [mask for mask in found if min_area <= float(mask.float().mean()) <= max_area]
