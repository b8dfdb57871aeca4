"""The page of a fleet: every job with its cost, scores, error, curves and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..utils.files import parse_json
from ..utils.wording import duration
from .fleet_jobs import Job
from .fleet_steps import PICTURES, RUN, read_state
from .fleet_table import seconds_of

PAGE_FILE = "index.html"
WIDTH = 1000  # pixels of a job's picture


def write_page(jobs: Sequence[Job], out: Path) -> Path:
    """Write the page from what is in the jobs' folders. Raises OutputError."""
    from ..evaluation.sheets import Page

    page = Page("A fleet of trainings")
    states = {job.name: read_state(out / job.name) for job in jobs}
    counts = Counter(state.get("state", "not begun") for state in states.values())
    total = sum(seconds_of(state) for state in states.values())
    page.section("Jobs", f"{', '.join(f'{n} {what}' for what, n in counts.items())}; {duration(total)} of work in all.")
    names = list(dict.fromkeys(step for state in states.values() for step in state.get("steps", {})))
    page.table(
        ["job", "state", *names, "seconds", "machine", "last loss", "score", "right"],
        (_row(name, state, names, out / name) for name, state in states.items()),
    )
    for name, state in states.items():
        page.section(f"{name}: {state.get('state', 'not begun')}", state.get("error", ""))
        for path in (f"{RUN}/curves.png", f"{PICTURES}.verdicts.jpg", f"{PICTURES}.grid.jpg"):
            _show(page, out / name / path)
    page.save(out / PAGE_FILE)
    return out / PAGE_FILE


def _row(name: str, state: Mapping[str, Any], steps: Sequence[str], folder: Path) -> list[str]:
    done = state.get("steps", {})
    seconds = [f"{done[s]['seconds']:.1f}" if s in done else "" for s in steps]
    scores = _scores(folder)
    return [
        name,
        state.get("state", "not begun"),
        *seconds,
        f"{seconds_of(state):.1f}",
        str(state.get("machine", "")),
        _last_loss(folder),
        f"{scores['score']:.3f}" if "score" in scores else "",
        f"{scores['right']:.0%}" if "right" in scores else "",
    ]


def _scores(folder: Path) -> dict[str, Any]:
    try:
        return parse_json((folder / f"{PICTURES}.scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_loss(folder: Path) -> str:
    """The mean denoising loss of the last twentieth of the steps: single steps differ by their timesteps."""
    from ..training.run_folder import METRICS_FILE, read_metrics

    path = folder / RUN / METRICS_FILE
    losses = [m.get("denoising") for m in read_metrics(path)] if path.exists() else []
    last = [v for v in losses[-max(len(losses) // 20, 1) :] if isinstance(v, float) and math.isfinite(v)]
    return f"{fmean(last):.4f}" if last else ""


def _show(page: Any, path: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.thumbnail((WIDTH, 4 * WIDTH))
            page.picture(picture, path.name)
    except (OSError, UnidentifiedImageError):
        return  # it wasn't made
