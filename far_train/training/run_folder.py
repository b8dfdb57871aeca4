"""Run folders: their identity (which runs are the same), and their metrics file."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..data.concepts import TrainingSet
from ..models.weights import FarWeights
from ..utils.errors import CheckpointError, OutputError
from ..utils.files import make_folder, parse_json, remove_leftovers, write_json, write_text
from .checkpoints import newest_step
from .settings import TrainConfig

SCHEMA = 2  # of run.json
RUN_FILE = "run.json"
WEIGHTS_FILE = "weights.safetensors"
FORMERLY_IDENTIFYING = ("micro_batch",)  # settings that run.json held once, though they change no result
LOCK_FILE = "run.lock"  # there while a process trains
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ENCODINGS = "encodings"  # of a run that has no other place for them, until it is finished


class IdentifiedBase(Protocol):
    """What identifies a base model: a :class:`BaseModel`, or what a host knows about one without building it."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def prediction_type(self) -> str: ...

    @property
    def zero_terminal_snr(self) -> bool: ...


def run_identity(
    base: IdentifiedBase, training_set: TrainingSet, config: TrainConfig, start: FarWeights | None = None
) -> dict[str, Any]:
    """Everything that decides a run's result, as JSON types: runs with equal identities learn the same.

    ``start``: the weights that the run continues from, if any.
    """
    identity: dict[str, Any] = {
        "schema": SCHEMA,
        "config": config.result_shaping(),
        "base": {"fingerprint": base.fingerprint, "prediction_type": base.prediction_type},
        "dataset": training_set.digest(),
        "concepts": [{"token": n.token, "noun": n.noun} for n in training_set.names],
    }
    if base.zero_terminal_snr:
        identity["base"]["zero_terminal_snr"] = True
    if start is not None:
        identity["continue_from"] = start.digest()
    return json.loads(json.dumps(identity))


def find_run(parent: Path, name: str, identity: dict[str, Any]) -> tuple[Path, bool]:
    """The folder of the run with this identity among ``parent``/NAME, NAME-2, …, and whether it is finished.

    Without such a run, it is the first unused name: files of other runs are never touched, and no link is followed.
    """
    for folder, begun in _runs_of_name(parent, name):
        if begun is not None and begun == identity:
            return folder, (folder / WEIGHTS_FILE).exists()
    folders = (_numbered(parent, name, number) for number in itertools.count(1))
    return next(folder for folder in folders if not os.path.lexists(folder)), False


def what_changed(parent: Path, name: str, identity: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The newest run among ``parent``/NAME, NAME-2, … and how ``identity`` differs from it, in words; None without one.

    It tells the user why a new run begins although others have its name.
    """
    begun = [(folder.name, run) for folder, run in _runs_of_name(parent, name) if isinstance(run, dict)]
    if not begun:
        return None
    folder, run = begun[-1]
    return folder, _differences(run, identity)


def _runs_of_name(parent: Path, name: str) -> Iterator[tuple[Path, Any]]:
    """The folders ``parent``/NAME, NAME-2, … in their order, with the identities of their runs.

    The user may have deleted some in between. The identity is None for a folder that is no run. Links are skipped,
    since they may lead anywhere.
    """
    entries = os.listdir(parent) if parent.is_dir() else ()
    # Whether names that differ in case are one is for the file system to say.
    found = (re.fullmatch(re.escape(name) + r"(?:-(\d{1,9}))?", entry, re.IGNORECASE) for entry in entries)
    for number in sorted({int(match[1] or 1) for match in found if match}):
        folder = _numbered(parent, name, number)
        if not folder.is_dir() or folder.is_symlink():
            continue
        try:
            yield folder, _read_identity(folder / RUN_FILE)
        except (OSError, ValueError):
            yield folder, None


def _numbered(parent: Path, name: str, number: int) -> Path:
    return parent / (name if number == 1 else f"{name}-{number}")


def _read_identity(path: Path) -> Any:
    """The content of a run.json, without the settings that no longer identify a run. Raises OSError, ValueError."""
    run = parse_json(path.read_text(encoding="utf-8"))
    if isinstance(run, dict) and isinstance(run.get("config"), dict):
        run["config"] = {k: v for k, v in run["config"].items() if k not in FORMERLY_IDENTIFYING}
    return run


def open_run(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Begin a run folder, or check that the one to be resumed belongs to the same run.

    Raises OutputError if the folder holds a run that isn't to be resumed, CheckpointError naming what differs.
    """
    path = folder / RUN_FILE
    if not path.exists():
        if newest_step(folder / CHECKPOINTS):
            raise OutputError(
                f"{folder}: holds checkpoints without {RUN_FILE}, which would tell their run; delete them, or choose "
                "another folder"
            )
        make_folder(folder)
        write_json(path, identity)
        return
    if not resume:
        raise OutputError(f"{folder}: holds a run already; resume it (--resume) or choose another folder")
    try:
        begun = _read_identity(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: can't be read ({e}); start anew in another folder") from e
    differing = _differences(begun, identity)
    if differing:
        raise CheckpointError(
            f"{folder}: the run to resume differs in {'; '.join(differing)}; undo that or choose another folder"
        )
    remove_leftovers(folder)


class MetricsLog:
    """A metrics.jsonl that lines are appended to; a context manager. Raises OutputError."""

    def __init__(self, path: Path):
        self.path = path
        with _named(path):
            self._file = open(path, "a", encoding="utf-8")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        with _named(self.path):
            self._file.close()

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        with _named(self.path):
            # JSON has no NaN: what isn't finite is null.
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
            self._file.flush()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"{path}: can't be written ({e.strerror or e}); free space or choose another place") from e


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``: a killed run took those steps after its last checkpoint, and repeats them."""
    if path.exists():
        write_text(path, "".join(f"{json.dumps(m)}\n" for m in read_metrics(path) if m["step"] <= step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a crash cut off is skipped."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _differences(begun: Any, now: Any, name: str = "") -> list[str]:
    """How two run identities differ, in words."""
    if name == "base" and isinstance(begun, dict) and "digest" in begun:
        return ["base (that run is of an earlier version of FaR, which identified a base by part of its weights)"]
    if isinstance(begun, dict) and isinstance(now, dict):
        if name == "config":  # kept under the settings' first names
            begun, now = TrainConfig.current_names(begun), TrainConfig.current_names(now)
        return [d for k in {**begun, **now} for d in _differences(begun.get(k), now.get(k), f"{name}.{k}".lstrip("."))]
    if begun == now:
        return []
    if name == "continue_from":
        return [f"{name} (other weights)" if begun and now else f"{name} ({'only then' if begun else 'only now'})"]
    if name.endswith(("fingerprint", "dataset")):
        return [f"{name.split('.')[0]} (its content changed)"]
    return [f"{name.removeprefix('config.')} ({begun!r} then, {now!r} now)"]
