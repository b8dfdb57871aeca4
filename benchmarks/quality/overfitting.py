"""Signs of overfitting in the pictures themselves: subjects copied from their photos, and poses that don't vary.

Both are compared with true new pictures of the same subject, which the small world can render.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from far_train.data.concepts import Concept
from far_train.mini.identity import Identity
from far_train.mini.oracle import Oracle, Reading, read_pictures
from far_train.mini.verdicts import match_identities
from far_train.mini.world import MOST_SPRITES, render_scene
from far_train.utils.geometry import bounding_box

SIDE = 32  # pixels to which cut-outs are brought
TRUE_PICTURES, TRUE_SEED = 192, 92_000
COPIED = 0.95  # a subject closer to a photo than this share of true pictures counts as copied
BINS = 3  # of size and of height over width each


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Kernel inception distance of features [n, d] and [m, d], two rows or more each: the unbiased squared MMD with the
    kernel (x·y / d + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401). Equal distributions give 0 on average, so a value
    may lie below it."""
    x, y = first.double(), second.double()
    (n, d), m = x.shape, len(y)
    inside = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in ((a @ a.T / d + 1) ** 3 for a in (x, y))]
    across = ((x @ y.T / d + 1) ** 3).sum() / (n * m)
    return float(inside[0] + inside[1] - 2 * across)


def cut_out(image: Tensor, mask: Tensor) -> Tensor:
    """A subject of an image [H, W, 3] on grey, cropped to the box of its mask [H, W] and brought to ``SIDE`` pixels, as
    a vector of length 1; zeros for an empty mask."""
    left, top, right, bottom = bounding_box(mask.numpy() > 0.5)
    subject = ((image - 0.5) * mask[..., None])[top:bottom, left:right].permute(2, 0, 1)
    resized = F.interpolate(subject[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return F.normalize(resized.flatten(), dim=0)


class SubjectRuler:
    """Reference values for one subject, from images and masks of its ``photos`` and of ``true`` new pictures."""

    def __init__(self, photos: Sequence[tuple[Tensor, Tensor]], true: Sequence[tuple[Tensor, Tensor]]):
        shots = [cut_out(*pair) for pair in photos] + [cut_out(i.flip(1), m.flip(1)) for i, m in photos]
        self.photos = torch.stack(shots)
        self.copied_from = float(np.quantile([self.likeness(*pair) for pair in true], COPIED))
        shapes = np.array([_size_and_aspect(mask) for _, mask in true])
        self.edges = np.quantile(shapes, np.arange(1, BINS) / BINS, axis=0)  # [BINS - 1, 2]

    def likeness(self, image: Tensor, mask: Tensor) -> float:
        """Cosine similarity to the nearest photo, mirrored or not."""
        return float((self.photos @ cut_out(image, mask)).max())

    def pose(self, mask: Tensor) -> int:
        """Which of the BINS² kinds of size and shape; a third of the true pictures in each third of either."""
        size, aspect = (int(np.searchsorted(self.edges[:, k], v)) for k, v in enumerate(_size_and_aspect(mask)))
        return size * BINS + aspect


def subject_rulers(
    wanted: Sequence[Identity], concepts: Sequence[Concept], oracle: Oracle, size: int
) -> list[SubjectRuler]:
    """A ruler for each subject, from true pictures of all of them together (or as many as the world draws): alone they
    would be larger. All masks are the oracle's, as those of drawn pictures are."""
    true: list[list[tuple[Tensor, Tensor]]] = [[] for _ in wanted]
    for k in range(TRUE_PICTURES):
        cast = [(k + j) % len(wanted) for j in range(min(len(wanted), MOST_SPRITES))]
        together = [wanted[i] for i in cast]
        image = render_scene(TRUE_SEED, k, size, identities=together).image
        for j, _, mask in _matched(together, [image], read_pictures(oracle, image[None])):
            true[cast[j]].append((image, mask))
    rulers = []
    for identity, concept, seen in zip(wanted, concepts, true):
        shots = _matched([identity], concept.images, read_pictures(oracle, torch.stack(concept.images)))
        rulers.append(SubjectRuler([(image, mask) for _, image, mask in shots], seen))
    return rulers


def overfitting_figures(
    rulers: Sequence[SubjectRuler], wanted: Sequence[Identity], pictures: Sequence[Tensor], readings: Sequence[Reading]
) -> dict[str, float]:
    """Of the subjects found in pictures [H, W, 3] of all of them together.

    ``copied``: the share that is more like one of its photos than 95 % of true pictures are (for those, 0.05).
    ``pose_spread``: entropy of the kinds of size and shape over its maximum, a mean over subjects (.9 and more for
    true pictures; few pictures lower it).
    """
    copied: list[bool] = []
    poses: list[list[int]] = [[] for _ in wanted]
    for i, picture, mask in _matched(wanted, pictures, readings):
        copied.append(rulers[i].likeness(picture, mask) > rulers[i].copied_from)
        poses[i].append(rulers[i].pose(mask))
    spreads = [_entropy(p) / np.log(BINS**2) for p in poses if p]
    return {
        "copied": float(np.mean(copied)) if copied else float("nan"),
        "pose_spread": float(np.mean(spreads)) if spreads else float("nan"),
    }


def _matched(
    wanted: Sequence[Identity], pictures: Sequence[Tensor], readings: Sequence[Reading]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(which of the wanted, the picture, its mask there) of all subjects found."""
    for picture, reading in zip(pictures, readings):
        for i, j in enumerate(match_identities(wanted, [s.identity for s in reading.subjects])):
            if j is not None:
                yield i, picture, reading.subjects[j].mask


def _size_and_aspect(mask: Tensor) -> tuple[float, float]:
    left, top, right, bottom = bounding_box(mask.numpy())
    return float(mask.sum()), (bottom - top) / (right - left)


def _entropy(kinds: Sequence[int]) -> float:
    """In nats."""
    shares = np.unique(kinds, return_counts=True)[1] / len(kinds)
    return float(-(shares * np.log(shares)).sum())
