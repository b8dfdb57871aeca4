"""Identities of sprites: a class and five attributes with closed tables of values, and the words that name them.

Measurements, captions and the drawing code all use these tables, so a new colour or pattern starts here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

# Chosen far apart in Lab (every pair ≥ 40), so that a small autoencoder keeps them apart after its round trip.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 48),
    "orange": (250, 140, 34),
    "yellow": (253, 216, 58),
    "green": (62, 170, 78),
    "blue": (40, 124, 232),
    "purple": (150, 64, 190),
    "pink": (252, 142, 190),
    "white": (247, 245, 240),
}
PATTERNS: tuple[str, ...] = ("plain", "banded", "spotted")
ACCESSORIES: tuple[str, ...] = ("none", "hat", "crown", "scarf")
# The part of each class that varies: its name and its values, as adjectives, so that captions say "floppy ears".
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dog": ("ears", ("floppy", "pointed")),
    "cat": ("tail", ("curly", "straight")),
    "bird": ("tail", ("long", "fanned")),
    "fish": ("tail", ("forked", "round")),
    "car": ("roof", ("round", "flat")),
    "cup": ("handle", ("round", "square")),
    "robot": ("head", ("round", "square")),
    "tree": ("top", ("round", "pointed")),
}
NOUNS: tuple[str, ...] = tuple(SHAPES)
PLURALS: dict[str, str] = {noun: noun if noun == "fish" else noun + "s" for noun in NOUNS}
FIELDS = ("noun", "body", "second", "pattern", "accessory", "shape")
ATTRIBUTES: tuple[str, ...] = ("body", "second", "pattern", "accessory", "shape")


@dataclass(frozen=True)
class Identity:
    """A subject: its class and five attributes. Raises ValueError, naming the field, for a value not in the tables."""

    noun: str
    body: str
    second: str
    pattern: str
    accessory: str
    shape: str

    def __post_init__(self) -> None:
        if self.noun not in SHAPES:
            raise ValueError(f"Identity.noun: {self.noun!r} is not one of {', '.join(NOUNS)}")
        for name, allowed in attribute_values(self.noun).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Identity.{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.second == self.body:
            raise ValueError(f"Identity.second: must differ from body, both are {self.body!r}")

    def differs(self, other: Identity) -> tuple[str, ...]:
        """Names of the fields in which two identities differ, in field order; "noun" comes first if the classes differ.

        Values of `shape` are compared as they stand, also across classes.
        """
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))


def attribute_values(noun: str) -> dict[str, tuple[str, ...]]:
    """Every value that each of the five attributes may take for a class."""
    colours = tuple(COLOURS)
    return {"body": colours, "second": colours, "pattern": PATTERNS, "accessory": ACCESSORIES, "shape": SHAPES[noun][1]}


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def sample_identity(rng: np.random.Generator, noun: str | None = None) -> Identity:
    """Draw a subject, uniformly over the tables; `noun` fixes the class."""
    noun = _pick(rng, NOUNS) if noun is None else noun
    body = _pick(rng, tuple(COLOURS))
    second = _pick(rng, [c for c in COLOURS if c != body])
    return Identity(noun, body, second, _pick(rng, PATTERNS), _pick(rng, ACCESSORIES), _pick(rng, SHAPES[noun][1]))


def vary(identity: Identity, rng: np.random.Generator, n: int) -> Identity:
    """A subject of the same class that differs in exactly `n` attributes (1 to 5). Raises ValueError for another n."""
    if not 1 <= n <= len(ATTRIBUTES):
        raise ValueError(f"vary: n must be from 1 to {len(ATTRIBUTES)}, got {n}")
    changed = [ATTRIBUTES[i] for i in sorted(rng.choice(len(ATTRIBUTES), size=n, replace=False))]
    values = attribute_values(identity.noun)
    new = {name: getattr(identity, name) for name in ATTRIBUTES}
    for name in changed:
        banned = {getattr(identity, name)}
        if name == "body" and "second" not in changed:
            banned.add(identity.second)
        if name == "second":
            banned.add(new["body"])  # `body` was settled before: ATTRIBUTES lists it first
        new[name] = _pick(rng, [v for v in values[name] if v not in banned])
    return replace(identity, **new)


def near_twin(identity: Identity, rng: np.random.Generator, n: int = 1) -> Identity:
    """A look-alike: same class, exactly `n` attributes changed (1 or 2). Raises ValueError for another n."""
    if n not in (1, 2):
        raise ValueError(f"near_twin: n must be 1 or 2, got {n}")
    return vary(identity, rng, n)


def far_apart(identity: Identity, rng: np.random.Generator, n: int = 4) -> Identity:
    """Same class, exactly `n` attributes changed (4 or 5). Raises ValueError for another n."""
    if n not in (4, 5):
        raise ValueError(f"far_apart: n must be 4 or 5, got {n}")
    return vary(identity, rng, n)


def article(word: str) -> str:
    """The indefinite article, by the first letter, which is right for all words of this world."""
    return "an" if word[0] in "aeiou" else "a"


def extras(identity: Identity, names: tuple[str, ...]) -> list[str]:
    """The noun phrases that follow "with", for those of the attributes second, pattern, shape and accessory named.

    `second` and `pattern` share a phrase, which names the second colour and what it colours; `pattern` alone leaves
    the colour out.
    """
    out = []
    if "second" in names or "pattern" in names:
        what = {"plain": "trim", "banded": "bands", "spotted": "spots"}[identity.pattern]
        if "second" in names:
            out.append(f"{identity.second} {what}")
        elif identity.pattern != "plain":
            out.append(what)
    if "shape" in names:
        part = SHAPES[identity.noun][0]
        out.append(
            f"{identity.shape} {part}" if part == "ears" else f"{article(identity.shape)} {identity.shape} {part}"
        )
    if "accessory" in names:
        out.append("no extras" if identity.accessory == "none" else f"a {identity.accessory}")
    return out


def describe(identity: Identity, names: tuple[str, ...] = ATTRIBUTES) -> str:
    """ "a red dog with blue bands and floppy ears and a hat"; by default every attribute is named.

    names: the attributes to mention; () gives "a dog". No comma is ever used: words and spaces only.
    """
    head = f"{identity.body} {identity.noun}" if "body" in names else identity.noun
    tail = extras(identity, names)
    return f"{article(head)} {head}" + (" with " + " and ".join(tail) if tail else "")


def identity_codes(identity: Identity) -> list[int]:
    """The six fields as indices into the world's tables; the shape's is within its class."""
    tables = (NOUNS, list(COLOURS), list(COLOURS), PATTERNS, ACCESSORIES, SHAPES[identity.noun][1])
    return [table.index(getattr(identity, name)) for name, table in zip(FIELDS, tables)]


def identity_from_codes(codes: list[int]) -> Identity:
    """The inverse of :func:`identity_codes`."""
    noun, colours = NOUNS[codes[0]], list(COLOURS)
    _, body, second, pattern, accessory, shape = codes
    return Identity(
        noun, colours[body], colours[second], PATTERNS[pattern], ACCESSORIES[accessory], SHAPES[noun][1][shape]
    )
