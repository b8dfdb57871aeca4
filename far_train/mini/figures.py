"""Draw the figures of the small world: one function per class.

All in the unit frame of `brush`: facing right, standing at y = 0, about one unit in the longer direction. No
detail that distinguishes identities is finer than about an eighth of a unit: at a longest side of 60 px that is one
latent cell of 8 px. Other colours (glass, trunk, beak) are outside the attribute palette or cover little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .brush import INK, RGB, Brush, Points, blob, box, ellipse, mix, ribbon, rounded

GLASS, STEEL, BARK, BEAK, NOSE = (190, 222, 236), (96, 100, 122), (140, 98, 72), (236, 176, 84), (72, 52, 66)
SNOW = (255, 255, 255)


@dataclass(frozen=True)
class Look:
    """What a class function needs: RGB of body, second and a darker body for the far side; names; swing of the legs."""

    body: RGB
    second: RGB
    far: RGB
    pattern: str
    shape: str
    swing: float

    def marks(self, belly: list[Points], bands: list[Points], spots: list[Points]) -> list[tuple[Points, RGB]]:
        """The pattern's shapes in the second colour."""
        return [(s, self.second) for s in {"plain": belly, "banded": bands, "spotted": spots}[self.pattern]]


def _bands(xs: tuple[float, ...], y0: float, y1: float, width: float, bow: float = 0.05) -> list[Points]:
    """Upright bands that bow outwards, as on something round."""
    return [ribbon((x, y0), (x + bow, (y0 + y1) / 2), (x, y1), width=width) for x in xs]


def _hoops(ys: tuple[float, ...], x0: float, x1: float, width: float, sag: float = 0.05) -> list[Points]:
    """Level bands that sag in the middle."""
    return [ribbon((x0, y), ((x0 + x1) / 2, y + sag), (x1, y), width=width) for y in ys]


def _spots(*centres: tuple[float, float], r: float = 0.115) -> list[Points]:
    return [ellipse(x, y, r, r) for x, y in centres]


def _eye(b: Brush, x: float, y: float, r: float = 0.045) -> None:
    b.flat(ellipse(x, y, r, r * 1.2), INK)
    b.flat(ellipse(x + r * 0.3, y - r * 0.45, r * 0.4, r * 0.4), SNOW)


def _leg(x: float, foot: float, top: float, width: float = 0.13) -> Points:
    return ribbon((x, top), (x + foot * 0.4, top * 0.5), (x + foot, -width / 2), width=width)


def _dog(b: Brush, k: Look) -> None:
    s = k.swing
    b.part([_leg(-0.20, -s, -0.30), _leg(0.06, -s, -0.30)], k.far)
    b.part([ribbon((-0.36, -0.48), (-0.47, -0.58), (-0.49, -0.76), width=0.13, end=0.10)], k.second)
    trunk = blob(
        (-0.42, -0.42),
        (-0.33, -0.58),
        (-0.08, -0.57),
        (0.14, -0.63),
        (0.30, -0.56),
        (0.29, -0.34),
        (0.16, -0.22),
        (-0.08, -0.22),
        (-0.32, -0.20),
    )
    b.part(
        [_leg(-0.32, s, -0.30, 0.15), _leg(0.17, s, -0.30, 0.15), trunk],
        k.body,
        k.marks(
            belly=[ellipse(-0.02, -0.19, 0.36, 0.14), ellipse(0.27, -0.36, 0.10, 0.18)],
            bands=_bands((-0.27, 0.0), -0.70, -0.10, 0.15),
            spots=_spots((-0.29, -0.30), (-0.08, -0.52), (0.11, -0.36)),
        ),
    )
    if k.shape == "pointed":
        b.part([rounded((0.20, -0.78), (0.22, -1.06), (0.40, -0.76), cut=0.12)], mix(k.second, INK, 0.18))
    b.part(
        [
            ellipse(0.28, -0.67, 0.20, 0.19),
            blob((0.30, -0.70), (0.48, -0.68), (0.57, -0.61), (0.50, -0.51), (0.30, -0.50)),
        ],
        k.body,
    )
    b.flat(ellipse(0.55, -0.63, 0.05, 0.042), NOSE)
    b.stroke(ribbon((0.42, -0.545), (0.47, -0.535), (0.52, -0.56), width=0.012), NOSE, 0.7)
    _eye(b, 0.36, -0.72)
    if k.shape == "pointed":
        b.part([rounded((0.06, -0.66), (-0.01, -1.05), (0.24, -0.80), cut=0.12)], k.second)
    else:
        b.part(
            [blob((0.20, -0.82), (0.25, -0.70), (0.21, -0.50), (0.11, -0.43), (0.02, -0.52), (0.06, -0.72))], k.second
        )


def _cat(b: Brush, k: Look) -> None:
    if k.shape == "curly":
        tail = ribbon(
            (0.18, -0.10), (0.40, -0.10), (0.51, -0.27), (0.43, -0.44), (0.30, -0.38), (0.35, -0.27), width=0.11
        )
        tip = ellipse(0.33, -0.31, 0.10, 0.14)
    else:
        tail = ribbon((0.16, -0.10), (0.34, -0.14), (0.41, -0.40), (0.42, -0.86), width=0.11)
        tip = ellipse(0.42, -0.84, 0.14, 0.15)
    b.part([tail], k.body, [(tip, k.second)])
    trunk = blob(
        (0.0, -0.56),
        (0.18, -0.48),
        (0.27, -0.24),
        (0.25, -0.04),
        (0.0, 0.0),
        (-0.25, -0.04),
        (-0.27, -0.24),
        (-0.18, -0.48),
    )
    b.part(
        [trunk],
        k.body,
        k.marks(
            belly=[ellipse(0.0, -0.20, 0.14, 0.26)],
            bands=_hoops((-0.32, -0.06), -0.32, 0.32, 0.14),
            spots=_spots((-0.15, -0.33), (0.15, -0.30), (-0.04, -0.12)),
        ),
    )
    step = k.swing * 0.6
    b.part([ellipse(-0.10 + min(step, 0), -0.045 - max(step, 0), 0.09, 0.055)], k.second)
    b.part([ellipse(0.10, -0.045, 0.09, 0.055)], k.second)
    for side in (-1, 1):
        b.part([rounded((side * 0.27, -0.68), (side * 0.27, -1.04), (side * 0.05, -0.82), cut=0.12)], k.body)
        b.flat(rounded((side * 0.22, -0.76), (side * 0.235, -0.94), (side * 0.10, -0.82), cut=0.12), k.second)
    b.part(
        [
            blob(
                (0.0, -0.89),
                (0.20, -0.84),
                (0.295, -0.66),
                (0.18, -0.51),
                (0.0, -0.47),
                (-0.18, -0.51),
                (-0.295, -0.66),
                (-0.20, -0.84),
            )
        ],
        k.body,
    )
    b.flat(ellipse(0.03, -0.575, 0.11, 0.07), mix(k.body, SNOW, 0.72))
    _eye(b, -0.10, -0.69, 0.047)
    _eye(b, 0.15, -0.69, 0.047)
    b.flat(rounded((-0.015, -0.615), (0.075, -0.615), (0.03, -0.57)), NOSE)
    for y, dy in ((-0.60, -0.02), (-0.56, 0.02)):
        b.stroke(np.array([(-0.14, y), (-0.28, y + dy)]), INK, 0.5)
        b.stroke(np.array([(0.20, y), (0.34, y + dy)]), INK, 0.5)


def _bird(b: Brush, k: Look) -> None:
    if k.shape == "long":
        b.part([ribbon((-0.24, -0.40), (-0.42, -0.31), (-0.60, -0.13), width=0.16, end=0.13)], k.second)
    else:
        for turn in (50, 22, -6):
            c, s = np.cos(np.radians(180 - turn)), -np.sin(np.radians(180 - turn))
            b.part(
                [
                    ribbon(
                        (-0.18, -0.46),
                        (-0.18 + 0.2 * c, -0.46 + 0.2 * s),
                        (-0.18 + 0.36 * c, -0.46 + 0.36 * s),
                        width=0.10,
                        end=0.19,
                    )
                ],
                k.second,
            )
    for x, reach in ((-0.02, k.swing), (0.13, -k.swing)):
        b.part(
            [ribbon((x, -0.24), (x + reach * 0.5, -0.10), (x + reach, -0.03), (x + reach + 0.07, -0.025), width=0.045)],
            BEAK,
        )
    b.part([rounded((0.34, -0.82), (0.62, -0.70), (0.34, -0.63), cut=0.14)], BEAK)
    trunk = blob(
        (0.18, -0.95),
        (0.36, -0.86),
        (0.38, -0.66),
        (0.35, -0.40),
        (0.20, -0.20),
        (-0.06, -0.16),
        (-0.28, -0.28),
        (-0.34, -0.46),
        (-0.20, -0.58),
        (-0.04, -0.68),
        (0.02, -0.86),
    )
    b.part(
        [trunk],
        k.body,
        k.marks(
            belly=[ellipse(0.24, -0.30, 0.22, 0.28, 20)],
            bands=_hoops((-0.47, -0.20), -0.50, 0.55, 0.15, 0.04),
            spots=_spots((0.23, -0.50), (0.15, -0.25), (-0.20, -0.28)),
        ),
    )
    b.part(
        [blob((-0.03, -0.56), (0.12, -0.46), (0.06, -0.33), (-0.14, -0.28), (-0.40, -0.34), (-0.22, -0.50))],
        mix(k.body, INK, 0.16),
        k.marks(belly=[], bands=_bands((-0.12,), -0.60, -0.20, 0.14), spots=_spots((-0.11, -0.42))),
    )
    _eye(b, 0.26, -0.78, 0.05)


def _fish(b: Brush, k: Look) -> None:
    flick = k.swing * 0.6
    if k.shape == "forked":
        tail = rounded((-0.24, -0.42), (-0.56, -0.76 + flick), (-0.42, -0.42), (-0.56, -0.08 + flick), cut=0.10)
    else:
        tail = blob(
            (-0.22, -0.42),
            (-0.36, -0.56),
            (-0.50, -0.56 + flick),
            (-0.56, -0.42 + flick),
            (-0.50, -0.28 + flick),
            (-0.36, -0.28),
        )
    b.part([tail], k.second)
    b.part([blob((-0.20, -0.58), (-0.16, -0.78), (0.08, -0.76), (0.18, -0.60))], k.second)
    b.part([blob((-0.04, -0.20), (-0.14, -0.06), (0.03, -0.07), (0.12, -0.20))], k.second)
    trunk = blob(
        (-0.33, -0.42),
        (-0.16, -0.62),
        (0.12, -0.70),
        (0.36, -0.60),
        (0.47, -0.42),
        (0.36, -0.24),
        (0.12, -0.14),
        (-0.16, -0.22),
    )
    b.part(
        [trunk],
        k.body,
        k.marks(
            belly=[ellipse(0.08, -0.15, 0.42, 0.15)],
            bands=_bands((-0.13, 0.15), -0.80, -0.04, 0.15),
            spots=_spots((-0.14, -0.42), (0.08, -0.58), (0.12, -0.30)),
        ),
    )
    b.part([blob((0.06, -0.44), (0.12, -0.36), (-0.02, -0.26), (-0.08, -0.34))], mix(k.body, INK, 0.16))
    b.flat(ellipse(0.32, -0.48, 0.075, 0.08), SNOW)
    _eye(b, 0.335, -0.475, 0.042)
    b.stroke(ribbon((0.36, -0.33), (0.40, -0.33), (0.43, -0.36), width=0.012), INK, 0.6)


def _car(b: Brush, k: Look) -> None:
    if k.shape == "round":
        cabin = blob((-0.36, -0.34), (-0.30, -0.54), (-0.06, -0.65), (0.17, -0.54), (0.28, -0.34))
        panes = [
            blob((-0.27, -0.37), (-0.23, -0.51), (-0.10, -0.57), (-0.09, -0.37)),
            blob((-0.02, -0.37), (-0.02, -0.57), (0.10, -0.51), (0.18, -0.37)),
        ]
    else:
        cabin = rounded((-0.46, -0.30), (-0.46, -0.66), (0.12, -0.66), (0.26, -0.30), cut=0.08)
        panes = [
            box(-0.39, -0.57, -0.18, -0.38),
            rounded((-0.10, -0.57), (0.08, -0.57), (0.15, -0.38), (-0.10, -0.38), cut=0.12),
        ]
    hull = rounded((-0.50, -0.40), (0.30, -0.40), (0.52, -0.32), (0.52, -0.10), (-0.50, -0.10), cut=0.14)
    b.part(
        [cabin, hull],
        k.body,
        k.marks(
            belly=[box(-0.7, -0.21, 0.7, 0.0, 0.01)],
            bands=_bands((-0.42, 0.0, 0.42), -0.36, -0.02, 0.14, 0.0),
            spots=_spots((-0.40, -0.28), (-0.02, -0.27), (0.36, -0.26), r=0.1),
        ),
    )
    for pane in panes:
        b.flat(pane, GLASS)
        b.flat(pane * (0.5, 0.9) + (pane.mean(0) * (0.35, 0.1)), mix(GLASS, SNOW, 0.5))
    b.flat(ellipse(0.48, -0.28, 0.035, 0.05), (255, 246, 206))
    for x in (-0.27, 0.29):
        b.part([ellipse(x, -0.115, 0.125, 0.125)], (70, 68, 88))
        b.part([ellipse(x, -0.115, 0.065, 0.065)], k.second, line=False)


def _cup(b: Brush, k: Look) -> None:
    if k.shape == "round":
        grip = ribbon((0.20, -0.58), (0.42, -0.60), (0.50, -0.40), (0.40, -0.22), (0.18, -0.20), width=0.10)
    else:
        grip = np.concatenate(
            [
                box(0.15, -0.64, 0.53, -0.16, 0.06),
                box(0.15, -0.64, 0.53, -0.16, 0.06)[:1],
                box(0.25, -0.53, 0.42, -0.27, 0.06)[::-1],
                box(0.25, -0.53, 0.42, -0.27, 0.06)[-1:],
            ]
        )
    b.part([grip], k.second)
    wall = rounded((-0.38, -0.74), (0.28, -0.74), (0.23, 0.0), (-0.33, 0.0), cut=0.10)
    b.part(
        [wall],
        k.body,
        k.marks(
            belly=[box(-0.6, -0.13, 0.6, 0.1, 0.01)],
            bands=_bands((-0.20, 0.10), -0.80, 0.05, 0.17, 0.0),
            spots=_spots((-0.22, -0.50), (0.11, -0.44), (-0.12, -0.18)),
        ),
    )
    b.part([ellipse(-0.05, -0.74, 0.335, 0.10)], k.second)
    b.flat(ellipse(-0.05, -0.735, 0.255, 0.062), (104, 70, 58))
    b.flat(ellipse(-0.11, -0.745, 0.10, 0.022), (150, 108, 86))


def _robot(b: Brush, k: Look) -> None:
    s = k.swing
    b.part([_leg(-0.15, s * 0.6, -0.30, 0.15), _leg(0.15, -s * 0.6, -0.30, 0.15)], STEEL)
    b.part([ribbon((-0.28, -0.48), (-0.42, -0.38 - s), (-0.43, -0.22 - 2 * s), width=0.12)], k.second)
    b.part([ribbon((0.28, -0.48), (0.42, -0.38 + s), (0.43, -0.22 + 2 * s), width=0.12)], k.second)
    b.part([box(-0.10, -0.64, 0.10, -0.50)], STEEL)
    b.part(
        [box(-0.31, -0.56, 0.31, -0.14, 0.14)],
        k.body,
        k.marks(
            belly=[box(-0.19, -0.46, 0.19, -0.23, 0.1)],
            bands=_hoops((-0.42, -0.18), -0.4, 0.4, 0.13, 0.0),
            spots=_spots((-0.17, -0.42), (0.17, -0.38), (-0.02, -0.2), r=0.1),
        ),
    )
    if k.shape == "round":
        head, face = ellipse(0.0, -0.78, 0.26, 0.20), ellipse(0.02, -0.78, 0.19, 0.115)
    else:
        head, face = box(-0.29, -0.97, 0.29, -0.60, 0.06), box(-0.19, -0.89, 0.23, -0.68, 0.12)
    b.part([box(-0.36, -0.85, 0.36, -0.71, 0.12)], k.second)
    b.part([head], k.body)
    b.flat(face, (52, 50, 74))
    for x in (-0.07, 0.11):
        b.flat(ellipse(x, -0.785, 0.045, 0.055), (150, 240, 244))
        b.flat(ellipse(x + 0.012, -0.805, 0.016, 0.018), SNOW)


def _tree(b: Brush, k: Look) -> None:
    b.part([box(-0.075, -0.46, 0.075, -0.14, 0.05)], BARK)
    b.part([rounded((-0.22, -0.20), (0.22, -0.20), (0.16, 0.0), (-0.16, 0.0), cut=0.08)], k.second)
    if k.shape == "round":
        crown = [
            ellipse(-0.20, -0.57, 0.20, 0.18),
            ellipse(0.20, -0.57, 0.20, 0.18),
            ellipse(0.0, -0.74, 0.26, 0.24),
            ellipse(0.0, -0.53, 0.22, 0.17),
        ]
    else:
        crown = [
            rounded((-0.42, -0.34), (0.0, -0.84), (0.42, -0.34), cut=0.10),
            rounded((-0.33, -0.58), (0.0, -1.06), (0.33, -0.58), cut=0.10),
        ]
    b.part(
        crown,
        k.body,
        k.marks(
            belly=[ellipse(0.0, -0.32, 0.50, 0.16)],
            bands=_hoops((-0.76, -0.50), -0.5, 0.5, 0.14, 0.05),
            spots=_spots((-0.02, -0.80), (0.19, -0.54), (-0.18, -0.52)),
        ),
    )


FIGURES: dict[str, Callable[[Brush, Look], None]] = {
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "fish": _fish,
    "car": _car,
    "cup": _cup,
    "robot": _robot,
    "tree": _tree,
}
