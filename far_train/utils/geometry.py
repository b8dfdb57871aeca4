"""Boxes around regions."""

from __future__ import annotations

import numpy as np


def bounding_box(region: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, the last two past the end, of a region bool [H, W]; all of it if that is empty."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return 0, 0, region.shape[1], region.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
