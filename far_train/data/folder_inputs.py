"""Read the inputs of Concept Fusion from folders, and log what is skipped."""

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
    """Read a concept from a folder of photos with masks. Photos without a mask are named in the log and skipped.

    Photos are scaled down to ``max_side`` pixels. Raises PhotoError, SubjectError, TokenError, CaptionError.
    """
    photos = read_photos(folder, max_side)
    masked = [p for p in photos if p.mask is not None]
    for photo in photos:
        if photo.mask is None:
            log.warning("%s has no mask and is skipped; run 'extract' on its folder first.", photo.path)
    if not masked:
        raise SubjectError(f"concept {token}: no photo in {folder} has a mask; run 'extract' on it first")
    labels = tuple(str(p.path) for p in masked)
    return Concept(token, noun, tuple(p.image for p in masked), tuple(p.mask for p in masked), labels)


def read_photos(folder: Path, max_side: int | None = None) -> list[Photo]:
    """Read the photos of a folder; files and parts of files that aren't used are logged."""
    photos = [load_photo(path, max_side) for path in list_photos(folder)]
    if unread := describe_unread(folder):
        log.warning("%s", unread)
    for photo in photos:
        for note in photo.notes:
            log.warning("%s", note)
    return photos


def read_backgrounds(folder: Path, max_side: int | None = None) -> list[Background]:
    """Read the empty scenes of a folder, each with the phrase in its .txt file, if any.

    Raises PhotoError, CaptionError.
    """
    backgrounds = []
    for photo in read_photos(folder, max_side):
        path = photo.path.with_suffix(".txt")
        try:
            phrase = " ".join(read_words(path).split()) if path.exists() else ""
        except UnreadableFile as e:
            raise CaptionError(str(e)) from e
        backgrounds.append(Background(photo.image, phrase))
    return backgrounds
