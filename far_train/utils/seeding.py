"""Seeds derived from a seed, a name and a number, so that every draw can be repeated alone."""

from __future__ import annotations

import numpy as np


def derive_seed(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed for one use at one place, the same in every process."""
    words = [seed, *stream.encode(), index]
    return int(np.random.SeedSequence(words).generate_state(2, np.uint32).view(np.uint64)[0] >> 1)
