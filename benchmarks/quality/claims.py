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
    """A claim about a measure of two arms, over some ``kinds`` of groups.

    The value is the difference of the means of ``first`` and ``second`` (of several, the one with the best mean), or
    with ``ratio`` their ratio. The claim holds if the value is above ``over`` and below ``under``.
    """

    text: str
    measure: str
    first: str
    second: str | tuple[str, ...]
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


NEAR = ("near",)
CLAIMS = (
    Claim("FaR has the highest joint accuracy", "success", "far", OTHERS, over=0),
    Claim("… 15 points over Custom Diffusion, one class", "success", "far", "custom-diffusion", SAME_CLASS, over=0.15),
    Claim("… and 85 % of the oracle arm's", "success", "far", "ceiling", ratio=True, over=0.85),
    Claim("leakage on near twins: half of Seg-Mix's", "leakage_corrected", "far", "seg-mix", NEAR, True, under=0.5),
    Claim("… a quarter of Custom Diffusion's", "leakage_corrected", "far", "custom-diffusion", NEAR, True, under=0.25),
    Claim("fusion cuts copied places", "reference_background", "fusion", "custom-diffusion", under=0),
    Claim("… with refinement, too", "reference_background", "far", "refinement", under=0),
    Claim("fusion cuts missing subjects", "missing", "fusion", "custom-diffusion", under=0),
    Claim("… with refinement, too", "missing", "far", "refinement", under=0),
    Claim("given fusion, refinement cuts leakage on near twins", "leakage", "far", "fusion", NEAR, under=0),
    Claim("… and changes little across classes", "leakage", "far", "fusion", ("classes",), over=-0.05, under=0.05),
    Claim("wrong masks are worse than no refinement", "success", "far-shuffled", "fusion", under=0),
    Claim("poor masks cost at most 5 points", "success", "far-degraded", "far", over=-0.05),
    Claim("prior drift within 5 points of Custom Diffusion's", "prior_drift", "far", "custom-diffusion", under=0.05),
    Claim("one of two learned subjects alone: within 5 points of the best", "solo", "far", OTHERS, over=-0.05),
    Claim("one subject learned alone: within 5 points of the best", "success", "far", OTHERS, ("single",), over=-0.05),
    Claim(
        "joint accuracy of three: 60 % of the oracle's",
        "success",
        "far",
        "ceiling",
        ("triple",),
        ratio=True,
        over=0.6,
    ),
)


def weigh(rows: Sequence[Row], claim: Claim) -> dict[str, Any] | None:
    """The claim's value over the groups that have both arms, its 95 % bootstrap interval over groups, and a verdict.

    The verdict is "yes" or "no", followed by ", open" if the interval includes the bound. None if no group has both
    arms, or for a ratio to 0.
    """
    first = per_group(rows, claim.first, claim.measure, claim.kinds)
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
    value, low, high = compare(pairs, claim.ratio)
    verdict = "yes" if claim.holds(value, value) else "no"
    if not (claim.holds(low, high) or claim.fails(low, high)):
        verdict += ", open"
    return {"second": second, "groups": len(pairs), "value": value, "low": low, "high": high, "verdict": verdict}


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
        form = "{:.2f} × | {:.2f} … {:.2f} ×" if claim.ratio else "{:+.1f} | {:+.1f} … {:+.1f}"
        figures = form.format(*(found[k] * (1 if claim.ratio else 100) for k in ("value", "low", "high")))
        what = f"{COLUMNS[claim.measure][0]}, {claim.first} to {found['second']} ({found['groups']})"
        lines.append(f"| {claim.text} | {what} | {figures} | {_bounds(claim)} | {found['verdict']} |")
    if lines:
        lines[:0] = [
            "| claim | measure and arms (groups) | value | 95 % | wanted | holds |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    return lines


def _bounds(claim: Claim) -> str:
    def shown(bound: float) -> str:
        return f"{bound:g} ×" if claim.ratio else f"{100 * bound:+.0f}"

    parts = [f"> {shown(claim.over)}"] if claim.over is not None else []
    return ", ".join(parts + ([f"< {shown(claim.under)}"] if claim.under is not None else []))
