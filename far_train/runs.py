"""Run folders: what makes two runs the same, and the metrics that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import SCHEMA_VERSION
from .errors import CheckpointError, OutputError
from .files import make_folder, write_json, write_text


def open_run(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Begin a run folder, or check that the one to be resumed belongs to the same run.

    ``identity`` is what decides the run's result. Raises OutputError if the folder holds a run that isn't to be
    resumed, CheckpointError naming what differs.
    """
    path = folder / "run.json"
    identity = json.loads(json.dumps({"schema": SCHEMA_VERSION, **identity}))
    if not path.exists():
        make_folder(folder)
        write_json(path, identity)
        return
    if not resume:
        raise OutputError(f"{folder}: holds a run already; resume it (--resume) or choose another folder")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: can't be read ({e}); start anew in another folder") from e
    differing = _differences(begun, identity)
    if differing:
        raise CheckpointError(
            f"{folder}: the run to resume differs in {'; '.join(differing)}; undo that or choose another folder"
        )


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``: a killed run took those steps after its last checkpoint and takes them again."""
    if path.exists():
        write_text(path, "".join(f"{json.dumps(m)}\n" for m in read_metrics(path) if m["step"] <= step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _differences(begun: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two run identities, in words."""
    if isinstance(begun, dict) and isinstance(now, dict):
        return [d for k in {**begun, **now} for d in _differences(begun.get(k), now.get(k), f"{name}.{k}".lstrip("."))]
    if begun == now:
        return []
    if name.endswith(("digest", "dataset")):
        return [f"{name.split('.')[0]} (its content changed)"]
    return [f"{name.removeprefix('config.')} ({begun!r} then, {now!r} now)"]
