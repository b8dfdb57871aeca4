"""Summarise the rows of a benchmark: means over groups with intervals, and the registered contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arms import ALL
from .statistics import bootstrap_interval, holm, sign_flip_test

Row = Mapping[str, Any]
PAIRS = ("near", "far", "classes")
SAME_CLASS = ("near", "far")
# Name in a row → (heading, whether higher is better).
COLUMNS: dict[str, tuple[str, bool]] = {
    "success": ("joint accuracy", True),
    "solo": ("solo accuracy", True),
    "solo_other": ("solo, shows another", False),
    "solo_leak": ("solo, leakage", False),
    "leakage": ("leakage", False),
    "leakage_corrected": ("leakage, corrected", False),
    "mixing": ("mixing", False),
    "duplication": ("duplicated", False),
    "missing": ("missing", False),
    "extra": ("extra", False),
    "background": ("right place", True),
    "reference_background": ("photo's place", False),
    "copied": ("copied", False),
    "pose_spread": ("pose spread", True),
    "binding": ("right sides", True),
    "prior_drift": ("prior drift", False),
    "prior_kid": ("prior KID ×100", False),
    "identity_without_token": ("shown without token", False),
    "attention_own": ("attention on own subject", True),
    "attention_other": ("attention on others", False),
    "attention_hit": ("attention pointing accuracy", True),
    "attention_density": ("attention inside/outside, %", True),
}
# Contrasts registered before the test groups were run: (measure, first arm, second arm, kinds of pairs).
CONTRASTS = (
    ("success", "far", "custom-diffusion", SAME_CLASS),
    ("success", "far", "seg-mix", SAME_CLASS),
    ("success", "far", "fusion", ("near",)),
    ("leakage", "far", "fusion", ("near",)),
    ("success", "fusion", "far-shuffled", ("near",)),
)


def per_group(rows: Sequence[Row], arm: str, measure: str, kinds: Sequence[str]) -> dict[str, float]:
    """A measure of an arm for each group of these kinds, as a mean over the seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and row["kind"] in kinds and np.isfinite(row["figures"].get(measure, np.nan)):
            values.setdefault(row["group"], []).append(row["figures"][measure])
    return {group: float(np.mean(v)) for group, v in values.items()}


def summarise(rows: Sequence[Row], kinds: Sequence[str]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """arm → measure → (mean over groups, low, high of its 95 % interval)."""
    out: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm in arms_of(rows):
        for measure in COLUMNS:
            values = list(per_group(rows, arm, measure, kinds).values())
            if values:
                out.setdefault(arm, {})[measure] = (float(np.mean(values)), *bootstrap_interval(values))
    return out


def contrasts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The registered contrasts that these rows can decide, with p values adjusted over all of them (Holm)."""
    found = []
    for measure, first, second, kinds in CONTRASTS:
        a, b = (per_group(rows, arm, measure, kinds) for arm in (first, second))
        common = sorted(a.keys() & b.keys())
        if common:
            gaps = [a[group] - b[group] for group in common]
            about = {"measure": measure, "first": first, "second": second, "pairs": len(gaps)}
            low, high = bootstrap_interval(gaps)
            found.append(
                about | {"difference": float(np.mean(gaps)), "low": low, "high": high, "p": sign_flip_test(gaps)}
            )
    adjusted = holm({str(i): c["p"] for i, c in enumerate(found)})
    return [c | {"p_adjusted": adjusted[str(i)]} for i, c in enumerate(found)]


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Arms that have rows, in the order of their list."""
    present = {row["arm"] for row in rows}
    return [arm.name for arm in ALL if arm.name in present]
