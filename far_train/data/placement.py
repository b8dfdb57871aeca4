"""Layout of a composite: cut subjects out, scale them, find places for them, paste them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import Tensor

from ..utils.geometry import bounding_box

TRIES = 50
# Distance of the centres in a row and its random shift, as shares of an even column's width.
ROW_PITCH, ROW_SHAKE = 0.82, 0.04
SHADOW_WIDTH, SHADOW_HEIGHT = 0.85, 0.15  # as shares of the subject's width
# A side cuts the subject off if the subject covers this share of its own width or height there …
CUT_SHARE = 0.1
CUT_BAND = 0.005  # … within a band of this share of the photo
CONTEXT = 0.08  # kept around a subject, as a share of its size: rotation and feathering need real pixels there


@dataclass(frozen=True)
class Cutout:
    """A subject with a little of its surroundings: ``picture`` (RGB) and ``mask`` (L), of one size.

    ``baseline_y``: its lower edge in the photo, as a share of the photo's height; None if unknown.
    ``on_edge``: the photo's lower edge cut it off. It goes on the canvas's lower edge, which hides the cut.
    """

    picture: Image.Image
    mask: Image.Image
    baseline_y: float | None = None
    on_edge: bool = False

    @cached_property
    def region(self) -> np.ndarray:
        """The subject's pixels, bool [H, W]."""
        return np.asarray(self.mask) > 127

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box of the subject: left, top, right, bottom."""
        return bounding_box(self.region)

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the subject, in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


@dataclass(frozen=True)
class Placement:
    """A cutout with its upper left corner at pixel (``x``, ``y``) of the canvas; a higher ``z`` covers a lower one."""

    cutout: Cutout
    x: int
    y: int
    z: int


def cut_out(picture: Image.Image, mask: Image.Image) -> Cutout:
    """Crop a photo to its subject and a little context."""
    region = np.asarray(mask) > 127
    left, top, right, bottom = bounding_box(region)
    pad = round(CONTEXT * max(right - left, bottom - top)) + 2
    box = (max(left - pad, 0), max(top - pad, 0), min(right + pad, picture.width), min(bottom + pad, picture.height))
    return Cutout(picture.crop(box), mask.crop(box), bottom / picture.height, "bottom" in cut_sides(region))


def cut_sides(region: np.ndarray) -> tuple[str, ...]:
    """The sides of a photo (left, top, right, bottom) that cut its subject off.

    A side does so if the subject, bool [H, W], touches it along a tenth of the subject's own height or width.
    """
    height, width = region.shape
    left, top, right, bottom = bounding_box(region)
    across, along = max(round(CUT_BAND * width), 1), max(round(CUT_BAND * height), 1)
    touching = {
        "left": region[:, :across].any(1).sum() / (bottom - top),
        "top": region[:along].any(0).sum() / (right - left),
        "right": region[:, -across:].any(1).sum() / (bottom - top),
        "bottom": region[-along:].any(0).sum() / (right - left),
    }
    return tuple(side for side, share in touching.items() if share >= CUT_SHARE)


def fit_inside(cutout: Cutout, width: int, height: int, angle: float = 0.0) -> Cutout:
    """Rotate by ``angle`` degrees, then scale so that the subject itself just fits into ``width`` × ``height`` pixels.

    A subject on the canvas's lower edge is not rotated.
    """
    picture, mask = cutout.picture, cutout.mask
    if angle and not cutout.on_edge:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    turned = Cutout(picture, mask)
    own_width, own_height = turned.extent
    scale = min(width / own_width, height / own_height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture, mask = picture.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.BOX)
    return Cutout(picture, mask, cutout.baseline_y, cutout.on_edge)


def place(
    cutouts: Sequence[Cutout],
    size: int,
    margin: int,
    max_covered: float,
    rng: np.random.Generator,
    vertical_jitter: float = 1.0,
) -> list[Placement]:
    """Find a place for every subject on a square canvas of ``size`` pixels.

    Random places are tried until the subjects, each grown by ``margin`` pixels, don't overlap. After 50 tries they are
    put in columns, in random order. With ``max_covered`` > 0 subjects must overlap instead: the overlaps of all pairs,
    each as a share of its smaller subject, sum to at most ``max_covered``. A subject's lower edge stays within
    ``vertical_jitter`` × ``size`` of its height in the photo; with 1 it may be anywhere.
    """
    layers = [int(z) for z in rng.permutation(len(cutouts))]
    occlude = max_covered > 0 and len(cutouts) > 1
    grown = [_grow(c.region, 0 if occlude else margin) for c in cutouts]
    for _ in range(TRIES):
        placed = [Placement(c, *_random_corner(c, size, rng, vertical_jitter), z) for c, z in zip(cutouts, layers)]
        covered = _covered(placed, grown)
        if (0 < covered <= max_covered) if occlude else covered == 0:
            return placed
    return _columns(cutouts, size, margin, layers, rng, vertical_jitter)


def place_in_row(
    cutouts: Sequence[Cutout], size: int, max_covered: float, rng: np.random.Generator, vertical_jitter: float = 1.0
) -> list[Placement]:
    """Put the subjects side by side on a square canvas of ``size`` pixels, like people posing for a photo.

    The order is random. Centres are ``ROW_PITCH`` of an even column apart, and a lower subject is in front. Heights
    (see :func:`place`) are drawn again until the overlap is at most ``max_covered``; after 50 tries the one with the
    smallest overlap is used.
    """
    width = size / len(cutouts)
    columns = rng.permutation(len(cutouts)) - (len(cutouts) - 1) / 2
    best: list[Placement] = []
    least = float("inf")
    for _ in range(TRIES):
        placed = []
        for cutout, column in zip(cutouts, columns):
            left, _, right, bottom = cutout.box
            y = _random_top(cutout, size, rng, vertical_jitter)
            middle = size / 2 + ROW_PITCH * width * (column + rng.uniform(-ROW_SHAKE, ROW_SHAKE))
            x = min(max(round(middle - (right - left) / 2), 0), max(size - (right - left), 0))
            placed.append(Placement(cutout, x - left, y, y + bottom))
        covered = _covered(placed, [cutout.region for cutout in cutouts])
        if covered <= max_covered:
            return placed
        if covered < least:
            best, least = placed, covered
    return best


def paste(
    canvas: Image.Image, placed: Sequence[Placement], feather: float, erode: int, shadow: float = 0.0
) -> tuple[Image.Image, list[Tensor]]:
    """Paste the subjects onto the canvas in the order of ``z``.

    ``feather`` and ``erode`` are in pixels, ``shadow`` as in :func:`cast_shadows`. Returns the picture and the visible
    region of every subject, [S, S] float 0..1, in the order of ``placed``.
    """
    canvas = cast_shadows(canvas, placed, shadow) if shadow else canvas.copy()
    masks: dict[int, np.ndarray] = {}
    for i in sorted(range(len(placed)), key=lambda i: placed[i].z):
        item = placed[i]
        solid = item.cutout.mask.filter(ImageFilter.MinFilter(2 * erode + 1)) if erode else item.cutout.mask
        if solid.getextrema()[1] <= 127:  # too thin to lose its rim
            solid = item.cutout.mask
        # Pad before blurring, so that a subject at the photo's edge fades out instead of ending in a line.
        solid_canvas = Image.new("L", canvas.size)
        solid_canvas.paste(solid, (item.x, item.y))
        soft = (
            np.asarray(solid_canvas.filter(ImageFilter.GaussianBlur(feather / 2)))
            if feather
            else np.asarray(solid_canvas)
        )
        # The rim fades inwards only: outside the subject the photo's own background would show.
        alpha = np.minimum(soft, np.asarray(solid_canvas))
        layer = canvas.copy()
        layer.paste(item.cutout.picture, (item.x, item.y))
        canvas = Image.composite(layer, canvas, Image.fromarray(alpha))
        own = np.asarray(solid_canvas, dtype=np.float32) / 255
        for lower in masks:
            masks[lower] = masks[lower] * (1 - own)
        masks[i] = own
    return canvas, [torch.from_numpy(masks[i]) for i in range(len(placed))]


def cast_shadows(canvas: Image.Image, placed: Sequence[Placement], depth: float) -> Image.Image:
    """Darken the ground under each subject, by at most ``depth`` (0..1) in the middle of a soft flat ellipse.

    Shadows belong to the background: masks don't include them, and they never fall on a subject.
    """
    ground = np.asarray(canvas, dtype=np.float32)
    y, x = np.ogrid[: canvas.height, : canvas.width]
    for item in placed:
        if item.cutout.on_edge:  # its lower end is outside the picture
            continue
        left, _, right, bottom = item.cutout.box
        width = right - left
        across = (x - item.x - (left + right) / 2) / (SHADOW_WIDTH * width / 2)
        along = (y - item.y - bottom) / (SHADOW_HEIGHT * width / 2)
        ground = ground * (1 - depth * np.clip(1 - across**2 - along**2, 0, 1))[..., None]
    return Image.fromarray(ground.round().astype(np.uint8))


def _grow(region: np.ndarray, margin: int) -> np.ndarray:
    """Dilate by ``margin`` pixels; the array grows by as much on every side."""
    padded = np.pad(region, margin)
    return ndimage.maximum_filter(padded, 2 * margin + 1) if margin else padded


def _random_corner(cutout: Cutout, size: int, rng: np.random.Generator, vertical_jitter: float) -> tuple[int, int]:
    """Upper left corner of the cutout, uniform among those that keep the subject (without its context) on the canvas.

    The height stays near the one in the photo.
    """
    left, _, right, _ = cutout.box
    x = rng.integers(0, max(size - (right - left), 0) + 1) - left
    return int(x), _random_top(cutout, size, rng, vertical_jitter)


def _random_top(cutout: Cutout, size: int, rng: np.random.Generator, vertical_jitter: float) -> int:
    """Upper edge of the cutout, with its context, at such a place."""
    _, top, _, bottom = cutout.box
    lowest = max(size - (bottom - top), 0)
    if cutout.on_edge:
        return lowest - top
    if cutout.baseline_y is None or vertical_jitter >= 1:
        return int(rng.integers(0, lowest + 1) - top)
    baseline_y = (cutout.baseline_y + rng.uniform(-vertical_jitter, vertical_jitter)) * size
    return int(np.clip(round(baseline_y) - (bottom - top), 0, lowest) - top)


def _covered(placed: Sequence[Placement], grown: Sequence[np.ndarray]) -> float:
    """Sum over all pairs of their common pixels as a share of the smaller subject."""
    pairs = combinations(zip(placed, grown), 2)
    return sum(_overlap(a, grown_a, b, grown_b) for (a, grown_a), (b, grown_b) in pairs)


def _overlap(a: Placement, grown_a: np.ndarray, b: Placement, grown_b: np.ndarray) -> float:
    """Common pixels of two regions as a share of the smaller."""
    ax, ay = _grown_corner(a, grown_a)
    bx, by = _grown_corner(b, grown_b)
    left, top = max(ax, bx), max(ay, by)
    right = min(ax + grown_a.shape[1], bx + grown_b.shape[1])
    bottom = min(ay + grown_a.shape[0], by + grown_b.shape[0])
    if left >= right or top >= bottom:
        return 0.0
    common = (
        grown_a[top - ay : bottom - ay, left - ax : right - ax]
        & grown_b[top - by : bottom - by, left - bx : right - bx]
    )
    return float(common.sum()) / max(min(int(grown_a.sum()), int(grown_b.sum())), 1)


def _grown_corner(item: Placement, grown: np.ndarray) -> tuple[int, int]:
    margin = (grown.shape[1] - item.cutout.mask.width) // 2
    return item.x - margin, item.y - margin


def _columns(
    cutouts: Sequence[Cutout],
    size: int,
    margin: int,
    layers: Sequence[int],
    rng: np.random.Generator,
    vertical_jitter: float,
) -> list[Placement]:
    width = size // len(cutouts)
    placed = []
    for cutout, column, z in zip(cutouts, rng.permutation(len(cutouts)), layers):
        room = width - 2 * margin
        if cutout.extent[0] > room:
            cutout = fit_inside(cutout, room - 1, cutout.extent[1])  # resampling may round a pixel up
        x, y = _random_corner(cutout, size, rng, vertical_jitter)
        left, _, right, _ = cutout.box
        x = int(column) * width + (width - (right - left)) // 2 - left
        placed.append(Placement(cutout, x, y, z))
    return placed
