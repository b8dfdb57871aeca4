"""Draw the backgrounds of the small world: ten places, each in one of a few views and in varying light.

They are paler and less saturated than sprites, so that subjects stand out, and each has its own colours in sky and
ground, so that a part of it is enough to recognise it. There are few views, so that small models spend their capacity
on the subjects. All lengths are fractions of the canvas, and random numbers are drawn in an order that doesn't depend
on its size, so a seed gives the same scene at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .brush import RGB, Points, blob, box, ellipse, mix, ribbon, rounded

# name → (phrase after a subject, phrase for the empty place)
PLACES: dict[str, tuple[str, str]] = {
    "meadow": ("in a meadow", "an empty meadow"),
    "beach": ("on the beach", "an empty beach"),
    "snow": ("in the snow", "an empty field of snow"),
    "desert": ("in the desert", "an empty desert"),
    "city": ("in a city at night", "an empty city at night"),
    "forest": ("in a forest", "an empty forest"),
    "kitchen": ("in a kitchen", "an empty kitchen"),
    "moon": ("on the moon", "the empty moon"),
    "sea": ("under the sea", "the bottom of the sea"),
    "mountains": ("in the mountains at sunset", "the empty mountains at sunset"),
}
BACKGROUNDS: tuple[str, ...] = tuple(PLACES)
VIEWS = 6  # of each place


class _Canvas:
    """Draws on an RGB image in fractions of the canvas; `rng` gives the variation."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side = side
        self.rng = rng
        self.image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self.image)

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def shape(self, points: Points, fill: RGB) -> None:
        self._draw.polygon([tuple(v) for v in (points * self.side).tolist()], fill=fill)

    def fade(self, y0: float, y1: float, top: RGB, bottom: RGB, *clips: Points) -> None:
        """Fill the rows from y0 to y1, or the shapes within them, with an upright gradient."""
        a, b = round(y0 * self.side), round(y1 * self.side)
        column = np.linspace(top, bottom, max(b - a, 1)).round().astype(np.uint8)[:, None]
        strip = Image.fromarray(column).resize((self.side, max(b - a, 1)), Image.Resampling.NEAREST)
        mask = None
        if clips:
            mask = Image.new("L", strip.size)
            stencil = ImageDraw.Draw(mask)
            for clip in clips:
                stencil.polygon([tuple(v) for v in (clip * self.side - (0, a)).tolist()], fill=255)
        self.image.paste(strip, (0, a), mask)

    def ridge(self, y: float, rise: float, waves: float, top: RGB, bottom: RGB, to: float = 1.0) -> None:
        """A rolling hill line at height y that fills everything below it, down to `to`."""
        x = np.linspace(-0.02, 1.02, 40)
        p, q = self.u(0, 6.28), self.u(0, 6.28)
        line = y + rise * (0.65 * np.sin(waves * 3.0 * x + p) + 0.35 * np.sin(waves * 6.1 * x + q))
        points = np.concatenate([np.stack([x, line], 1), [(1.02, to), (-0.02, to)]])
        self.fade(float(line.min()), to, top, bottom, points)

    def glow(self, x: float, y: float, r: float, colour: RGB, strength: float) -> None:
        """A soft round light."""
        n = 32
        v, h = np.mgrid[0:n, 0:n] / (n - 1) * 2 - 1
        alpha = (np.clip(1 - np.hypot(h, v), 0, 1) ** 1.6 * 255 * strength).astype(np.uint8)
        size = max(2, round(2 * r * self.side))
        mask = Image.fromarray(alpha).resize((size, size), Image.Resampling.BILINEAR)
        self.image.paste(colour, (round((x - r) * self.side), round((y - r) * self.side)), mask)

    def cloud(self, x: float, y: float, s: float, colour: RGB) -> None:
        for dx, dy, rx, ry in (
            (-0.9, 0.1, 0.7, 0.35),
            (0.8, 0.12, 0.75, 0.33),
            (0.0, -0.15, 0.8, 0.6),
            (0, 0.2, 1.5, 0.26),
        ):
            self.shape(ellipse(0.0, 0.0, rx, ry) * s + (x + dx * s, y + dy * s), colour)

    def row(self, low: float, high: float, gap: float) -> list[float]:
        """Positions from low to high, about `gap` apart, jittered."""
        n = int((high - low) / gap) + 1
        start = self.u(-0.5, 0.5) * gap
        return [low + start + (i + self.u(-0.25, 0.25)) * gap for i in range(n + 1)]


def _meadow(c: _Canvas) -> None:
    c.fade(0, 0.62, (164, 208, 236), (226, 240, 238))
    c.glow(c.u(0.1, 0.9), c.u(0.06, 0.16), 0.30, (255, 250, 222), 0.9)
    for x in c.row(0.0, 1.0, 0.5):
        c.cloud(x, c.u(0.09, 0.24), c.u(0.055, 0.08), (250, 252, 252))
    c.ridge(c.u(0.46, 0.50), 0.035, 1.6, (170, 206, 168), (158, 198, 156))
    c.ridge(c.u(0.55, 0.58), 0.02, 1.2, (160, 202, 138), (126, 178, 116))
    for y in (0.68, 0.80, 0.93):
        for x in c.row(0.0, 1.0, 0.26):
            yy, petal = y + c.u(-0.03, 0.03), ((248, 244, 236), (244, 226, 180), (240, 208, 214))[int(c.u(0, 3))]
            c.shape(ribbon((-0.012, -0.02), (0.0, 0.012), (0.014, -0.024), width=0.006) + (x, yy), (112, 164, 104))
            c.shape(ellipse(0.0, 0.0, 0.012, 0.011) + (x + 0.02, yy - 0.014), petal)


def _beach(c: _Canvas) -> None:
    c.fade(0, 0.46, (176, 220, 240), (236, 244, 240))
    x = c.u(0.12, 0.88)
    c.glow(x, 0.14, 0.26, (255, 246, 210), 0.9)
    c.shape(ellipse(0.0, 0.0, 0.055, 0.055) + (x, 0.14), (255, 244, 206))
    level = c.u(0.40, 0.43)
    c.fade(level, 0.66, (108, 176, 198), (158, 212, 214))
    for y in (0.03, 0.075, 0.12):
        for x in c.row(0.0, 1.0, 0.30):
            c.shape(ellipse(0.0, 0.0, 0.06, 0.004) + (x, level + y), (176, 218, 222))
    x = c.u(0.1, 0.9)
    c.shape(rounded((-0.05, 0.0), (0.05, 0.0), (0.032, 0.024), (-0.032, 0.024)) + (x, level - 0.012), (150, 118, 104))
    c.shape(rounded((0.0, -0.10), (0.05, -0.012), (0.0, -0.012), cut=0.08) + (x, level - 0.005), (250, 250, 246))
    shore = c.u(0.56, 0.59)
    c.ridge(shore - 0.012, 0.018, 1.4, (244, 250, 248), (244, 250, 248), shore + 0.1)
    c.ridge(shore + 0.012, 0.014, 1.4, (240, 222, 184), (226, 202, 160))
    for y in (0.72, 0.86):
        for x in c.row(0.0, 1.0, 0.33):
            c.shape(ellipse(0.0, 0.0, 0.055, 0.006) + (x, y + c.u(-0.05, 0.05)), (218, 192, 150))


def _pine(c: _Canvas, x: float, y: float, s: float, leaf: RGB, snow: RGB | None = None) -> None:
    for w, top, low in ((0.34, -0.66, -0.10), (0.26, -0.88, -0.42)):
        c.shape(rounded((-w, low), (0.0, top), (w, low), cut=0.06) * s + (x, y), leaf)
        if snow:
            c.shape(rounded((-w * 0.45, top + 0.30), (0.0, top), (w * 0.45, top + 0.30), cut=0.08) * s + (x, y), snow)


def _snow(c: _Canvas) -> None:
    c.fade(0, 0.6, (186, 200, 220), (228, 232, 238))
    c.ridge(c.u(0.42, 0.46), 0.05, 1.5, (206, 216, 230), (216, 224, 234))
    for x in c.row(0.04, 0.96, 0.20):
        _pine(c, x, c.u(0.56, 0.60), c.u(0.22, 0.32), (134, 160, 164), (240, 244, 248))
    c.ridge(c.u(0.555, 0.575), 0.014, 1.3, (246, 248, 251), (220, 228, 240))
    c.ridge(c.u(0.74, 0.80), 0.02, 1.0, (238, 242, 248), (214, 224, 238))
    for _ in range(26):
        c.shape(ellipse(0.0, 0.0, 0.009, 0.009) + (c.u(0, 1), c.u(0, 0.95)), (252, 253, 255))


def _desert(c: _Canvas) -> None:
    c.fade(0, 0.6, (244, 214, 178), (252, 236, 204))
    x = c.u(0.12, 0.88)
    c.glow(x, 0.20, 0.30, (255, 250, 226), 1.0)
    c.shape(ellipse(0.0, 0.0, 0.07, 0.07) + (x, 0.20), (255, 250, 230))
    x, y = c.u(0.0, 1.0), 0.54
    c.shape(rounded((-0.26, 0.0), (-0.20, -0.15), (0.16, -0.15), (0.24, 0.0), cut=0.08) + (x, y), (216, 164, 134))
    c.shape(
        rounded((-0.20, 0.0), (-0.15, -0.08), (0.15, -0.08), (0.20, 0.0), cut=0.08) + (x + 0.45, y), (222, 174, 142)
    )
    c.ridge(c.u(0.50, 0.53), 0.03, 1.1, (226, 184, 138), (218, 172, 126))
    for x in c.row(0.08, 0.92, 0.42):
        s, y, green = c.u(0.85, 1.2), c.u(0.56, 0.60), (144, 160, 118)
        for path in (
            ((0.0, 0.0), (0.0, -0.17)),
            ((0.0, -0.06), (0.045, -0.07), (0.052, -0.12)),
            ((0.0, -0.04), (-0.04, -0.05), (-0.048, -0.095)),
        ):
            c.shape(ribbon(*path, width=0.026) * s + (x, y), green)
    c.ridge(c.u(0.58, 0.61), 0.022, 1.3, (234, 196, 148), (210, 162, 114))
    c.ridge(c.u(0.76, 0.82), 0.025, 1.0, (226, 184, 134), (202, 154, 108))


def _city(c: _Canvas) -> None:
    c.fade(0, 0.62, (40, 46, 86), (92, 88, 130))
    x = c.u(0.12, 0.88)
    c.glow(x, 0.13, 0.22, (150, 150, 190), 0.8)
    c.shape(ellipse(0.0, 0.0, 0.05, 0.05) + (x, 0.13), (240, 234, 212))
    for x in c.row(0.0, 1.0, 0.17):
        c.shape(box(-0.10, 0.0, 0.10, 0.6, 0.01) + (x, c.u(0.26, 0.44)), (66, 68, 112))
    for x in c.row(0.0, 1.0, 0.235):
        top, w = c.u(0.28, 0.46), 0.095
        c.shape(box(-w, 0.0, w, 0.6, 0.01) + (x, top), (50, 50, 88))
        for y in np.arange(top + 0.04, 0.60, 0.065):
            for dx in (-0.055, 0.0, 0.055):
                lit = c.u(0, 1) < 0.62
                c.shape(box(-0.017, 0.0, 0.017, 0.034, 0.02) + (x + dx, y), (236, 204, 132) if lit else (72, 74, 112))
    c.fade(0.60, 0.65, (118, 114, 136), (108, 104, 128))
    c.fade(0.65, 1.0, (88, 86, 112), (70, 68, 96))
    for x in c.row(0.0, 1.0, 0.30):
        c.shape(
            rounded((-0.07, 0.0), (0.05, 0.0), (0.07, 0.024), (-0.05, 0.024), cut=0.05) + (x, 0.82), (176, 170, 160)
        )


def _forest(c: _Canvas) -> None:
    c.fade(0, 0.62, (150, 182, 158), (190, 206, 170))
    c.glow(c.u(0.2, 0.8), 0.28, 0.45, (238, 240, 206), 0.9)
    for y, half, gap, bark in ((0.58, 0.022, 0.13, (136, 156, 134)), (0.63, 0.036, 0.27, (106, 108, 90))):
        for x in c.row(0.0, 1.0, gap):
            c.shape(
                rounded((-half, -1.0), (half, -1.0), (half * 1.3, 0.0), (-half * 1.3, 0.0), cut=0.02) + (x, y), bark
            )
    for x in c.row(0.0, 1.0, 0.2):
        c.shape(ellipse(0.0, 0.0, 0.17, 0.12) + (x, c.u(-0.03, 0.05)), (82, 124, 94))
    for x in c.row(0.1, 1.0, 0.24):
        c.shape(ellipse(0.0, 0.0, 0.13, 0.07) + (x, c.u(-0.03, 0.01)), (68, 108, 84))
    for x in c.row(0.0, 1.0, 0.2):
        c.shape(ellipse(0.0, 0.0, 0.12, 0.06) + (x, c.u(0.60, 0.62)), (98, 138, 98))
    c.ridge(c.u(0.60, 0.62), 0.012, 1.6, (118, 142, 94), (84, 110, 76))
    for y in (0.72, 0.88):
        for x in c.row(0.0, 1.0, 0.28):
            c.shape(ellipse(0.0, 0.0, 0.05, 0.010) + (x, y + c.u(-0.04, 0.04)), (134, 132, 92))


def _kitchen(c: _Canvas) -> None:
    wall = ((240, 230, 212), (234, 228, 220), (230, 232, 218))[int(c.u(0, 3))]
    c.fade(0, 0.62, wall, mix(wall, (210, 196, 178), 0.4))
    left = c.u(0, 1) < 0.5
    x = c.u(0.20, 0.30) if left else c.u(0.70, 0.80)
    c.shape(box(-0.16, 0.0, 0.16, 0.30, 0.04) + (x, 0.07), (250, 248, 242))
    c.fade(0.09, 0.35, (178, 212, 230), (220, 234, 232), box(-0.135, 0.09, 0.135, 0.35, 0.02) + (x, 0.0))
    c.shape(box(-0.010, 0.07, 0.010, 0.36, 0.02) + (x, 0.0), (250, 248, 242))
    c.shape(box(-0.15, 0.205, 0.15, 0.225, 0.02) + (x, 0.0), (250, 248, 242))
    x = c.u(0.68, 0.76) if left else c.u(0.24, 0.32)
    c.shape(box(-0.20, 0.245, 0.20, 0.27, 0.02) + (x, 0.0), (176, 138, 108))
    for dx in (-0.13, 0.0, 0.13):
        tall, tone = c.u(0.07, 0.11), ((206, 186, 178), (186, 198, 190), (222, 206, 172))[int(c.u(0, 3))]
        c.shape(box(-0.038, -tall, 0.038, 0.0, 0.12) + (x + dx, 0.245), tone)
        c.shape(box(-0.030, -0.014, 0.030, 0.006, 0.1) + (x + dx, 0.245 - tall), (156, 124, 102))
    tiles, shift = ((214, 222, 220), (226, 230, 226)), int(c.u(0, 2))
    for i in range(10):
        for j in range(2):
            c.shape(box(0.006, 0.006, 0.094, 0.084, 0.04) + (i * 0.1, 0.42 + 0.09 * j), tiles[(i + j + shift) % 2])
    c.fade(0.60, 0.635, (222, 188, 150), (212, 174, 134))
    c.fade(0.635, 1.0, (206, 168, 128), (188, 148, 110))
    for y in (0.74, 0.86):
        for x in c.row(0.0, 1.0, 0.42):
            c.shape(ellipse(0.0, 0.0, 0.13, 0.005) + (x, y + c.u(-0.04, 0.04)), (186, 146, 108))


def _moon(c: _Canvas) -> None:
    c.fade(0, 0.62, (24, 24, 44), (46, 44, 72))
    for _ in range(34):
        r = c.u(0.003, 0.008)
        c.shape(ellipse(0.0, 0.0, 1.0, 1.0) * r + (c.u(0, 1), c.u(0, 0.55)), (226, 226, 236))
    x, y, r = c.u(0.15, 0.85), c.u(0.13, 0.22), c.u(0.085, 0.11)
    c.glow(x, y, 2 * r, (96, 126, 168), 0.8)
    c.shape(ellipse(0.0, 0.0, 1.0, 1.0) * r + (x, y), (108, 150, 190))
    c.shape(blob((-0.7, -0.3), (-0.1, -0.7), (0.2, -0.2), (-0.2, 0.3), (-0.5, 0.2)) * r + (x, y), (150, 184, 160))
    c.shape(blob((0.2, 0.2), (0.7, 0.1), (0.5, 0.7), (0.1, 0.6)) * r + (x, y), (150, 184, 160))
    c.ridge(c.u(0.50, 0.54), 0.03, 1.7, (116, 114, 130), (104, 102, 120))
    c.ridge(c.u(0.58, 0.61), 0.012, 1.2, (172, 170, 178), (134, 132, 146))
    for y, s in ((0.68, 0.6), (0.79, 0.8), (0.93, 1.0)):
        for x in c.row(0.0, 1.0, 0.40):
            at = (x, y + c.u(-0.03, 0.03))
            c.shape(ellipse(0.0, 0.0, 0.085, 0.026) * s + at, (186, 184, 192))
            c.shape(ellipse(0.0, 0.004, 0.074, 0.020) * s + at, (120, 118, 134))


def _sea(c: _Canvas) -> None:
    c.fade(0, 0.70, (142, 206, 210), (66, 136, 164))
    rays = []
    for x in c.row(0.0, 1.0, 0.32):
        lean, w = c.u(-0.16, -0.06), c.u(0.03, 0.06)
        rays.append(np.array([(x - w, -0.01), (x + w, -0.01), (x + 2 * w + lean, 0.64), (x - 2 * w + lean, 0.64)]))
    c.fade(0, 0.62, (164, 218, 218), (72, 142, 168), *rays)
    c.ridge(c.u(0.52, 0.55), 0.035, 1.9, (74, 134, 152), (70, 128, 146))
    for x in c.row(0.05, 0.95, 0.23):
        tall, way = c.u(0.14, 0.28), 1 if c.u(0, 1) < 0.5 else -1
        for dx, k in ((-0.025, 0.8), (0.012, 1.0), (0.04, 0.65)):
            weed = ribbon((0.0, 0.0), (0.08, -0.33), (-0.06, -0.66), (0.12, -1.0), width=0.12, end=0.05)
            c.shape(weed * (0.21 * way, tall * k) + (x + dx, 0.66), (70, 142, 122) if k == 1.0 else (84, 154, 134))
    c.ridge(c.u(0.60, 0.63), 0.018, 1.3, (206, 206, 176), (166, 172, 152))
    for _ in range(9):
        at, r = (c.u(0, 1), c.u(0.05, 0.6)), c.u(0.010, 0.020)
        c.shape(ellipse(0.0, 0.0, 1.0, 1.0) * r + at, (190, 228, 228))
        c.shape(ellipse(0.12, 0.14, 0.72, 0.72) * r + at, (138, 196, 206))
    for y in (0.74, 0.88):
        for x in c.row(0.0, 1.0, 0.36):
            c.shape(ellipse(0.0, 0.0, 0.035, 0.018) + (x, y + c.u(-0.04, 0.04)), (150, 154, 142))


def _mountains(c: _Canvas) -> None:
    c.fade(0, 0.7, (192, 158, 192), (252, 210, 184))
    x = c.u(0.15, 0.85)
    c.glow(x, 0.36, 0.40, (255, 234, 200), 1.0)
    c.shape(ellipse(0.0, 0.0, 0.075, 0.075) + (x, 0.36), (255, 240, 212))
    for y, gap, tall, rock, cap in (
        (0.58, 0.36, 0.36, (172, 146, 180), (240, 220, 224)),
        (0.62, 0.42, 0.22, (142, 120, 158), None),
    ):
        for x in c.row(0.0, 1.0, gap):
            peak = c.u(0.8, 1.1) * tall
            c.shape(rounded((-0.8, 0.25), (0.0, -1.0), (0.8, 0.25), cut=0.05) * peak + (x, y), rock)
            if cap:
                c.shape(
                    rounded(
                        (-0.235, -0.64),
                        (0.0, -1.0),
                        (0.235, -0.64),
                        (0.09, -0.70),
                        (0.0, -0.62),
                        (-0.10, -0.70),
                        cut=0.08,
                    )
                    * peak
                    + (x, y),
                    cap,
                )
    c.ridge(c.u(0.58, 0.61), 0.014, 1.3, (146, 124, 142), (112, 96, 122))
    for y in (0.70, 0.82, 0.94):
        for x in c.row(0.0, 1.0, 0.30):
            c.shape(ellipse(0.0, 0.0, 0.075, 0.008) + (x, y + c.u(-0.03, 0.03)), (160, 136, 150))


_DRAW: dict[str, Callable[[_Canvas], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "desert": _desert,
    "city": _city,
    "forest": _forest,
    "kitchen": _kitchen,
    "moon": _moon,
    "sea": _sea,
    "mountains": _mountains,
}


def draw_background(name: str, seed: int | tuple[int, ...], size: int = 128) -> np.ndarray:
    """Draw a place. seed: a non-negative integer, or several; size: pixels. Returns uint8 [size, size, 3].

    Raises ValueError for an unknown place.
    """
    if name not in _DRAW:
        raise ValueError(f"draw_background: {name!r} is not one of {', '.join(BACKGROUNDS)}")
    rng = np.random.default_rng(seed)
    light, warmth, view = rng.uniform(0.94, 1.05), rng.uniform(-0.03, 0.03), int(rng.integers(VIEWS))
    c = _Canvas(size * 2, np.random.default_rng([BACKGROUNDS.index(name), view]))
    _DRAW[name](c)
    gains = [light * (1 + warmth), light, light * (1 - warmth)]
    return np.asarray(c.image.reduce(2).point([min(255, round(v * g)) for g in gains for v in range(256)]))
