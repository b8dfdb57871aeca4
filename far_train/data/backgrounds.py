"""Make the backgrounds of composites: cropped photos, photos with their subject filled in, plain colours."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .images import from_pil, mask_from_pil, to_pil

PLAIN_COLOURS = {
    "white": (242, 241, 238),
    "grey": (150, 152, 154),
    "black": (28, 28, 30),
    "blue": (92, 140, 196),
    "green": (112, 160, 104),
    "yellow": (232, 204, 108),
    "pink": (228, 168, 178),
    "brown": (146, 112, 84),
}


def cover(
    picture: Image.Image, mask: Image.Image | None, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image | None]:
    """Crop to a square and scale to ``size`` pixels.

    The place is random among those that keep the masked subject whole, else the one that shows most of it.
    """
    side = min(picture.size)
    left, top = _crop_corner(picture, mask, side, rng)
    box = (left, top, left + side, top + side)
    image = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return image, None if mask is None else mask.resize((size, size), Image.Resampling.BOX, box=box)


def _crop_corner(
    picture: Image.Image, mask: Image.Image | None, side: int, rng: np.random.Generator
) -> tuple[int, int]:
    corner = []
    for axis, length in enumerate(picture.size):
        places = np.arange(length - side + 1)
        if mask is not None:
            pixels = np.cumsum([0, *(np.asarray(mask) > 127).sum(axis)])
            shown = pixels[side:] - pixels[:-side]
            places = np.flatnonzero(shown == shown.max())
            if shown.max() < pixels[-1]:
                places = places[[len(places) // 2]]
        corner.append(int(rng.choice(places)))
    return corner[0], corner[1]


def infill(picture: Image.Image, mask: Image.Image, size: int) -> Image.Image:
    """Replace a photo's subject by its surroundings, with push-pull over an image pyramid.

    The shorter side is scaled to at most ``size`` pixels. The result is smooth where the subject was, so no trace of
    the subject remains in the background.
    """
    side = min(picture.size)
    small = tuple(round(length * min(size / side, 1)) for length in picture.size)
    pixels = from_pil(picture.resize(small, Image.Resampling.LANCZOS)).permute(2, 0, 1)[None]
    matte = mask_from_pil(mask.resize(small, Image.Resampling.BOX))[None, None]
    rim = max(min(small) // 50, 1)  # hair and shadows reach beyond a mask
    hole = F.max_pool2d((matte > 0.02).float(), 2 * rim + 1, 1, rim)
    return to_pil(_push_pull(pixels * (1 - hole), 1 - hole)[0].permute(1, 2, 0))


def _push_pull(pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Fill unknown pixels from coarser levels. ``pixels`` [1, 3, H, W] are premultiplied by ``known`` [1, 1, H, W]."""
    if min(pixels.shape[-2:]) <= 2:
        mean = pixels.sum((-2, -1), keepdim=True) / known.sum((-2, -1), keepdim=True).clamp(min=1e-6)
        return torch.where(known.sum() > 0, mean, torch.full_like(mean, 0.5)).expand_as(pixels)
    coarse_known = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels, 2, ceil_mode=True)
    filled = _push_pull(coarse, coarse_known)
    smooth = F.interpolate(filled, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return pixels + smooth * (1 - known)


def plain_background(size: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A plain colour or a soft gradient of two, with the phrase that names it."""
    names = list(PLAIN_COLOURS)
    first, second = rng.choice(len(names), 2, replace=False)
    start = np.array(PLAIN_COLOURS[names[first]], dtype=np.float32) + rng.uniform(-12, 12, 3)
    if rng.random() < 0.5:
        pixels = np.broadcast_to(start, (size, size, 3))
        phrase = f"on a plain {names[first]} background"
    else:
        end = np.array(PLAIN_COLOURS[names[second]], dtype=np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        x, y = np.meshgrid(np.linspace(-0.5, 0.5, size), np.linspace(-0.5, 0.5, size))
        ramp = np.clip(x * np.cos(angle) + y * np.sin(angle) + 0.5, 0, 1)[..., None]
        pixels = start * (1 - ramp) + end * ramp
        phrase = "on a gradient background"
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), phrase
