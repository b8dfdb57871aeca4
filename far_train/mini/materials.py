"""Draw the inputs of a training in the small world other than photos: regularization images and empty scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..data.concepts import Background, ClassPicture
from ..data.images import Photo
from ..data.subjects import SubjectExtractor
from ..models.base import BaseModel
from ..models.settings import SampleConfig
from ..training.class_images import EmptyScene, draw_class_images, draw_empty_scenes
from ..utils.errors import SubjectError
from .scenery import PLACES
from .shipped import DRAWING, EMPTY_PLACES

OnProgress = Callable[[int, int], None]


def cut_class_pictures(
    base: BaseModel,
    extractor: SubjectExtractor,
    nouns: Sequence[str],
    count: int,
    folder: Path,
    config: SampleConfig = DRAWING,
    on_progress: OnProgress = lambda done, total: None,
) -> list[ClassPicture]:
    """Regularization images drawn by the base for each noun, with a mask if SAM finds the subject.

    Pictures in ``folder`` are reused.
    """
    pictures = draw_class_images(base, nouns, count, folder, config, on_progress=on_progress)
    cut = []
    for i, picture in enumerate(pictures):
        try:
            subject = extractor.extract(Photo(f"class-{i}", picture.image, None, Path(f"class-{i}")))
            cut.append(ClassPicture(picture.noun, picture.image, subject.mask))
        except SubjectError:
            cut.append(picture)
    return cut


def draw_places(
    base: BaseModel, each: int, folder: Path, on_progress: OnProgress = lambda done, total: None
) -> list[Background]:
    """``each`` pictures of every empty place, drawn by the base; those in ``folder`` are reused."""
    places = [EmptyScene(prompt, phrase) for phrase, prompt in PLACES.values()]
    return draw_empty_scenes(base, places, each, folder, EMPTY_PLACES, on_progress=on_progress)
