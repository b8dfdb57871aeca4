"""Draw smooth vector shapes with Pillow: outlined, patterned and softly lit.

Shapes are point lists in a frame whose origin is where a subject meets the ground, x to the right, y downwards (so
most of a subject has negative y), one unit being the subject's nominal longest side. A matrix maps them to pixels,
so pose, flip and rotation don't blur them, and the light always comes from the upper left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import ceil

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Points = np.ndarray  # [N, 2] float
INK: RGB = (46, 40, 66)
_GROW = [0 if v < 41 else 255 for v in range(256)]


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """Colour between `a` (t = 0) and `b` (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def ink_of(fill: RGB) -> RGB:
    """Outline colour of a fill: a deep shade of the same hue, which looks softer than black."""
    return mix(tuple(int(c * 0.5) for c in fill), INK, 0.45)


@lru_cache(maxsize=1024)
def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Points:
    """Ellipse outline, [36, 2]."""
    t = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = rx * np.cos(t), ry * np.sin(t)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], 1)


@lru_cache(maxsize=1024)
def blob(*knots: tuple[float, float]) -> Points:
    """Smooth closed curve through the knots (Catmull-Rom), six points a span."""
    p = np.asarray(knots, float)
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, 6, endpoint=False)[None, :, None]
    a, b, c, d = (v[:, None] for v in (a, b, c, d))
    return (0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)).reshape(
        -1, 2
    )


@lru_cache(maxsize=1024)
def rounded(*corners: tuple[float, float], cut: float = 0.25) -> Points:
    """Polygon with soft corners (Chaikin's corner cutting, three rounds); `cut` is how much of each side is rounded."""
    p = np.asarray(corners, float)
    for share in (cut, 0.25, 0.25):
        q = np.roll(p, -1, 0)
        p = np.stack([p + (q - p) * share, q + (p - q) * share], 1).reshape(-1, 2)
    return p


def box(x0: float, y0: float, x1: float, y1: float, cut: float = 0.2) -> Points:
    """Rectangle with soft corners."""
    return rounded((x0, y0), (x1, y0), (x1, y1), (x0, y1), cut=cut)


@lru_cache(maxsize=1024)
def ribbon(*path: tuple[float, float], width: float, end: float | None = None) -> Points:
    """Thick curve through the path with round ends; `end` is the width at its end (default: the same)."""
    p = np.asarray(path, float)
    n = len(p)
    ext = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, n - 1, 6 * (n - 1) + 1)
    i = np.minimum(t.astype(int), n - 2)
    u = (t - i)[:, None]
    a, b, c, d = ext[i], ext[i + 1], ext[i + 2], ext[i + 3]
    line = 0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    half = np.linspace(width, width if end is None else end, len(line))[:, None] / 2
    side = np.stack([-along[:, 1], along[:, 0]], 1) * half

    def cap(at: int, sign: int) -> Points:
        turn = np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
        return line[at] + half[at] * (np.cos(turn) * along[at] * sign - np.sin(turn) * (-side[at] / half[at]) * sign)

    return np.concatenate([line - side, cap(-1, 1), (line + side)[::-1], cap(0, -1)])


@lru_cache(maxsize=1)
def _light() -> Image.Image:
    """Soft-light texture: bright at the upper left, dark at the lower right, neutral (128) between."""
    y, x = np.mgrid[0:32, 0:32] / 31.0
    bright = 160 - 90 * np.clip(np.hypot(x - 0.3, y - 0.2) - 0.25, 0, 1)
    return Image.fromarray(bright.clip(0, 255).astype(np.uint8))


class Brush:
    """Draws parts on a transparent RGBA tile of side×side pixels; `matrix` [2, 3] carries unit points to pixels."""

    def __init__(self, side: int, matrix: np.ndarray, outline: float) -> None:
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._matrix = matrix
        self._outline = outline

    def _pixels(self, points: Points, origin: tuple[int, int] = (0, 0)) -> list[tuple[float, float]]:
        q = points @ self._matrix[:, :2].T + (self._matrix[:, 2] - origin)
        return [tuple(v) for v in q.tolist()]

    def part(
        self, shapes: Sequence[Points], fill: RGB, marks: Iterable[tuple[Points, RGB]] = (), line: bool = True
    ) -> None:
        """Draw shapes as one silhouette: one outline, one fill, `marks` (shape, colour) clipped to it, then light."""
        flat = np.concatenate(shapes) @ self._matrix[:, :2].T + self._matrix[:, 2]
        pad = ceil(3 * self._outline)  # keeps the blur below clear of the crop's border
        x0, y0 = (int(v) - pad for v in np.floor(flat.min(0)))
        x1, y1 = (int(v) + pad for v in np.ceil(flat.max(0)))
        extent = (x1 - x0, y1 - y0)
        mask = Image.new("L", extent)
        stencil = ImageDraw.Draw(mask)
        for s in shapes:
            stencil.polygon(self._pixels(s, (x0, y0)), fill=255)
        if line:
            # A blurred mask cut at Φ(−1) = 16 % is the shape grown by one sigma: an even line with round corners.
            grown = mask.filter(ImageFilter.GaussianBlur(self._outline)).point(_GROW)
            self.image.paste((*ink_of(fill), 255), (x0, y0), grown)
        layer = Image.new("RGB", extent, fill)
        paint = ImageDraw.Draw(layer)
        for shape, colour in marks:
            paint.polygon(self._pixels(shape, (x0, y0)), fill=colour)
        light = _light().resize(extent, Image.Resampling.BILINEAR)
        layer = ImageChops.soft_light(layer, Image.merge("RGB", (light, light, light)))
        self.image.paste(layer, (x0, y0), mask)

    def flat(self, shape: Points, fill: RGB) -> None:
        """Draw a small shape without outline or light (eyes, buttons, gleams)."""
        self._draw.polygon(self._pixels(shape), fill=(*fill, 255))

    def stroke(self, path: Points, fill: RGB, width: float) -> None:
        """Draw an open line; `width` in units of the outline."""
        self._draw.line(
            self._pixels(path), fill=(*fill, 255), width=max(1, round(width * self._outline)), joint="curve"
        )
