"""Clean the masks that a model predicts, and check all masks by the same rules."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..utils.errors import SubjectError
from .settings import ExtractConfig

# A mask marks the background if it covers the corners, this share of the rim, and all but this share of the picture.
RIM_SHARE = 0.7
HOLE_SHARE = 0.03


def mask_box(mask: Tensor) -> tuple[float, float, float, float]:
    """The box x0, y0, x1, y1 around a mask [H,W], in its pixels; some of it must be 0.5 or more."""
    rows, columns = ((mask >= 0.5).any(axis).nonzero().flatten() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def clean_mask(mask: Tensor, config: ExtractConfig | None = None) -> Tensor:
    """[H,W] bool or 0..1 to [H,W] float32 of 0 and 1: its largest connected part at 0.5, with the holes filled.

    Raises SubjectError if that part's share of the frame is outside ``min_area`` to ``max_area``.
    """
    config = config or ExtractConfig()
    parts, count = ndimage.label(mask.detach().float().cpu().numpy() >= 0.5)
    if count == 0:
        raise SubjectError("the mask is empty")
    sizes = np.bincount(parts.ravel())[1:]
    whole = ndimage.binary_fill_holes(parts == 1 + sizes.argmax())
    area = whole.mean()
    if area < config.min_area:
        raise SubjectError(f"the subject covers {area:.2%} of the frame, less than min_area ({config.min_area:.2%})")
    if area > config.max_area:
        raise SubjectError(f"the mask covers {area:.2%} of the frame, more than max_area ({config.max_area:.2%})")
    return torch.from_numpy(whole).float()


def check_own_mask(mask: Tensor, config: ExtractConfig | None = None) -> None:
    """Check a mask [H,W] that came with a photo by the rules for predicted masks, without changing it.

    Raises SubjectError saying what is wrong with "the mask": too faint, inverted, too small or too large.
    """
    if faint := describe_faint(mask):
        raise SubjectError(f"the mask {faint}")
    if looks_inverted(mask):
        raise SubjectError(
            "the mask marks the frame around the subject and not the subject, so it looks inverted; save it with the "
            "subject white and the rest black"
        )
    clean_mask(mask, config)


def describe_faint(mask: Tensor) -> str:
    """Why a mask [H,W] 0..1 is nowhere above 0.5, and what to do; "" if it is somewhere."""
    if bool((mask > 0.5).any()):
        return ""
    levels = (mask.detach().float().cpu() * 255).round().unique().int().tolist()
    if levels[-1] == 0:
        return "is empty: it is black all over; save the subject as white (255)"
    if len(levels) == 2:
        return f"has only the values {levels[0]} and {levels[1]} of 255; save the subject as 255"
    return f"is empty: its brightest value is {levels[-1]} of 255; save the subject as 255"


def looks_inverted(mask: Tensor) -> bool:
    """Whether a mask [H,W] seems to be 1 on the background: it covers the corners and the rim but leaves a hole."""
    marked = mask > 0.5
    side = max(min(mask.shape) // 50, 1)
    corners = (marked[rows, columns] for rows, columns in product(_ends(side), repeat=2))
    if not all(bool(corner.all()) for corner in corners):
        return False
    rim = torch.cat([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    return float(rim.float().mean()) >= RIM_SHARE and float((~marked).float().mean()) >= HOLE_SHARE


def _ends(length: int) -> tuple[slice, slice]:
    return slice(None, length), slice(-length, None)
