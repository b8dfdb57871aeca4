"""The claims that were registered before any test pair was run, and whether the results support them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arms import CORE, FURTHER
from .statistics import bootstrap_interval
from .summary import COLUMNS, PAIRS, SAME_CLASS, Row, per_group

OTHERS = tuple(arm.name for arm in (*CORE, *FURTHER) if not arm.name.startswith("far"))


@dataclass(frozen=True)
class Claim:
    """A claim about a measure of one arm or two, over some ``kinds`` of groups.

    The value is the difference of the means of ``first`` and ``second`` (of several, the one with the best mean), or
    with ``ratio`` their ratio; without ``second`` it is the mean of ``first``. The claim holds if the value is above
    ``over`` and below ``under``.
    """

    text: str
    measure: str
    first: str
    second: str | tuple[str, ...] = ()
    kinds: tuple[str, ...] = PAIRS
    ratio: bool = False
    over: float | None = None
    under: float | None = None

    def holds(self, low: float, high: float) -> bool:
        """For every value from ``low`` to ``high``."""
        return (self.over is None or low > self.over) and (self.under is None or high < self.under)

    def fails(self, low: float, high: float) -> bool:
        """For every value from ``low`` to ``high``."""
        return (self.over is not None and high <= self.over) or (self.under is not None and low >= self.under)


NEAR, APART = ("near",), ("far", "classes")
CLAIMS = (
    Claim("near twins: joint accuracy of 90 %", "success", "far", kinds=NEAR, over=0.90),
    Claim("… 15 points over fusion alone", "success", "far", "fusion", NEAR, over=0.15),
    Claim("… 95 % of the upper bound's", "success", "far", "ceiling", NEAR, ratio=True, over=0.95),
    Claim("… leakage of at most 2 %", "leakage", "far", kinds=NEAR, under=0.02),
    Claim("far apart and two classes: not below fusion alone", "success", "far", "fusion", APART, over=-0.03),
    Claim("… 90 % of the upper bound's", "success", "far", "ceiling", APART, ratio=True, over=0.90),
    Claim("one class: 40 points over Custom Diffusion", "success", "far", "custom-diffusion", SAME_CLASS, over=0.40),
    Claim("… 40 points over Seg-Mix", "success", "far", "seg-mix", SAME_CLASS, over=0.40),
    Claim("photos' places in at most 2 % of pictures", "reference_background", "far", under=0.02),
    Claim("prior drift within 5 points of Custom Diffusion's", "prior_drift", "far", "custom-diffusion", under=0.05),
    Claim("one of two learned subjects alone: within 5 points of the best", "solo", "far", OTHERS, over=-0.05),
    Claim("one subject learned alone: within 5 points of the best", "success", "far", OTHERS, ("single",), over=-0.05),
    Claim("three: joint accuracy of 50 %", "success", "far", kinds=("triple",), over=0.50),
    Claim("wrong masks are worse than no refinement", "success", "far-shuffled", "fusion", under=0),
    Claim("poor masks cost at most 5 points", "success", "far-degraded", "far", over=-0.05),
)


def weigh(rows: Sequence[Row], claim: Claim) -> dict[str, Any] | None:
    """The claim's value over the groups that have both arms, its 95 % bootstrap interval over groups, and a verdict.

    The verdict is "yes" or "no", followed by ", open" if the interval includes the bound. None if no group has both
    arms, or for a ratio to 0.
    """
    first = per_group(rows, claim.first, claim.measure, claim.kinds)
    if first and not claim.second:
        values = list(first.values())
        return _verdict(claim, "", len(first), (float(np.mean(values)), *bootstrap_interval(values)))
    names = (claim.second,) if isinstance(claim.second, str) else claim.second
    others = {name: per_group(rows, name, claim.measure, claim.kinds) for name in names}
    # Only arms that were run on all of these groups can be compared.
    others = {name: values for name, values in others.items() if first and first.keys() <= values.keys()}
    if not others:
        return None
    higher = COLUMNS[claim.measure][1]
    second = max(others, key=lambda name: np.mean(list(others[name].values())) * (1 if higher else -1))
    pairs = np.array([(value, others[second][group]) for group, value in first.items()])
    if claim.ratio and pairs[:, 1].sum() == 0:
        return None
    return _verdict(claim, second, len(pairs), compare(pairs, claim.ratio))


def _verdict(claim: Claim, second: str, groups: int, found: tuple[float, float, float]) -> dict[str, Any]:
    value, low, high = found
    verdict = "yes" if claim.holds(value, value) else "no"
    if not (claim.holds(low, high) or claim.fails(low, high)):
        verdict += ", open"
    return {"second": second, "groups": groups, "value": value, "low": low, "high": high, "verdict": verdict}


def compare(pairs: np.ndarray, ratio: bool) -> tuple[float, float, float]:
    """Difference or ratio of the two columns' means and its 95 % percentile interval over resampled rows."""
    if not ratio:
        gaps = pairs[:, 0] - pairs[:, 1]
        return (float(gaps.mean()), *bootstrap_interval(gaps))
    return (float(pairs[:, 0].mean() / pairs[:, 1].mean()), *bootstrap_interval(pairs, statistic=_ratio_of_means))


def _ratio_of_means(resampled: np.ndarray) -> np.ndarray:
    first, second = np.moveaxis(resampled.mean(1), -1, 0)
    return first / np.maximum(second, 1e-9)


def claims_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines, one for each claim that the rows can decide; empty if there are none."""
    lines = []
    for claim in CLAIMS:
        found = weigh(rows, claim)
        if found is None:
            continue
        form = "{:+.1f} | {:+.1f} … {:+.1f}"
        if claim.ratio:
            form = "{:.2f} × | {:.2f} … {:.2f} ×"
        elif not claim.second:
            form = "{:.1f} | {:.1f} … {:.1f}"
        figures = form.format(*(found[k] * (1 if claim.ratio else 100) for k in ("value", "low", "high")))
        arms = f"{claim.first} to {found['second']}" if found["second"] else claim.first
        what = f"{COLUMNS[claim.measure][0]}, {arms} ({found['groups']})"
        lines.append(f"| {claim.text} | {what} | {figures} | {_bounds(claim)} | {found['verdict']} |")
    if lines:
        lines[:0] = [
            "| claim | measure and arms (groups) | value | 95 % | wanted | holds |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    return lines


def _bounds(claim: Claim) -> str:
    def shown(bound: float) -> str:
        return f"{bound:g} ×" if claim.ratio else f"{100 * bound:{'+' if claim.second else ''}.0f}"

    parts = [f"> {shown(claim.over)}"] if claim.over is not None else []
    return ", ".join(parts + ([f"< {shown(claim.under)}"] if claim.under is not None else []))
