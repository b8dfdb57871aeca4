"""Data types shared by extraction, fusion and training: concepts, composites, training sets.

All pictures are float32 0..1; all masks are 1 on the subject.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from ..utils.errors import SubjectError
from .captions import MentionSpans, Name, check_noun, check_token, locate_mentions
from .images import to_uint8
from .masks import describe_faint


@dataclass(frozen=True, eq=False)
class ByteMasks(Sequence[Tensor]):
    """Masks [H, W] that are kept in a byte per pixel, a quarter of float32, and read as float32 0..1.

    Composites and mask files have no finer steps either.
    """

    stored: tuple[Tensor, ...]  # uint8, 255 = subject

    @classmethod
    def of(cls, masks: Iterable[Tensor]) -> ByteMasks:
        """Keep masks of 0..1."""
        return cls(tuple(torch.from_numpy(to_uint8(mask)) for mask in masks))

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> ByteMasks: ...
    def __getitem__(self, index: int | slice) -> Tensor | ByteMasks:
        if isinstance(index, slice):
            return ByteMasks(self.stored[index])
        return self.stored[index].float() / 255


class ByteMask:
    """A dataclass's field with a mask or None: like :class:`ByteMasks`. The default is None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, instance: object | None, owner: type) -> Tensor | None:
        kept: ByteMasks | None = None if instance is None else vars(instance)[self.place]
        return None if kept is None else kept[0]

    def __set__(self, instance: object, mask: Tensor | None) -> None:
        vars(instance)[self.place] = None if mask is None else ByteMasks.of([mask])


@dataclass(frozen=True, eq=False)
class Concept:
    """A subject to learn: its placeholder token, its class noun, and its photos with masks.

    ``images``: each [H, W, 3]; ``masks``: one [H, W] per image, of the same size, kept as :class:`ByteMasks`.
    ``labels``: what messages call the photos, such as their files; default "photo 1" and so on. Raises TokenError,
    CaptionError, SubjectError.
    """

    token: str
    noun: str
    images: tuple[Tensor, ...]
    masks: Sequence[Tensor]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_token(self.token)
        check_noun(self.noun)
        if not self.images:
            raise SubjectError(f"concept {self.token}: no subjects; give at least one photo with its mask")
        if len(self.images) != len(self.masks):
            raise SubjectError(
                f"concept {self.token}: {len(self.images)} photos but {len(self.masks)} masks; give one mask per photo"
            )
        for i, (image, mask) in enumerate(zip(self.images, self.masks)):
            check_subject(image, mask, self.where(i))
        if not isinstance(self.masks, ByteMasks):
            object.__setattr__(self, "masks", ByteMasks.of(self.masks))

    def label(self, index: int) -> str:
        """What messages that name the concept call a photo."""
        return self.labels[index] if self.labels else f"photo {index + 1}"

    def where(self, index: int) -> str:
        """What messages call a photo, with the concept: two concepts may have photos of one name."""
        return f"concept {self.token}, {self.label(index)}"

    @property
    def name(self) -> Name:
        return Name(self.noun, self.token)


@dataclass(frozen=True, eq=False)
class ClassPicture:
    """A regularization image of a class: ``image`` [H, W, 3], and the subject's ``mask`` [H, W] if known.

    ``label``: how messages name it, such as its file.
    """

    noun: str
    image: Tensor
    mask: ByteMask = ByteMask()
    label: str = ""

    def __post_init__(self) -> None:
        check_noun(self.noun)
        where = self.label or f"regularization image of a {self.noun}"
        check_picture(self.image, where)
        if self.mask is not None:
            check_subject(self.image, self.mask, where)


@dataclass(frozen=True, eq=False)
class Background:
    """An empty scene: ``image`` [H, W, 3] and the ``phrase`` that a caption adds for it ("in a garden"), or ""."""

    image: Tensor
    phrase: str = ""

    def __post_init__(self) -> None:
        check_picture(self.image, "background")


@dataclass(frozen=True, eq=False)
class Mention:
    """One subject of a composite: its name, its visible region ``mask`` [S, S], and where the caption names it."""

    name: Name
    mask: Tensor
    spans: MentionSpans


@dataclass(frozen=True, eq=False)
class Composite:
    """A training picture: ``image`` [S, S, 3], its caption, and one mention per masked subject in caption order."""

    image: Tensor
    caption: str
    mentions: tuple[Mention, ...]
    layout: str

    @classmethod
    def build(
        cls,
        image: Tensor,
        caption: str,
        subjects: Sequence[tuple[Name, Tensor]],
        layout: str,
        where: str = "the caption",
    ) -> Composite:
        """Locate the subjects' words in the caption. Raises CaptionError naming ``where``."""
        spans = locate_mentions(caption, [name for name, _ in subjects], where)
        mentions = tuple(Mention(name, mask, s) for (name, mask), s in zip(subjects, spans))
        return cls(image, caption, mentions, layout)


@runtime_checkable
class TrainingSet(Protocol):
    """The input of a training: composites and regularization images, each built when asked for.

    ``names`` are the concepts in order; ``size`` is the side of every picture in pixels.
    """

    names: tuple[Name, ...]
    size: int

    def digest(self) -> str:
        """Identifies the content: training sets with equal digests give equal results."""
        ...

    def composite_count(self) -> int: ...

    def composite(self, index: int) -> Composite: ...

    def prior_count(self) -> int: ...

    def prior(self, index: int) -> Composite: ...


def picture_at(training_set: TrainingSet, index: int) -> Composite:
    """Picture ``index`` of all: first the composites, then the regularization images."""
    composites = training_set.composite_count()
    return training_set.composite(index) if index < composites else training_set.prior(index - composites)


def check_picture(image: Tensor, where: str) -> None:
    """Refuse a picture of the wrong shape, such as a batch. Raises SubjectError naming ``where``."""
    if image.ndim != 3 or image.shape[-1] != 3:
        raise SubjectError(f"{where}: a picture must be [height, width, 3], got {list(image.shape)}")


def check_subject(image: Tensor, mask: Tensor, where: str) -> None:
    """Refuse a picture or mask of the wrong shape, and an empty mask. Raises SubjectError naming ``where``."""
    check_picture(image, where)
    if mask.ndim != 2:
        raise SubjectError(f"{where}: the mask must be [height, width], got {list(mask.shape)}")
    if mask.shape != image.shape[:2]:
        raise SubjectError(
            f"{where}: the mask is {mask.shape[1]}×{mask.shape[0]} pixels but the picture "
            f"{image.shape[1]}×{image.shape[0]}; make them the same size"
        )
    if not bool((mask > 0.5).any()):
        raise SubjectError(f"{where}: the mask {describe_faint(mask)}, or remove this photo")
