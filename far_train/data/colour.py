"""Convert photos with any ICC profile to sRGB, the colour space that models are trained on."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

RELATIVE_COLORIMETRIC, BLACK_POINT_COMPENSATION = 1, 0x2000  # LittleCMS' own numbers, which no Pillow renames
STEPS = (0, 32, 64, 96, 128, 160, 192, 224, 255)


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """A picture of mode L, RGB or CMYK as sRGB by its ICC profile: RGB, or the very same where the profile is sRGB.

    Raises ValueError saying why the profile can't be used.
    """
    try:
        from PIL import ImageCms

        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = given.profile.xcolor_space.strip()
        if space == "RGB" and picture.mode == "L":  # programs keep the profile when they take the colours away
            picture = picture.convert("RGB")
        if space != {"L": "GRAY"}.get(picture.mode, picture.mode):
            raise ValueError(f"it is for {space} and the picture is {picture.mode}")
        transform = ImageCms.buildTransform(
            given, ImageCms.createProfile("sRGB"), picture.mode, "RGB", RELATIVE_COLORIMETRIC, BLACK_POINT_COMPENSATION
        )
        return picture if _changes_nothing(transform, picture.mode) else ImageCms.applyTransform(picture, transform)
    except (ImportError, OSError, AttributeError, TypeError) as e:  # no LittleCMS in this Pillow; damaged profiles
        raise ValueError(str(e) or type(e).__name__) from e
    except Exception as e:
        if type(e).__name__ == "PyCMSError":  # its class is only there with LittleCMS
            raise ValueError(str(e)) from e
        raise


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether the profile is sRGB, or grey of its curve, in other words: what rounding alone changes is left alone."""
    from PIL import ImageCms

    if mode == "CMYK":
        return False
    if mode == "L":
        probe = Image.fromarray(np.array([STEPS], dtype=np.uint8))
    else:
        probe = Image.fromarray(np.stack(np.meshgrid(STEPS, STEPS, STEPS), -1).reshape(1, -1, 3).astype(np.uint8))
    found = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int)
    return bool(np.abs(found - np.asarray(probe.convert("RGB"), dtype=int)).max() <= 1)
