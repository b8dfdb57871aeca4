"""Draw the sprites of the small world: a figure in a pose, with its accessory, on a transparent tile.

Accessories have colours outside the attribute palette, so that they can't be mistaken for a body colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from .brush import INK, RGB, Brush, Points, box, ellipse, mix, ribbon, rounded
from .figures import FIGURES, Look
from .identity import COLOURS, Identity

HAT, HAT_BAND, GOLD, TEAL = (62, 58, 82), (190, 178, 196), (224, 172, 40), (64, 206, 208)
TILE = 1.9  # side of the tile in nominal longest sides: room for a hat, a tilt and the outline
ANCHOR = (0.95, 1.52)  # where the ground point stands in the tile, in nominal longest sides


@dataclass(frozen=True)
class Pose:
    """turn: degrees, nose up; stretch: x and y factors; lift: above the ground, in sprite units; swing: of the legs."""

    turn: float
    stretch: tuple[float, float]
    lift: float
    swing: float


POSES: dict[str, Pose] = {
    "standing": Pose(0.0, (1.0, 1.0), 0.0, 0.0),
    "leaping": Pose(12.0, (1.0, 1.0), 0.07, 0.09),
    "crouching": Pose(0.0, (1.05, 0.88), 0.0, -0.05),
}

# Seats of the accessories: top of the head (x, y), scale and tilt of headgear; the scarf's path, its tail's x, y.
SEATS: dict[str, tuple[tuple[float, float, float, float], tuple[tuple[float, float], ...], tuple[float, float]]] = {
    "dog": ((0.33, -0.83, 0.86, -4), ((0.08, -0.50), (0.20, -0.43), (0.36, -0.45)), (0.17, -0.42)),
    "cat": ((0.0, -0.89, 1.0, 0), ((-0.20, -0.49), (0.0, -0.43), (0.20, -0.49)), (0.09, -0.44)),
    "bird": ((0.20, -0.93, 1.0, 8), ((-0.06, -0.68), (0.12, -0.56), (0.36, -0.57)), (0.06, -0.58)),
    "fish": ((0.17, -0.66, 1.0, 10), ((0.09, -0.66), (0.14, -0.42), (0.08, -0.18)), (0.10, -0.22)),
    "car": ((-0.06, -0.62, 1.0, 0), ((-0.40, -0.37), (-0.08, -0.35), (0.27, -0.37)), (-0.28, -0.34)),
    "cup": ((-0.06, -0.72, 1.0, 0), ((-0.37, -0.40), (-0.06, -0.34), (0.25, -0.40)), (0.06, -0.36)),
    "robot": ((0.0, -0.97, 1.0, 0), ((-0.24, -0.555), (0.0, -0.52), (0.24, -0.555)), (0.12, -0.52)),
    "tree": ((0.0, -0.97, 1.0, 0), ((-0.15, -0.31), (0.0, -0.27), (0.15, -0.31)), (0.13, -0.30)),
}


def _headgear(b: Brush, noun: str, crown: bool) -> None:
    x, y, scale, tilt = SEATS[noun][0]
    c, s = scale * np.cos(np.radians(tilt)), scale * np.sin(np.radians(tilt))

    def seat(points: Points) -> Points:
        return points @ np.array([[c, s], [-s, c]]) + (x, y)

    if crown:
        rim = rounded(
            (-0.17, 0.06),
            (-0.21, -0.20),
            (-0.095, -0.08),
            (0.0, -0.25),
            (0.095, -0.08),
            (0.21, -0.20),
            (0.17, 0.06),
            cut=0.06,
        )
        b.part([seat(rim)], GOLD)
        b.flat(seat(ellipse(0.0, -0.02, 0.035, 0.035)), (250, 226, 140))
    else:
        b.part(
            [seat(box(-0.13, -0.28, 0.13, 0.0, 0.08)), seat(ellipse(0.0, 0.01, 0.24, 0.05))],
            HAT,
            [(seat(box(-0.3, -0.10, 0.3, -0.03, 0.01)), HAT_BAND)],
        )


def _scarf(b: Brush, noun: str) -> None:
    _, path, (x, y) = SEATS[noun]
    b.part([ribbon((x, y), (x + 0.03, y + 0.12), (x - 0.01, y + 0.24), width=0.11, end=0.13)], mix(TEAL, INK, 0.14))
    b.part([ribbon(*path, width=0.13)], TEAL)


def draw_sprite(
    identity: Identity,
    pose: str = "standing",
    size_px: float = 64.0,
    flip: bool = False,
    rotation: float = 0.0,
    offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Draw a subject on a transparent tile.

    pose: a key of POSES; size_px: nominal longest side in pixels; flip: face left; rotation: degrees,
    counter-clockwise; offset: shift in pixels (for placing between pixels).
    Returns uint8 [S, S, 4], S = ceil(TILE · size_px), straight alpha that is exactly the antialiased coverage; the
    ground point stands at ANCHOR · size_px + offset. Raises ValueError for an unknown pose or a size under 8 px.
    """
    if pose not in POSES:
        raise ValueError(f"draw_sprite: pose {pose!r} is not one of {', '.join(POSES)}")
    if size_px < 8:
        raise ValueError(f"draw_sprite: size_px must be at least 8, got {size_px}")
    p = POSES[pose]
    over = 4 if size_px <= 110 else 3 if size_px <= 200 else 2
    side = ceil(TILE * size_px)
    unit = size_px * over
    # Turn about the middle of the subject, in its own frame, so that flipping mirrors the turn too.
    angle = np.radians(-p.turn)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    spin = np.radians(-rotation)
    roll = np.array([[np.cos(spin), -np.sin(spin)], [np.sin(spin), np.cos(spin)]])
    linear = roll @ np.diag([-1.0 if flip else 1.0, 1.0]) @ turn @ np.diag(p.stretch)
    middle = np.array([0.0, -0.4])
    shift = np.array([0.0, -0.4 * p.stretch[1] - p.lift]) - linear @ middle
    origin = (np.array(ANCHOR) * size_px + offset) * over
    brush = Brush(
        side * over,
        unit * np.column_stack([linear, shift]) + np.column_stack([np.zeros((2, 2)), origin]),
        outline=0.021 * unit,
    )
    body, second = COLOURS[identity.body], COLOURS[identity.second]
    look = Look(body, second, mix(body, INK, 0.22), identity.pattern, identity.shape, p.swing)
    FIGURES[identity.noun](brush, look)
    if identity.accessory == "scarf":
        _scarf(brush, identity.noun)
    elif identity.accessory != "none":
        _headgear(brush, identity.noun, identity.accessory == "crown")
    return np.asarray(brush.image.reduce(over))


def over_colour(tile: np.ndarray, colour: RGB = (226, 228, 232)) -> Image.Image:
    """A tile [S, S, 4] on a flat colour, for viewing."""
    back = Image.new("RGBA", tile.shape[1::-1], (*colour, 255))
    return Image.alpha_composite(back, Image.fromarray(tile)).convert("RGB")
