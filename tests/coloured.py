"""Synthetic subjects of one colour each, which tell in a composite what was pasted where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from far_train.data.captions import Name
from far_train.data.concepts import Background, ClassPicture, Composite, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig

SIZE = 64
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.1, 0.1, 0.9), "pink": (0.95, 0.2, 0.9)}
COLOURS |= {"cyan": (0.1, 0.9, 0.9), "yellow": (0.95, 0.9, 0.05)}
NO_CHANGES = {"rotation": 0, "brightness": 0, "erode": 0, "feather": 0}


def photo(
    colour: str, height: int, width: int, box: tuple[float, float, float, float] = (0.3, 0.25, 0.7, 0.8)
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ellipse of one colour in ``box`` (left, top, right, bottom as shares) on grey noise, with its mask."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    left, top, right, bottom = box
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
    noise = 0.5 + 0.08 * np.random.default_rng(height * width).standard_normal((height, width, 1))
    pixels = np.where(inside[..., None], COLOURS[colour], noise.clip(0, 1))
    return torch.from_numpy(pixels).float(), torch.from_numpy(inside).float()


def concept(colour: str, noun: str = "ball") -> Concept:
    photos = [photo(colour, 60, 60), photo(colour, 48, 80, (0.5, 0.1, 0.95, 0.7)), photo(colour, 90, 50)]
    return Concept(f"<{colour}>", noun, tuple(i for i, _ in photos), tuple(m for _, m in photos))


CONCEPTS = [concept(c) for c in ("red", "green", "blue", "pink", "yellow")]
PRIORS = [ClassPicture("ball", *photo("cyan", 70, 70)), ClassPicture("ball", *photo("cyan", 60, 90))]
SCENES = [
    Background(torch.tensor(COLOURS["cyan"]).expand(40, 60, 3), "in a garden"),
    Background(torch.zeros(50, 40, 3)),
]


def fuse(count: int = 2, priors: Sequence[ClassPicture] = PRIORS, backgrounds: Sequence[Background] = (), **settings):
    return ConceptFusion(CONCEPTS[:count], priors, backgrounds, FusionConfig(**{"size": SIZE, **settings}))


def only(layout: str, background: str = "infilled", **settings) -> dict:
    return {"layout_weights": {layout: 1.0}, "background_weights": {background: 1.0}, **settings}


def shows(image: torch.Tensor, colour: str) -> np.ndarray:
    """Pixels [S, S] of this colour; the subjects' colours are far apart, and from all greys."""
    return (image - torch.tensor(COLOURS[colour])).abs().amax(-1).numpy() < 0.25


def region(mention) -> np.ndarray:
    return mention.mask.numpy() > 0.5


def centre(pixels: np.ndarray) -> tuple[float, float]:
    """x and y of the middle of these pixels, as shares of the canvas."""
    y, x = ndimage.center_of_mass(pixels)
    return (x + 0.5) / pixels.shape[1], (y + 0.5) / pixels.shape[0]


def colour_of(name: Name) -> str:
    return name.token.strip("<>") if name.token else "cyan"


def equal(a: Composite, b: Composite) -> bool:
    return (
        torch.equal(a.image, b.image)
        and (a.caption, a.layout) == (b.caption, b.layout)
        and [(m.name, m.spans) for m in a.mentions] == [(m.name, m.spans) for m in b.mentions]
        and all(torch.equal(m.mask, n.mask) for m, n in zip(a.mentions, b.mentions))
    )


def mention_box(mention) -> tuple[int, int]:
    """Width and height of a mention's region in pixels."""
    (rows, columns) = ndimage.find_objects(region(mention).astype(int))[0]
    return columns.stop - columns.start, rows.stop - rows.start
