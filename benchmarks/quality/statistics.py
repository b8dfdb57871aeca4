"""Confidence intervals and tests with pairs of subjects as the unit, since pictures of one pair are not independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np

EXACT = 14  # up to so many pairs all sign flips are counted
DRAWS = 10_000


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    level: float = 0.95,
    seed: int = 0,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda resampled: resampled.mean(1),
) -> tuple[float, float]:
    """Percentile interval over resampled pairs (Efron 1979); the value twice if there is but one pair.

    ``values``: one number, or one row of numbers, of each pair; ``statistic``: from (draws, pairs, …) to (draws,), the
    mean unless given.
    """
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    found = statistic(data[rng.integers(len(data), size=(DRAWS, len(data)))])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences being 0: the share of sign flips with a mean as far from it.

    Exact up to 14 pairs, with random flips beyond. With n pairs p can't be smaller than 2^(1 − n).
    """
    data = np.asarray(differences, dtype=float)
    observed = abs(data.mean()) - 1e-12
    if len(data) <= EXACT:
        signs = np.array(list(product((1, -1), repeat=len(data))))
        return float((abs((signs * data).mean(1)) >= observed).mean())
    signs = np.random.default_rng(seed).choice((1, -1), size=(DRAWS, len(data)))
    return float((1 + (abs((signs * data).mean(1)) >= observed).sum()) / (1 + DRAWS))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of each test (Holm 1979): rejecting those at most α keeps the chance of any false one below α."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min((len(p_values) - rank) * p, 1.0))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
