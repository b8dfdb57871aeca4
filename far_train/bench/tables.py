"""Rows of a bench as tables and plots: markdown and CSV, success against drift, leakage by similarity."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import write_text
from ..report import COLOURS, save_sheet
from .arms import ALL
from .statistics import bootstrap_interval, holm, sign_flip_test

Row = Mapping[str, Any]
PAIRS = ("near", "far", "classes")
SAME_CLASS = ("near", "far")
# Name in a row → heading; those with True are better when higher.
COLUMNS: dict[str, tuple[str, bool]] = {
    "success": ("both right", True),
    "solo": ("alone right", True),
    "leakage": ("leakage", False),
    "leakage_corrected": ("leakage, corrected", False),
    "mixing": ("mixing", False),
    "duplication": ("same twice", False),
    "missing": ("missing", False),
    "extra": ("too many", False),
    "background": ("place right", True),
    "reference_background": ("photo's place", False),
    "copied": ("copied", False),
    "pose_spread": ("pose spread", True),
    "binding": ("sides", True),
    "prior_drift": ("prior drift", False),
    "prior_kid": ("prior KID ×100", False),
    "identity_without_token": ("without token", False),
    "attention_own": ("attention on own", True),
    "attention_other": ("on other", False),
    "attention_hit": ("hottest on own", True),
    "attention_density": ("density, % of outside", True),
}
# The contrasts that are tested, named before the test pairs were run: (measure, first arm, second arm, kinds of pairs).
CONTRASTS = (
    ("success", "far", "custom-diffusion", SAME_CLASS),
    ("success", "far", "seg-mix", SAME_CLASS),
    ("leakage", "far", "fusion", ("near",)),
    ("reference_background", "fusion", "custom-diffusion", PAIRS),
    ("success", "far", "far-shuffled", PAIRS),
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
    for arm in _arms(rows):
        for measure in COLUMNS:
            values = list(per_group(rows, arm, measure, kinds).values())
            if values:
                out.setdefault(arm, {})[measure] = (float(np.mean(values)), *bootstrap_interval(values))
    return out


def contrasts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The registered contrasts that these rows can tell, with p values adjusted over all of them (Holm)."""
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


def write_report(rows: Sequence[Row], out: Path, title: str) -> Path:
    """Write results.md, results.csv, both plots and a contact sheet per arm; returns results.md."""
    parts = [f"# {title}", "", f"{len(rows)} runs. Means over groups with 95 % bootstrap intervals over them."]
    for heading, kinds in (
        ("All pairs", PAIRS),
        ("Near twins", ("near",)),
        ("One class, far apart", ("far",)),
        ("Two classes", ("classes",)),
        ("Triples", ("triple",)),
        ("Five at once", ("five",)),
    ):
        summary = summarise(rows, kinds)
        if summary:
            groups = len({r["group"] for r in rows if r["kind"] in kinds})
            parts += ["", f"## {heading} ({groups})", "", *_table(summary)]
    tested = contrasts(rows)
    if tested:
        parts += [
            "",
            "## Contrasts",
            "",
            "| measure | arms | difference | 95 % | p (sign flips) | p (Holm) |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        parts += [_contrast_line(c) for c in tested]
    write_text(out / "results.md", "\n".join(parts) + "\n")
    write_text(out / "results.csv", _csv(rows))
    save_sheet(out / "success-drift.png", plot_success_against_drift(summarise(rows, PAIRS)))
    save_sheet(out / "leakage-similarity.png", plot_leakage(rows))
    for arm in _arms(rows):
        _join_sheets(out, arm, rows)
    return out / "results.md"


def _arms(rows: Sequence[Row]) -> list[str]:
    """Arms that have rows, in the order of their list."""
    present = {row["arm"] for row in rows}
    return [arm.name for arm in ALL if arm.name in present]


def _table(summary: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> list[str]:
    shown = [m for m in COLUMNS if any(m in measures for measures in summary.values())]
    lines = ["| arm | " + " | ".join(f"{COLUMNS[m][0]} {'↑' if COLUMNS[m][1] else '↓'}" for m in shown) + " |"]
    lines.append("| --- |" + " --- |" * len(shown))
    for arm, measures in summary.items():
        cells = [
            "–" if m not in measures else "{:.1f} ({:.0f}–{:.0f})".format(*(100 * v for v in measures[m]))
            for m in shown
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _contrast_line(c: Mapping[str, Any]) -> str:
    what = f"{COLUMNS[c['measure']][0]} | {c['first']} − {c['second']} ({c['pairs']} pairs)"
    gap = f"{100 * c['difference']:+.1f} | {100 * c['low']:+.1f} … {100 * c['high']:+.1f}"
    return f"| {what} | {gap} | {c['p']:.3f} | {c['p_adjusted']:.3f} |"


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "group", "kind", "seed", "training_seconds", *COLUMNS])
    for row in rows:
        figures = [row["figures"].get(m, "") for m in COLUMNS]
        writer.writerow([row["arm"], row["group"], row["kind"], row["seed"], row["training_seconds"], *figures])
    return out.getvalue()


def plot_success_against_drift(summary: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Image.Image:
    """Where each arm stands between learning its subjects and leaving the class alone."""
    figure, axes = _figure()
    for i, (arm, measures) in enumerate(summary.items()):
        if "success" in measures and "prior_drift" in measures:
            (x, *xs), (y, *ys) = measures["prior_drift"], measures["success"]
            colour = _colour(i)
            axes.errorbar(
                x, y, xerr=[[x - xs[0]], [xs[1] - x]], yerr=[[y - ys[0]], [ys[1] - y]], fmt="o", color=colour, label=arm
            )
    axes.set(xlabel="prior drift (lower is better)", ylabel="both right (higher is better)")
    return _drawn(figure, axes)


def plot_leakage(rows: Sequence[Row]) -> Image.Image:
    """Leakage of each arm by how alike the two subjects are."""
    figure, axes = _figure()
    arms = _arms(rows)
    for i, arm in enumerate(arms):
        for k, kind in enumerate(PAIRS):
            values = list(per_group(rows, arm, "leakage", (kind,)).values())
            if values:
                label = arm if k == 0 else None
                axes.bar(
                    k + (i + 0.5) / len(arms) * 0.8 - 0.4,
                    np.mean(values),
                    0.8 / len(arms),
                    color=_colour(i),
                    label=label,
                )
    axes.set_xticks(range(len(PAIRS)), ("near twins", "far apart", "two classes"))
    axes.set(ylabel="leakage (lower is better)")
    return _drawn(figure, axes)


def _colour(index: int) -> tuple[float, ...]:
    return tuple(c / 255 for c in COLOURS[index % len(COLOURS)])


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    return figure, figure.subplots()


def _drawn(figure: Any, axes: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _join_sheets(out: Path, arm: str, rows: Sequence[Row]) -> None:
    """The first seed's sheets of all groups, below each other."""
    paths = [out / "runs" / arm / f"{r['group']}-s0" / "sheet.jpg" for r in rows if r["arm"] == arm and r["seed"] == 0]
    sheets = [Image.open(path).convert("RGB") for path in paths if path.exists()]
    if sheets:
        joined = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
        top = 0
        for sheet in sheets:
            joined.paste(sheet, (0, top))
            top += sheet.height
        save_sheet(out / "sheets" / f"{arm}.jpg", joined)
