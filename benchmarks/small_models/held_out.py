"""Identities that the small base model never sees: only they tell whether a subject was learned or remembered.

One identity in ten, the same in every process: enough that near twins of one class are found among them, and so few
that every value of every attribute is still seen in training with every class.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np

from far_train.mini.identity import ACCESSORIES, COLOURS, NOUNS, PATTERNS, SHAPES, Identity

SEED = 20250403
SHARE = 0.10


def all_identities() -> list[Identity]:
    """Every identity of the world, in the order of its tables."""
    return [
        Identity(noun, body, second, pattern, accessory, shape)
        for noun in NOUNS
        for body, second, pattern, accessory, shape in product(COLOURS, COLOURS, PATTERNS, ACCESSORIES, SHAPES[noun][1])
        if body != second
    ]


@cache
def held_out_identities() -> frozenset[Identity]:
    """The identities kept from the base model's training pictures; a benchmark takes its subjects from them."""
    everyone = all_identities()
    chosen = np.random.default_rng(SEED).permutation(len(everyone))[: round(SHARE * len(everyone))]
    return frozenset(everyone[i] for i in chosen)
