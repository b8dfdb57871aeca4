"""Pictures and masks as other nodes and packs send them, brought to far_train's forms. Needs no host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..far_train.data.captions import check_noun
from ..far_train.data.masks import describe_faint, looks_inverted
from ..far_train.data.settings import ExtractConfig
from ..far_train.utils.errors import SubjectError

FAINT_SHARE = 0.01  # of the photo: a mask that is dark everywhere but not black on this much was meant to mark it
# A grey picture of which two shades make up this much is a mask, maybe with a soft edge, and not a photo.
TWO_SHADES_SHARE = 0.95

HOW_TO_GET_MASKS = (
    "connect the masks of FaR Load Photos, FaR Extract Subject or any segmenter "
    "(Load Image has no mask for a picture without transparency: it sends 64×64 zeros)"
)

INVERT_TOOLTIP = (
    "Turn on if the masks are 1 on the background, as Load Image's masks of transparent images are. Leave off for FaR "
    "nodes and segmenters."
)


def unroll_images(values: Sequence[Tensor], called: str = "image") -> list[Tensor]:
    """A list of IMAGEs, each a batch [B,H,W,C] or one [H,W,C], as single pictures [H,W,3].

    Raises SubjectError, which calls a picture ``called`` and its number.
    """
    pictures: list[Tensor] = []
    for value in values:
        if not isinstance(value, Tensor) or value.ndim not in (3, 4) or value.shape[-1] not in (1, 3, 4):
            raise SubjectError(
                f"{called} {len(pictures) + 1}: expected an IMAGE [batch, height, width, 3], got {_form(value)}"
            )
        for picture in value if value.ndim == 4 else (value,):
            picture = picture.detach().float().cpu()
            pictures.append(picture.expand(*picture.shape[:2], 3) if picture.shape[-1] == 1 else picture[..., :3])
    return pictures


def unroll_masks(values: Sequence[Tensor]) -> list[Tensor]:
    """A list of MASKs as single masks [H,W] 0..1: see :func:`single_masks`."""
    return [in_range(mask) for batch in single_masks(values) for mask in batch]


def single_masks(values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The masks [H,W] of each MASK, which is [H,W], [B,H,W] or, as some packs send them, [B,1,H,W]: views, no copies.

    Raises SubjectError.
    """
    batches: list[list[Tensor]] = []
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 1:
            value = value[:, 0]
        elif isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == 1:
            value = value[..., 0]
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            number = sum(map(len, batches)) + 1
            raise SubjectError(f"mask {number}: expected a MASK [batch, height, width], got {_form(value)}")
        batches.append([value] if value.ndim == 2 else list(value))
    return batches


def in_range(mask: Tensor) -> Tensor:
    """A mask of any type on any device as float32 0..1 on the CPU."""
    return torch.nan_to_num(mask.detach().float().cpu()).clamp(0, 1)


def match_masks(
    images: Sequence[Tensor], masks: Sequence[Tensor], *, invert: bool | None = False, labels: Sequence[str] = ()
) -> list[Tensor | None]:
    """The mask of each picture, 1 = subject; None where it is empty, which is how nodes say that they have none.

    ``images``: [H,W,3] each. ``masks``: [H,W] each, of any size if empty. ``invert``: they are 1 on the background;
    None where the node has no switch for it.
    ``labels``: what messages call the pictures; default "photo 1" and so on. Raises SubjectError naming the picture
    and the fix for another count, another size, or masks that show the background.
    """
    if len(images) != len(masks):
        raise SubjectError(
            f"got {counted(len(images), 'photo')} but {counted(len(masks), 'mask')}; "
            "connect image and mask of the same node, so that each photo has its own"
        )
    return [
        _match(image, mask, invert, labels[i] if labels else f"photo {i + 1}")
        for i, (image, mask) in enumerate(zip(images, masks))
    ]


def _match(image: Tensor, mask: Tensor, invert: bool | None, label: str) -> Tensor | None:
    if not shows_subject(mask, label):
        return None
    if mask.shape != image.shape[:2]:
        raise SubjectError(
            f"{label}: its mask is {_size(mask)} pixels, but the photo {_size(image)}; connect image and mask of the "
            f"same node, or scale the mask to the photo"
        )
    mask = 1 - mask if invert else mask
    if looks_inverted(mask):
        fix = "put InvertMask before this node" if invert is None else f"switch invert_mask {'off' if invert else 'on'}"
        raise SubjectError(
            f"{label}: its mask marks the frame around the subject and not the subject; {fix} "
            "(Load Image sends 1 − alpha: the transparent part of a cut-out)"
        )
    if not bool((mask > 0.5).any()):
        raise SubjectError(f"{label}: with invert_mask on, its mask is empty; switch it off")
    return mask


def shows_subject(mask: Tensor, label: str) -> bool:
    """Whether a mask [H,W] isn't empty. Raises SubjectError naming ``label`` for one that is only too dark."""
    if bool((mask > 0.5).any()):
        return True
    if float((mask > 0).float().mean()) >= FAINT_SHARE:
        raise SubjectError(f"{label}: its mask {describe_faint(mask)}")
    return False


def doubts(images: Sequence[Tensor], masks: Sequence[Tensor | None], labels: Sequence[str]) -> list[str]:
    """What to warn of in pictures [H,W,3] and their masks [H,W], which can be used all the same: a line per kind."""
    whole = [label for mask, label in zip(masks, labels) if mask is not None and covers_all(mask)]
    drawn = [label for image, label in zip(images, labels) if looks_like_mask(image)]
    lines = []
    if whole:
        share = f"more than {ExtractConfig.max_area:.0%} of the picture"
        lines.append(f"{some_of(whole)}: the mask covers {share}; all of it counts as the subject")
    if drawn:
        lines.append(f"{some_of(drawn)}: has only two gray values; is it a mask and not a photo?")
    return lines


def covers_all(mask: Tensor) -> bool:
    """Whether a mask [H,W] marks all but the whole picture."""
    return float((mask >= 0.5).float().mean()) > ExtractConfig.max_area


def looks_like_mask(image: Tensor) -> bool:
    """Whether a picture [H,W,3] is a mask that some loader took for a photo: grey, in two shades."""
    shades = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    if not bool((shades == shades[..., :1]).all()):
        return False
    counts = torch.bincount(shades[..., 0].flatten().int(), minlength=256)
    return int(counts.topk(2).values.sum()) >= TWO_SHADES_SHARE * counts.sum()


def some_of(labels: Sequence[str]) -> str:
    """The first labels, and how many more there are: a warning is one line."""
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return ", ".join(labels[:3]) + more


def photo_labels(count: int, names: Sequence[str] = ()) -> list[str]:
    """What messages call the photos: "photo 2", or "photo 2 (garden)" where ``names`` has one for each."""
    named = len(names) == count
    return [f"photo {i + 1} ({names[i]})" if named else f"photo {i + 1}" for i in range(count)]


def name_photos(count: int, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What messages call the photos: their ``names``, or their numbers unless each has a name; and what to warn of."""
    if len(names) == count:
        return list(names), []
    if not names:
        return photo_labels(count), []
    warning = f"got {counted(count, 'photo')} but {counted(len(names), 'name')}; connect images and names of one node"
    return photo_labels(count), [warning]


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 photo, 2 photos."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tidy_noun(noun: str) -> str:
    """A class noun with its spaces and capitals put right. Raises CaptionError."""
    return check_noun(" ".join(noun.lower().split()))


def _size(picture: Tensor) -> str:
    return f"{picture.shape[1]}×{picture.shape[0]}"


def _form(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
