"""Which masks belong to which photo, and which of a photo's masks is its subject's. Needs no host."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..far_train.data.instances import choose_instance
from ..far_train.data.subjects import Prompt
from ..far_train.utils.errors import SubjectError
from .pictures import HOW_TO_GET_MASKS, counted, in_range, match_masks, single_masks


def group_masks(batches: Sequence[int], values: Sequence[Tensor], boxes: Sequence[int] = ()) -> list[list[Tensor]]:
    """Each photo's masks [H,W], any number, as views of the MASKs that were sent: nothing is copied.

    ``batches``: how many photos each IMAGE holds. ``values``: what the masks' socket got. ``boxes``: how many boxes
    the same detector found in each photo; empty if unknown. One mask per photo, lists with a MASK for each IMAGE, and
    anything for a single photo are clear. Several masks per photo in one batch are told apart by ``boxes``.
    Raises SubjectError where it is unclear which mask belongs to which photo.
    """
    count = sum(batches)
    masks = single_masks(values)
    if count == 1:
        return [[mask for batch in masks for mask in batch]]
    if len(batches) == len(masks) > 1:
        starts = [sum(batches[:i]) for i in range(len(batches))]
        parts = [
            group_masks([size], [value], boxes[start : start + size])
            for size, start, value in zip(batches, starts, values)
        ]
        return [group for part in parts for group in part]
    if len(masks) == count:
        return masks
    flat = [mask for batch in masks for mask in batch]
    each = [[mask] for mask in flat]
    if len(boxes) == count and sum(boxes) == len(flat) and not _is_one_each(each, boxes):
        ends = [sum(boxes[: i + 1]) for i in range(count)]
        return [flat[end - size : end] for end, size in zip(ends, boxes)]
    if len(flat) == count:
        return each
    raise SubjectError(
        f"masks: got {counted(count, 'photo')} but {counted(len(flat), 'mask')}; which belong together is unclear; "
        "connect the detector's bboxes to 'box', or send the photos as a list (FaR Load Photos), so that each photo's "
        "masks arrive by themselves"
    )


def _is_one_each(each: Sequence[Sequence[Tensor]], boxes: Sequence[int]) -> bool:
    """Whether as many masks as photos are one for each: then the photos in which nothing was found have empty masks."""
    return len(each) == len(boxes) and not any(n == 0 and bool((m[0] > 0.5).any()) for m, n in zip(each, boxes))


def own_masks(
    pictures: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    prompts: Sequence[Prompt],
    index: int,
    labels: Sequence[str],
    fallback: bool,
) -> list[Tensor | SubjectError | None]:
    """Of each picture's masks the subject's, 1 = subject; None where the only one is empty; or why there is none.

    A picture whose only mask is empty has none, so that ``index`` doesn't count it where there is a ``fallback``.

    ``pictures``: [H,W,3] each. ``groups``: see :func:`group_masks`. ``index``: see
    :func:`far_train.data.instances.choose_instance`. ``fallback``: a picture without masks may have its subject found
    otherwise. Raises SubjectError as :func:`match_masks` does.
    """
    found: list[Tensor | SubjectError | None] = []
    for picture, group, prompt, label in zip(pictures, groups, prompts, labels):
        if not group and not index:
            found.append(None if fallback else SubjectError(f"{label}: has no mask; {HOW_TO_GET_MASKS}"))
            continue
        number = 0 if fallback and len(group) == 1 and not bool((group[0] > 0.5).any()) else index
        try:
            mask = _chosen(picture, group, prompt, number)
        except SubjectError as e:
            found.append(SubjectError(f"{label}: {e}"))
            continue
        (own,) = match_masks([picture], [in_range(mask)], invert=None, labels=[label])
        found.append(SubjectError(f"{label}: index: mask {number} is empty") if own is None and number else own)
    return found


def _chosen(picture: Tensor, group: Sequence[Tensor], prompt: Prompt, index: int) -> Tensor:
    if index:
        return group[choose_instance(group, index=index)]
    marked = [mask for mask in group if bool((mask > 0.5).any())]
    odd = next((mask for mask in marked if mask.shape != picture.shape[:2]), None)
    if odd is not None or len(marked) < 2:  # nothing to choose from, or what match_masks refuses
        return odd if odd is not None else (marked or group)[0]
    return marked[choose_instance(marked, prompt)]
