"""The small world: procedurally drawn pictures of sprites in places, with exact masks, captions and attributes.

`render_scene(seed, index)` is a pure function: the same numbers give the same picture, masks and caption in any order
and process, and the same scene at any size. `identity` defines what distinguishes sprites, `sprites` draws them and
`scenery` draws the places; this module lays out scenes, composes them and writes their captions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
import torch

from .identity import (
    ACCESSORIES,
    ATTRIBUTES,
    COLOURS,
    NOUNS,
    PATTERNS,
    PLURALS,
    SHAPES,
    Identity,
    attribute_values,
    describe,
    far_apart,
    near_twin,
    sample_identity,
    vary,
)
from .scenery import BACKGROUNDS, PLACES, draw_background
from .sprites import ANCHOR, POSES, draw_sprite

__all__ = [
    "ACCESSORIES",
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLOURS",
    "NOUNS",
    "PATTERNS",
    "PLACES",
    "PLURALS",
    "POSES",
    "SHAPES",
    "Identity",
    "Scene",
    "Sprite",
    "attribute_values",
    "caption_for",
    "describe",
    "draw_background",
    "draw_sprite",
    "empty_scene",
    "far_apart",
    "near_twin",
    "reference_photos",
    "render_scene",
    "sample_identity",
    "vary",
    "world_words",
]

MOST_SPRITES = 3
# Probabilities of zero to three subjects in a random scene.
COUNT_SHARES = (0.04, 0.36, 0.46, 0.14)

# How far a sprite reaches from its ground point in any pose, in its own size (measured on renders of every shape, pose
# and accessory): to each side, up with headgear, up without, and down.
REACH: dict[str, tuple[float, float, float, float]] = {
    "dog": (0.66, 1.28, 1.18, 0.06),
    "cat": (0.63, 1.28, 1.15, 0.06),
    "bird": (0.75, 1.36, 1.10, 0.06),
    "fish": (0.63, 1.10, 0.89, 0.12),
    "car": (0.60, 1.01, 0.78, 0.09),
    "cup": (0.62, 1.11, 0.96, 0.05),
    "robot": (0.62, 1.36, 1.12, 0.05),
    "tree": (0.48, 1.36, 1.11, 0.05),
}
# Nominal longest side, as a fraction of the canvas, by the number of sprites in the picture.
SIZES: dict[int, tuple[float, float]] = {1: (0.58, 0.68), 2: (0.50, 0.56), 3: (0.36, 0.42)}
GROUND = (0.74, 0.95)  # where sprites stand, from the back to the front
SIDES = ("on the left", "in the middle", "on the right")
COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Sprite:
    """One subject in a scene. x, y: its ground point, size: nominal longest side, all as fractions of the canvas;
    rotation in degrees, counter-clockwise; box: (left, top, right, bottom) that certainly contains it, in fractions."""

    identity: Identity
    x: float
    y: float
    size: float
    pose: str = "standing"
    flip: bool = False
    rotation: float = 0.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        side, up_hat, up, down = REACH[self.identity.noun]
        top = up_hat if self.identity.accessory in ("hat", "crown") else up
        return (
            self.x - side * self.size,
            self.y - top * self.size,
            self.x + side * self.size,
            self.y + down * self.size,
        )


@dataclass(frozen=True)
class Scene:
    """image [H, W, 3] float32 0..1; masks: one [H, W] float32 0..1 per sprite, the visible part, antialiased (they sum
    to ≤ 1 everywhere); sprites in order from left to right, masks likewise."""

    image: torch.Tensor
    masks: list[torch.Tensor]
    sprites: tuple[Sprite, ...]
    background: str
    caption: str


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _overlap(a: Sprite, b: Sprite) -> float:
    """Common area of two boxes as a share of the smaller one."""
    p, q = a.box, b.box
    w, h = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
    smaller = min((s[2] - s[0]) * (s[3] - s[1]) for s in (p, q))
    return max(w, 0.0) * max(h, 0.0) / smaller


def _pose(identity: Identity, rng: np.random.Generator, sizes: tuple[float, float]) -> Sprite:
    """A sprite in a random pose, not placed yet."""
    return Sprite(
        identity,
        0.5,
        0.8,
        float(rng.uniform(*sizes)),
        _pick(rng, list(POSES)),
        bool(rng.random() < 0.5),
        float(rng.uniform(-3, 3)),
    )


def _place(posed: Sequence[Sprite], rng: np.random.Generator) -> tuple[Sprite, ...]:
    """Put sprites on the ground, left to right in the given order, hardly overlapping; shrinks them if need be."""
    n, scale = len(posed), 1.0
    while True:
        for _ in range(30):
            placed = []
            for i, s in enumerate(posed):
                size = s.size * scale
                x = (i + 0.5) / n + rng.uniform(-0.5, 0.5) * (0.7 if n == 1 else 0.55) / n
                y = rng.uniform(*GROUND)
                size *= 0.9 + 0.1 * (y - GROUND[0]) / (GROUND[1] - GROUND[0])  # a little smaller at the back
                side, down = REACH[s.identity.noun][0] * size, REACH[s.identity.noun][3] * size
                x, y = np.clip(x, side + 0.01, 0.99 - side), min(y, 0.99 - down)
                placed.append(replace(s, x=float(x), y=float(y), size=float(size)))
            # Boxes are larger than the sprites, which hide far less of each other than this.
            clear = all(_overlap(a, b) <= 0.28 for a, b in combinations(placed, 2))
            # Keep the ground points apart, so that left and right are well defined.
            apart = all(b.x - a.x > 0.18 for a, b in pairwise(placed))
            if clear and apart and all(s.box[1] > 0 for s in placed):
                return tuple(placed)
        scale *= 0.96


def _shadow(canvas: np.ndarray, sprite: Sprite) -> None:
    """Darken the ground softly under a sprite, in place. The shadow belongs to the background, not to the mask."""
    size = len(canvas)
    rx, ry = 0.50 * sprite.size * size * (1.0 if sprite.identity.noun != "cup" else 0.85), 0.085 * sprite.size * size
    cx, cy = sprite.x * size - 0.5, sprite.y * size - 0.5
    x0, x1 = max(int(cx - rx), 0), min(int(cx + rx) + 2, size)
    y0, y1 = max(int(cy - ry), 0), min(int(cy + ry) + 2, size)
    yy, xx = np.mgrid[y0:y1, x0:x1]
    fall = np.clip(1 - ((xx - cx) / rx) ** 2 - ((yy - cy) / ry) ** 2, 0, 1)
    depth = 0.42 if POSES[sprite.pose].lift == 0 and sprite.identity.noun != "fish" else 0.28
    canvas[y0:y1, x0:x1] *= (1 - depth * fall[..., None] * np.array([1.0, 0.96, 0.86])).astype(np.float32)


def _compose(back: np.ndarray, sprites: Sequence[Sprite]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Paint sprites on a background [H, W, 3] uint8, the farthest (highest ground point) first."""
    size = len(back)
    canvas = back.astype(np.float32) / 255
    masks: list[np.ndarray] = [np.zeros((size, size), np.float32) for _ in sprites]
    for s in sprites:
        _shadow(canvas, s)
    painted: list[int] = []
    for i in sorted(range(len(sprites)), key=lambda i: sprites[i].y):
        s, px = sprites[i], sprites[i].size * size
        corner = np.array([s.x * size, s.y * size]) - np.array(ANCHOR) * px
        whole = np.floor(corner).astype(int)
        tile = draw_sprite(s.identity, s.pose, px, s.flip, s.rotation, tuple(corner - whole))
        (left, top), side = whole, len(tile)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
        part = tile[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32) / 255
        window, alpha = (slice(y0, y1), slice(x0, x1)), part[..., 3]
        canvas[window] += (part[..., :3] - canvas[window]) * alpha[..., None]
        for j in painted:
            masks[j][window] *= 1 - alpha
        masks[i][window] = alpha
        painted.append(i)
    return torch.from_numpy(canvas.clip(0, 1)), [torch.from_numpy(m) for m in masks]


def _mention(identity: Identity, rng: np.random.Generator) -> str:
    """A phrase for a subject: its noun, with its colour, or with some or all of its attributes."""
    level = rng.random()
    chances = rng.random(len(ATTRIBUTES))
    if level < 0.15:
        return describe(identity, ())
    if level < 0.35:
        return describe(identity, ("body",))
    if level < 0.55:
        return describe(identity)
    return describe(
        identity, tuple(name for name, c in zip(ATTRIBUTES, chances) if c < (0.9 if name == "body" else 0.5))
    )


def caption_for(identities: Sequence[Identity], background: str, rng: np.random.Generator) -> str:
    """Write a caption of a scene.

    identities: from left to right (0 to 3); background: a key of PLACES; rng: decides how much is mentioned. Attributes
    are named sometimes, sides of two or three subjects sometimes (otherwise the order means nothing), and the place
    mostly. Lower case, words and single spaces only.
    """
    if not identities:
        return PLACES[background][1]
    place, sides, merge = rng.random() < 0.85, rng.random() < 0.35, rng.random() < 0.25
    lead = "a picture of " if rng.random() < 0.15 else ""
    n, nouns = len(identities), {i.noun for i in identities}
    if n > 1 and merge and len(nouns) == 1:
        body = f"{COUNTS[n]} {PLURALS[identities[0].noun]}"
    else:
        words = [_mention(i, rng) for i in identities]
        if n > 1 and sides:
            words = [f"{w} {SIDES[i if n == 3 else 2 * i]}" for i, w in enumerate(words)]
        body = " and ".join(words[i] for i in rng.permutation(n))
    return lead + body + (f" {PLACES[background][0]}" if place else "")


def world_words() -> list[str]:
    """All words that captions and descriptions can contain, sorted: the closed vocabulary of a tokenizer."""
    phrases = [
        *COLOURS,
        *NOUNS,
        *PLURALS.values(),
        *ACCESSORIES[1:],
        *SIDES,
        *COUNTS.values(),
        "a an and with the no extras",
        "trim bands spots",
        "a picture of",
    ]
    phrases += [f"{part} {' '.join(values)}" for part, values in SHAPES.values()]
    for pair in PLACES.values():
        phrases += pair
    return sorted(set(" ".join(phrases).split()))


def _cast(rng: np.random.Generator, n: int, nouns: Sequence[str], held_out: Collection[Identity]) -> list[Identity]:
    """n subjects; later ones are often of the first one's class, and sometimes near twins of it."""
    cast: list[Identity] = []
    while len(cast) < n:
        kin = rng.random()
        if cast and kin < 0.2:
            new = near_twin(cast[0], rng, 1 + int(rng.integers(2)))
        else:
            new = sample_identity(rng, cast[0].noun if cast and kin < 0.5 else _pick(rng, nouns))
        if new not in held_out:
            cast.append(new)
    return cast


def render_scene(
    seed: int,
    index: int,
    size: int = 128,
    sprites: int | None = None,
    background: str | None = None,
    identities: Sequence[Identity] | None = None,
    held_out: Collection[Identity] = frozenset(),
    nouns: Sequence[str] = NOUNS,
    equal_room: bool = False,
) -> Scene:
    """Render scene number `index` of the endless series `seed`; deterministic, whatever was rendered before.

    size: pixels, 64 to 512, the same scene at any; sprites: how many, 0 to 3 (default: random, 0 rarely); background:
    a key of PLACES (default: random); identities: the subjects from left to right, instead of random ones; held_out:
    identities that must not appear at random; nouns: classes to draw from; equal_room: place all as if each wore a hat.
    Otherwise a subject with a hat mostly stands at the back, where there is room for it.
    Raises ValueError, naming the argument, for values out of range.
    """
    if not 64 <= size <= 512:
        raise ValueError(f"render_scene: size must be from 64 to 512, got {size}")
    if identities is not None and sprites not in (None, len(identities)):
        raise ValueError(f"render_scene: sprites is {sprites} but {len(identities)} identities were given")
    if background is not None and background not in PLACES:
        raise ValueError(f"render_scene: background {background!r} is not one of {', '.join(BACKGROUNDS)}")
    rng = np.random.default_rng([seed, index])
    drawn_count, drawn_place = int(rng.choice(4, p=COUNT_SHARES)), _pick(rng, BACKGROUNDS)
    count = len(identities) if identities is not None else drawn_count if sprites is None else sprites
    if not 0 <= count <= 3:
        raise ValueError(f"render_scene: sprites must be from 0 to 3, got {count}")
    place = drawn_place if background is None else background
    # Separate streams, so that fixing the subjects doesn't change the place and its light.
    cast_rng, layout_rng, words_rng, place_rng = (np.random.default_rng([seed, index, k]) for k in range(1, 5))
    cast = list(identities) if identities is not None else _cast(cast_rng, count, nouns, held_out)
    posed = [_pose(i, layout_rng, SIZES[count]) for i in cast]
    room = [replace(s, identity=replace(s.identity, accessory="hat")) for s in posed] if equal_room else posed
    placed = tuple(replace(s, identity=i) for s, i in zip(_place(room, layout_rng), cast)) if cast else ()
    image, masks = _compose(draw_background(place, int(place_rng.integers(2**31)), size), placed)
    return Scene(image, masks, placed, place, caption_for([s.identity for s in placed], place, words_rng))


def reference_photos(
    identity: Identity, seed: int, count: int = 5, size: int = 128, backgrounds: Sequence[str] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Photos of one subject like those a user would have: varied poses, always in the same one or two places.

    backgrounds: keys of PLACES (default: two, chosen by the seed). Returns `count` pairs (image [size, size, 3],
    mask [size, size]), float32 0..1.
    """
    rng = np.random.default_rng([seed, 0xF0705])
    if backgrounds is None:
        backgrounds = [BACKGROUNDS[i] for i in rng.choice(len(BACKGROUNDS), size=2, replace=False)]
    photos = []
    for k in range(count):
        # Cycle through the poses, so that a few photos show several.
        posed = _pose(identity, rng, SIZES[1])
        posed = replace(posed, pose=list(POSES)[k % len(POSES)])
        back = draw_background(backgrounds[k % len(backgrounds)], int(rng.integers(2**31)), size)
        image, masks = _compose(back, _place([posed], rng))
        photos.append((image, masks[0]))
    return photos


def empty_scene(name: str, seed: int, size: int = 128) -> torch.Tensor:
    """A place with no subject: image [size, size, 3] float32 0..1. Raises ValueError for an unknown place."""
    return torch.from_numpy(draw_background(name, seed, size).astype(np.float32) / 255)
