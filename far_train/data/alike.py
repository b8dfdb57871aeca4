"""Measures of how alike two photos are: the whole picture, and the surroundings of the subject."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import to_pil

HASH_SIZE = (9, 8)  # width, height in pixels: 8 differences in each of 8 rows
LEVELS = 4  # of each color channel in a histogram: 64 bins


def difference_hash(image: Tensor) -> np.ndarray:
    """The difference hash (dHash) of a picture [H,W,3] 0..1: bool [8, 8], where brightness rises to the right.

    N. Krawetz, "Kind of Like That" (2013), hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html. Size, contrast
    and compression hardly change it.
    """
    small = to_pil(image).convert("L").resize(HASH_SIZE, Image.Resampling.BOX)
    brightness = np.asarray(small).astype(int)
    return brightness[:, 1:] > brightness[:, :-1]


def hash_distance(first: np.ndarray, second: np.ndarray) -> int:
    """Hamming distance of two hashes: the number of bits in which they differ, 0 to 64."""
    return int((first != second).sum())


def background_histogram(image: Tensor, mask: Tensor) -> Tensor:
    """Shares [64] of the colors of a picture [H,W,3] where its mask [H,W] is below 0.5; zeros if that is nowhere."""
    levels = (image[mask < 0.5] * LEVELS).long().clamp(0, LEVELS - 1)
    bins = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    counts = torch.bincount(bins, minlength=LEVELS**3).float()
    return counts / counts.sum().clamp(min=1)


def intersection(first: Tensor, second: Tensor) -> float:
    """Histogram intersection of two histograms of shares, 0 (nothing in common) to 1 (equal).

    Swain and Ballard, "Color Indexing" (IJCV 1991). It compares colors and not places, so that it doesn't matter where
    the photographer stood.
    """
    return float(torch.minimum(first, second).sum())
