"""List the photos of a folder in natural order, and explain which files are not read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import PhotoError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MASK_SUFFIX = ".mask.png"
MASK_SUFFIXES = (MASK_SUFFIX, ".mask.PNG", ".MASK.PNG", ".Mask.png", ".Mask.PNG")  # file systems that tell case apart
SHEETS = (
    ".preview.jpg",
    ".grid.jpg",
    "contact-sheet.jpg",
)  # contact sheets that FaR's commands write
OTHER_PICTURES = (
    "arw avif cr2 cr3 dng emf eps gif heic heif ico jfif jp2 jpe jxl mov mp4 nef orf pdf ppm psd raf raw rw2 svg tga "
    "webm xcf"
).split()
SYSTEM_FILES = ("thumbs.db", "desktop.ini")


def list_photos(folder: Path) -> list[Path]:
    """The photos of a folder in natural order (2.jpg before 10.jpg), without masks, hidden files and FaR's own sheets.

    Raises PhotoError if the folder is missing, unreadable, or holds no photo.
    """
    folder = Path(folder)
    try:
        paths = [p for p in folder.iterdir() if _is_photo(p)]
    except FileNotFoundError as e:
        raise PhotoError(f"{folder}: there is no such folder; give the folder that holds the photos") from e
    except NotADirectoryError as e:
        raise PhotoError(f"{folder}: is a file; give the folder that holds the photos") from e
    except OSError as e:
        raise PhotoError(f"{folder}: can't be read ({e}); check its permissions") from e
    if not paths:
        known, unread = ", ".join(s[1:] for s in SUFFIXES), _unread(folder)
        raise PhotoError(f"{folder}: holds no photos; put pictures in it ({known}){unread and f'; not read: {unread}'}")
    return sorted(paths, key=lambda p: (_natural_key(p.stem), p.name))


def describe_unread(folder: Path, besides: Sequence[Path] = ()) -> str:
    """One line that names every file in a folder of photos that isn't read, and why; "" if there are none.

    Subfolders are named if they hold pictures, except for those in ``besides``. Masks and captions that belong to a
    photo count as read; hidden and system files are ignored.
    """
    unread = _unread(Path(folder), besides)
    return f"{folder}: not read: {unread}" if unread else ""


def mask_path(photo: Path) -> Path:
    """The mask file of a photo: NAME.mask.png next to NAME.jpg, or the one that is there in another case."""
    paths = [photo.with_name(photo.stem + suffix) for suffix in MASK_SUFFIXES]
    return next((path for path in paths if path.exists()), paths[0])


def _unread(folder: Path, besides: Sequence[Path] = ()) -> str:
    try:
        entries = sorted(folder.iterdir(), key=lambda p: (_natural_key(p.stem), p.name))
    except OSError:
        return ""
    stems = {p.stem for p in entries if _is_photo(p)}
    known = {p.resolve() for p in besides}
    reasons: dict[str, list[str]] = {}
    for path in entries:
        if path.name.startswith(".") or path.name.lower() in SYSTEM_FILES or _is_photo(path):
            continue
        reason = _reason(path, stems) if path.resolve() not in known else ""
        if reason:
            reasons.setdefault(reason, []).append(path.name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())


def _reason(path: Path, stems: set[str]) -> str:
    """Why a file isn't read as a photo; "" for a mask of one of ``stems``, a caption, or a folder without pictures."""
    name, kind = path.name.lower(), path.suffix[1:].lower()
    if path.is_dir():
        try:
            return "a subfolder, which is not searched" if any(map(_is_photo, path.iterdir())) else ""
        except OSError:
            return "a folder that can't be read"
    if name.endswith(MASK_SUFFIX):
        if path.name[: -len(MASK_SUFFIX)] not in stems:
            return "a mask without its photo"
        return "" if path.name.endswith(MASK_SUFFIXES) else f"let its name end in {MASK_SUFFIX}"
    if name.endswith(SHEETS):
        return "a contact sheet written by FaR"
    if not path.exists():
        return "a broken link"
    if kind in OTHER_PICTURES:
        return f"{kind.upper()}: save as PNG or JPEG"
    return "" if kind == "txt" else "not a picture"  # a caption whose picture is gone does no harm


def _is_photo(path: Path) -> bool:
    name = path.name.lower()
    ours = name.endswith((MASK_SUFFIX, *SHEETS))
    return name.endswith(SUFFIXES) and not ours and not name.startswith(".") and path.is_file()


def _natural_key(name: str) -> list[str | int]:
    # Splitting at digits gives text and numbers in turn, so that text is only ever compared with text.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name.lower()))]
