"""Of several masks of one photo, as instance segmentation gives them, choose the one that shows the subject."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..utils.errors import SubjectError
from .subjects import Prompt

__all__ = ["choose_instance"]


def choose_instance(masks: Sequence[Tensor], prompt: Prompt | None = None, index: int = 0) -> int:
    """The place in ``masks`` (each [H,W] 0..1, of one size) of the subject's mask.

    ``index``: its number in their order, from 1; 0: the mask that agrees best with the ``prompt``, which is in the
    masks' pixels. Of the masks that overlap its box and hold one of its subject points, that is the one with the most
    points on the right side, then the largest overlap with the box (IoU), then the largest area. Without a prompt it
    is the largest mask. Raises SubjectError if there is none.
    """
    if index:
        if not 0 < index <= len(masks):
            raise SubjectError(f"index: there is no mask {index} of {len(masks)}; 0 chooses by box, points or size")
        return index - 1
    prompt = prompt or Prompt()
    agreement: dict[int, tuple[int, float, int]] = {}
    for i, mask in enumerate(masks):
        prompt.check_inside(mask.shape[1], mask.shape[0])
        if (found := _agreement(mask > 0.5, prompt)) is not None:
            agreement[i] = found
    if not agreement:
        where = "" if prompt == Prompt() else " that agrees with its box and points"
        raise SubjectError(f"has no mask{where} among {len(masks)}; correct them, or choose a mask by index")
    return max(agreement, key=lambda i: agreement[i])  # of equals the first, which detectors are surest of


def _agreement(marked: Tensor, prompt: Prompt) -> tuple[int, float, int] | None:
    """Points on the right side, IoU with the box, and pixels of a mask [H,W] bool; None if it can't be the subject."""
    height, width = marked.shape
    area = int(marked.sum())
    # A coordinate may lie on the photo's far edge, which belongs to the last pixel.
    hits = [(bool(marked[min(int(y), height - 1), min(int(x), width - 1)]), bool(of)) for x, y, of in prompt.points]
    if area == 0 or (any(of for _, of in hits) and not any(hit and of for hit, of in hits)):
        return None
    overlap = 0.0
    if prompt.box is not None:
        x0, y0, x1, y1 = (round(side) for side in prompt.box)
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)  # a box thinner than a pixel still covers one
        common = int(marked[y0:y1, x0:x1].sum())
        if common == 0:
            return None
        overlap = common / (area + (x1 - x0) * (y1 - y0) - common)
    return sum(hit == of for hit, of in hits), overlap, area
