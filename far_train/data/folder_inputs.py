"""What Concept Fusion is made of, read from folders: concepts, class pictures, backgrounds. What isn't used is said."""

from __future__ import annotations

import logging
from pathlib import Path

from ..utils.errors import CaptionError, SubjectError, UnreadableFile
from ..utils.text_files import read_words
from .concepts import Background, Concept
from .folders import describe_unread, list_photos
from .images import Photo, load_photo

log = logging.getLogger(__name__)


def read_concept(token: str, noun: str, folder: Path, max_side: int | None = None) -> Concept:
    """A concept from a folder of subjects (photos with masks). Photos without a mask are named and left out.

    Photos are scaled down to ``max_side`` pixels. Raises PhotoError, SubjectError, TokenError, CaptionError.
    """
    photos = read_photos(folder, max_side)
    masked = [p for p in photos if p.mask is not None]
    for photo in photos:
        if photo.mask is None:
            log.warning("%s has no mask and is left out; run 'extract' on its folder first.", photo.path)
    if not masked:
        raise SubjectError(f"concept {token}: no photo in {folder} has a mask; run 'extract' on it first")
    labels = tuple(str(p.path) for p in masked)
    return Concept(token, noun, tuple(p.image for p in masked), tuple(p.mask for p in masked), labels)


def read_photos(folder: Path, max_side: int | None = None) -> list[Photo]:
    """The photos of a folder; what of it, or of them, isn't used is said."""
    photos = [load_photo(path, max_side) for path in list_photos(folder)]
    for note in (describe_unread(folder), *(note for photo in photos for note in photo.notes)):
        if note:
            log.warning("%s", note)
    return photos


def read_backgrounds(folder: Path, max_side: int | None = None) -> list[Background]:
    """Empty scenes of a folder, each with the phrase of its .txt file if any. Raises PhotoError, CaptionError."""
    backgrounds = []
    for photo in read_photos(folder, max_side):
        words = photo.path.with_suffix(".txt")
        try:
            phrase = " ".join(read_words(words).split()) if words.exists() else ""
        except UnreadableFile as e:
            raise CaptionError(str(e)) from e
        backgrounds.append(Background(photo.image, phrase))
    return backgrounds
