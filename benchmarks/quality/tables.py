"""Write the rows of a benchmark as Markdown and CSV tables and as plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from far_train.evaluation.sheets import COLOURS, save_sheet
from far_train.utils.files import write_text

from .claims import claims_table
from .summary import COLUMNS, PAIRS, Row, arms_of, contrasts, per_group, summarise

KINDS = (
    ("All pairs", PAIRS),
    ("Near twins", ("near",)),
    ("One class, far apart", ("far",)),
    ("Two classes", ("classes",)),
    ("Triples", ("triple",)),
    ("Five subjects", ("five",)),
    ("Single subject", ("single",)),
)


def write_report(rows: Sequence[Row], out: Path, title: str) -> Path:
    """Write results.md, results.csv, both plots and a contact sheet per arm; returns results.md."""
    parts = [f"# {title}", "", f"{len(rows)} runs. Means over groups with 95 % bootstrap intervals over them."]
    parts += report_tables(rows)
    write_text(out / "results.md", "\n".join(parts) + "\n")
    write_text(out / "results.csv", _csv(rows))
    save_sheet(out / "success-drift.png", plot_success_against_drift(summarise(rows, PAIRS)))
    save_sheet(out / "leakage-similarity.png", plot_leakage(rows))
    for arm in arms_of(rows):
        _join_sheets(out, arm, rows)
    return out / "results.md"


def report_tables(rows: Sequence[Row]) -> list[str]:
    """Markdown lines of a report: all tables that these rows can fill, each below its heading."""
    parts = ["", "## Joint accuracy by kind of group", "", *joint_accuracy_table(rows)]
    for heading, kinds in KINDS:
        summary = summarise(rows, kinds)
        if summary:
            groups = len({r["group"] for r in rows if r["kind"] in kinds})
            parts += ["", f"## {heading} ({groups})", "", *_table(summary)]
    tested = contrast_table(rows)
    if tested:
        parts += ["", "## Contrasts", "", *tested]
    claimed = claims_table(rows)
    if claimed:
        parts += ["", "## Claims", "", '"Open" means inconclusive: the interval includes the bound.', "", *claimed]
    return parts


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


def joint_accuracy_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: the mean joint accuracy of each arm by kind of group, with the number of groups in brackets."""
    found = {
        arm: {heading: list(per_group(rows, arm, "success", kinds).values()) for heading, kinds in KINDS}
        for arm in arms_of(rows)
    }
    shown = [heading for heading, _ in KINDS if any(values[heading] for values in found.values())]
    lines = ["| arm | " + " | ".join(shown) + " |", "| --- |" + " --- |" * len(shown)]
    for arm, values in found.items():
        cells = [f"{100 * np.mean(values[h]):.0f} ({len(values[h])})" if values[h] else "–" for h in shown]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def contrast_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines, one for each registered contrast that the rows can decide; empty if there are none."""
    lines = [_contrast_line(c) for c in contrasts(rows)]
    if lines:
        lines[:0] = [
            "| measure | arms | difference | 95 % | p (sign flips) | p (Holm) |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    return lines


def _contrast_line(c: Mapping[str, Any]) -> str:
    what = f"{COLUMNS[c['measure']][0]} | {c['first']} − {c['second']} ({c['pairs']} pairs)"
    gap = f"{100 * c['difference']:+.1f} | {100 * c['low']:+.1f} … {100 * c['high']:+.1f}"
    return f"| {what} | {gap} | {c['p']:.2g} | {c['p_adjusted']:.2g} |"


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "group", "kind", "seed", "training_seconds", *COLUMNS])
    for row in rows:
        figures = [row["figures"].get(m, "") for m in COLUMNS]
        writer.writerow([row["arm"], row["group"], row["kind"], row["seed"], row["training_seconds"], *figures])
    return out.getvalue()


def plot_success_against_drift(summary: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Image.Image:
    """Joint accuracy against prior drift, a point per arm."""
    figure, axes = _figure()
    for i, (arm, measures) in enumerate(summary.items()):
        if "success" in measures and "prior_drift" in measures:
            (x, *xs), (y, *ys) = measures["prior_drift"], measures["success"]
            colour = _colour(i)
            axes.errorbar(
                x, y, xerr=[[x - xs[0]], [xs[1] - x]], yerr=[[y - ys[0]], [ys[1] - y]], fmt="o", color=colour, label=arm
            )
    axes.set(xlabel="prior drift (lower is better)", ylabel="joint accuracy (higher is better)")
    return _drawn(figure, axes)


def plot_leakage(rows: Sequence[Row]) -> Image.Image:
    """Leakage of each arm by the similarity of the two subjects."""
    figure, axes = _figure()
    arms = arms_of(rows)
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
