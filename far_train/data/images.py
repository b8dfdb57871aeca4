"""Read photos and masks safely, and write them atomically.

Pictures come from cameras, phones, scanners and other programs: rotated by EXIF, in CMYK, in 16 bit, truncated by a
broken download. Each gives the right pixels or a :class:`PhotoError` that names the file, never silently grey ones.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from ..utils.errors import OutputError, PhotoError
from .colour import to_srgb
from .folders import mask_path

# What the suffixes of photos stand for. Nothing else is tried: Pillow would hand an EPS named .jpg to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 178_000_000
MIN_SIDE = 16
_FILTERS = threading.Lock()  # of warnings, which all threads of a process share
INTEROPERABILITY = 0xA005  # EXIF's block that names the colour space
MIN_BACKGROUND = 0.05  # of the frame: an alpha channel that hides less is a flaw or a rim, and no mask


@dataclass(frozen=True, eq=False)
class Photo:
    """An upright photo.

    ``name``: file name without suffix. ``image``: [H,W,3] float32 RGB 0..1. ``mask``: [H,W] float32 0..1, 1 = subject,
    or None. ``path``: its file. ``full_size``: (height, width) in pixels of the upright file before ``max_side``
    scaled it down; None means that ``image`` has its original size. ``notes``: what of the file was not used.
    """

    name: str
    image: torch.Tensor
    mask: torch.Tensor | None
    path: Path
    full_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def load_photo(path: Path, max_side: int | None = None) -> Photo:
    """Read a photo: upright, sRGB, with its mask from NAME.mask.png or else from its alpha channel.

    An alpha channel is a mask where it hides at least 5 % of the frame; else ``notes`` says so. The colours under it
    stay straight, not premultiplied. If the longest side exceeds ``max_side`` pixels, image and mask are scaled down.
    Raises PhotoError naming the file and the fix.
    """
    path = Path(path)
    notes: list[str] = []
    picture = _read(path, notes)
    size = picture.size
    mask_file = mask_path(path)
    mask = None
    if mask_file.exists():
        mask = _luminance(_read(mask_file))
        if mask.size != size:
            raise PhotoError(
                f"{mask_file}: the mask is {_size(mask.size)}, but its photo {path} is {_size(size)} (width x height, "
                "after EXIF rotation); save the mask again from the upright photo at the photo's size"
            )
    elif picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        hidden = float((np.asarray(alpha) < 128).mean())
        if hidden >= MIN_BACKGROUND:
            mask = alpha
        elif alpha.getextrema()[0] < 255:
            notes.append(f"{path}: its alpha channel hides {hidden:.2%} of the frame, too little for a mask: ignored")
    # Dropping alpha leaves the colours straight; Pillow doesn't premultiply here.
    picture = picture.convert("RGB")
    if max_side is not None and max(size) > max_side:
        small = tuple(max(1, round(side * max_side / max(size))) for side in size)
        picture = picture.resize(small, Image.Resampling.LANCZOS)
        mask = mask.resize(small, Image.Resampling.BOX) if mask is not None else None
    own = None if mask is None else mask_from_pil(mask)
    return Photo(path.stem, from_pil(picture), own, path, size[::-1], tuple(notes))


def load_mask(path: Path) -> torch.Tensor:
    """Read a mask picture as [H,W] float32 0..1, 1 = subject: its brightness, times its alpha where it has one.

    Raises PhotoError naming the file and the fix.
    """
    return mask_from_pil(_luminance(_read(Path(path))))


def save_picture(path: Path, image: torch.Tensor) -> None:
    """Write [H,W,3] 0..1 as PNG, whole or not at all. Raises OutputError."""
    _write_all([(Path(path), to_pil(image))])


def save_mask(path: Path, mask: torch.Tensor) -> None:
    """Write [H,W] 0..1 as an 8-bit grey PNG, whole or not at all. Raises OutputError."""
    _write_all([(Path(path), mask_to_pil(mask))])


def save_pair(path: Path, image: torch.Tensor, mask: torch.Tensor) -> None:
    """Write [H,W,3] as ``path`` (a .png) and [H,W] as its mask file, both or neither. Raises OutputError.

    The picture appears last, so whatever interrupts the write, a picture never stands beside the mask of another.
    If the write fails, an older pair of the same name is gone as well, unless it failed before touching them.
    """
    path = Path(path)
    _write_all([(mask_path(path), mask_to_pil(mask)), (path, to_pil(image))])


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Values 0..1 on any device to an array of uint8, rounded and clamped."""
    values = torch.nan_to_num(image.detach().float().cpu()) * 255
    return values.round().clamp(0, 255).to(torch.uint8).numpy()


def to_pil(image: torch.Tensor) -> Image.Image:
    """[H,W,3] 0..1 to an 8-bit RGB picture."""
    return Image.fromarray(to_uint8(image))


def mask_to_pil(mask: torch.Tensor) -> Image.Image:
    """[H,W] 0..1 to an 8-bit grey picture."""
    return Image.fromarray(to_uint8(mask))


def from_pil(picture: Image.Image) -> torch.Tensor:
    """An 8-bit picture to [H,W,3] float32 RGB 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255


def mask_from_pil(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"


class _PictureFile(io.BytesIO):
    """A file in memory that, once ``strict``, refuses to be read past its end.

    Pillow fills truncated pictures with grey if any code in the process sets ImageFile.LOAD_TRUNCATED_IMAGES. That
    global isn't ours to change, since other threads use it, so the missing bytes are noticed here.
    """

    strict = False

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.strict and not data and size != 0:
            raise OSError("the file ends before its picture does")
        return data


def _read(path: Path, notes: list[str] | None = None) -> Image.Image:
    """Decode a picture file to an upright 8-bit RGB or RGBA picture. Raises PhotoError.

    ``notes``: given for photos, whose colours are brought to sRGB; gets what couldn't be used. Masks are no colours.
    """
    try:
        file = _PictureFile(path.read_bytes())
    except OSError as e:
        raise PhotoError(f"{path}: can't be read ({e.strerror or e}); check the path and its permissions") from e
    try:
        with _open(file) as picture:
            _check_size(path, picture.size)
            file.strict = True
            picture.load()
            file.strict = False
            # An upright copy forgets the TIFF tags, which tell the depth of the pixels.
            upright, tags = _upright(picture), getattr(picture, "tag_v2", {})
            if notes is None:
                return _to_8bit(path, upright, tags)
            return _in_srgb(path, upright, tags, picture.info.get("icc_profile"), notes)
    except PhotoError:
        raise
    except Image.DecompressionBombError as e:
        raise PhotoError(f"{path}: has too many pixels; scale it below {MAX_PIXELS // 10**6} megapixels ({e})") from e
    except Image.UnidentifiedImageError as e:
        raise PhotoError(
            f"{path}: is not a PNG, JPEG, WebP, BMP or TIFF picture; export it again as PNG or JPEG"
        ) from e
    except Exception as e:  # decoders of damaged files raise almost anything
        raise PhotoError(
            f"{path}: can't be decoded ({type(e).__name__}: {e}); it is damaged or cut off: copy or export it again"
        ) from e


def _open(file: BinaryIO) -> Image.Image:
    """Read a picture's header, without Pillow's warning of large ones: :func:`_check_size` has a limit of its own."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=FORMATS)


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Judge the size that the header claims, before memory is taken for its pixels."""
    if size[0] * size[1] > MAX_PIXELS:
        raise PhotoError(f"{path}: is {_size(size)}; scale it below {MAX_PIXELS // 10**6} megapixels")
    if min(size) < MIN_SIDE:
        raise PhotoError(f"{path}: is only {_size(size)}; use a picture of at least {MIN_SIDE} px a side")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error):
        # A damaged EXIF block says nothing about the orientation; the pixels are still good.
        return picture


def _in_srgb(
    path: Path, picture: Image.Image, tags: Mapping[int, Any], profile: bytes | None, notes: list[str]
) -> Image.Image:
    """As :func:`_to_8bit`, with the colours that ``profile`` means; alpha stays as it is."""
    grey = picture.mode in ("1", "L", "LA", "La", "I") or picture.mode.startswith("I;16")
    plain = picture if picture.mode == "CMYK" and profile else _to_8bit(path, picture, tags)
    if not profile and _means_adobe_rgb(picture):
        notes.append(f"{path}: is marked as Adobe RGB but has no profile; export it as sRGB")
    if profile:
        colours = plain if plain.mode == "CMYK" else plain.convert("L" if grey else "RGB")
        try:
            colours = to_srgb(colours, profile).convert("RGB")
        except ValueError as e:
            notes.append(f"{path}: its color profile can't be used ({e}); its colors are read as sRGB")
        else:
            if plain.mode == "RGBA":
                colours.putalpha(plain.getchannel("A"))
            plain = colours
    return plain.convert("RGB") if plain.mode == "CMYK" else plain


def _means_adobe_rgb(picture: Image.Image) -> bool:
    """Whether a camera wrote so by the rule of file systems (DCF), which knows no profiles."""
    try:
        return picture.getexif().get_ifd(INTEROPERABILITY).get(1) == "R03"
    except Exception:  # damaged EXIF blocks raise almost anything, and say nothing then
        return False


def _to_8bit(path: Path, picture: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Any mode of Pillow to RGB, or RGBA where the picture has transparency. ``tags``: those of a TIFF."""
    if picture.mode == "F":
        raise PhotoError(f"{path}: holds floating-point pixels, whose white level is unknown; save it as 8 or 16 bit")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_integers(path, picture, tags).convert("RGB")
    if picture.mode == "La":  # premultiplied grey has no direct way to RGBA
        picture = picture.convert("LA")
    transparent = picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def _from_integers(path: Path, picture: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of more than 8 bits to 8-bit grey by its white level; Pillow's own conversion clips at 255."""
    values = np.asarray(picture).astype(np.float32)
    low, high = values.min(), values.max()
    bits = tags.get(258, (16,))[0]  # BitsPerSample; other formats than TIFF have 16
    signed = tags.get(339, (1,))[0] == 2  # SampleFormat
    # 32-bit TIFF is a common container of 16-bit scans; anything else in it has no known white level.
    # So has a file that keeps 8 bits, or the 0 and 1 of a mask, in 16: it would come out black.
    unknown = (signed or high > 65535 or 0 < high <= 255) if bits <= 16 else not 255 < high <= 65535
    if unknown or low < 0:
        raise PhotoError(
            f"{path}: holds {'signed ' if signed else ''}{bits}-bit pixels from {low:.0f} to {high:.0f}, whose white "
            "level is unknown; save it as 8 or 16 bit"
        )
    white = 2 ** min(bits, 16) - 1
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _luminance(picture: Image.Image) -> Image.Image:
    """RGB or RGBA to grey; transparent parts count as black."""
    grey = picture.convert("L")
    if picture.mode == "RGBA":
        grey = Image.composite(grey, Image.new("L", grey.size, 0), picture.getchannel("A"))
    return grey


def _write_all(pictures: list[tuple[Path, Image.Image]]) -> None:
    """Write PNGs, all or none: encode each beside its place, then move them in, in the order given."""
    moves: list[tuple[Path, Path]] = []
    doomed: list[Path] = []  # what has to go if the write fails
    path = pictures[0][0]
    try:
        for path, picture in pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
            doomed.append(temporary)
            with temporary.open("xb") as f:
                picture.save(f, format="PNG")
            moves.append((temporary, path))
        if len(moves) > 1:
            path.unlink(missing_ok=True)  # an old picture must not meet a new mask
            doomed += [path for _, path in moves]
        for temporary, path in moves:
            os.replace(temporary, path)
    except BaseException as e:
        for leftover in doomed:
            with suppress(OSError):
                leftover.unlink()
        if isinstance(e, OSError):
            raise OutputError(
                f"{path}: can't be written ({e.strerror or e}); check the folder's permissions and free space, "
                "or choose another folder"
            ) from e
        raise
