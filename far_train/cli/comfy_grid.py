"""A grid of runs: a workflow with every combination of some inputs' values, on one running ComfyUI or several.

Each run has a folder of its own, which gets its ``run.json`` last. The same command therefore goes on where it stopped,
an extended grid runs what is new, and nothing is kept but files that people can read.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import HostLost, Interrupted, QueueError, RunFailed
from ..utils.files import make_folder, write_json, write_text
from ..utils.wording import duration
from .comfy_client import RunningHost, Workflow, find_input, replace_input, title_of, value_of
from .comfy_run import run_to_end

if TYPE_CHECKING:
    from PIL import Image

RUN_FILE, TABLE_FILE, SHEET_FILE = "run.json", "runs.csv", "contact-sheet.jpg"
MOST_VALUES = 100_000  # of one axis, and runs of a grid: more is a slip
LONGEST_NAME = 60  # characters of a run's folder, before its digest
LONGEST_VALUE = 60  # characters of a value in labels
CELL = 256  # pixels of a run on the contact sheet
SHEET_CELLS = 240  # runs on one contact sheet: a JPEG ends at 65,535 pixels a side
SHEET_ROWS = 200  # of them one above the other, with their labels
PICTURES = 9  # of one run that the contact sheet shows, at most


@dataclass(frozen=True)
class Axis:
    """One input and the values that it takes in turn."""

    place: tuple[str, str]  # node id, input name
    title: str  # TITLE.input
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Run:
    """One combination: the workflow to queue, its values by axis title, a short label, a digest of what is computed."""

    workflow: Workflow
    values: dict[str, Any]
    label: str
    digest: str

    def folder(self, out: Path) -> Path:
        """Its folder in ``out``: the one that it has already, perhaps from a grid of other axes, or a readable name."""
        name = re.sub(r"[^\w.+=, -]+", "-", self.label)[:LONGEST_NAME].strip(" .,-")
        folder = out / f"{name}-{self.digest}"
        return folder if folder.exists() else next(out.glob(f"*-{self.digest}"), folder)


def read_axis(workflow: Workflow, assignment: str) -> Axis:
    """An axis from ``TITLE.input=VALUES``.

    VALUES is a JSON list, whole numbers ``A..B`` (both included), or values with commas between, each read as ``set``
    reads one. Raises QueueError.
    """
    node_id, name, text = find_input(workflow, "grid", assignment)
    current = workflow[node_id]["inputs"][name]
    span = re.fullmatch(r"\s*(-?\d+)\s*\.\.\s*(-?\d+)\s*", text)
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    if isinstance(listed, list):
        values = [json.dumps(v) if isinstance(current, str) and not isinstance(v, str) else v for v in listed]
    elif span and not isinstance(current, str):
        first, last = int(span[1]), int(span[2])
        _check_number(assignment, last - first + 1)
        values = range(first, last + 1)
    else:
        values = [value_of(part.strip(), current) for part in text.split(",")] if text.strip() else []
    if not values:
        raise QueueError(f"grid: {assignment!r} has no values; write TITLE.input=1,2,3 or TITLE.input=1..3")
    _check_number(assignment, len(values))
    probe = copy.deepcopy(workflow)
    for value in values:
        replace_input(probe, "grid", (node_id, name), value)
    return Axis((node_id, name), f"{title_of(workflow, node_id)}.{name}", tuple(values))


def plan(workflow: Workflow, axes: Sequence[Axis]) -> list[Run]:
    """Every combination of the axes' values, the last axis running fastest; equal ones once. Raises QueueError."""
    places = [axis.place for axis in axes]
    for axis in axes:
        if places.count(axis.place) > 1:
            raise QueueError(f"grid: '{axis.title}' is given twice; write all its values into one --grid")
    _check_number("all combinations", math.prod(len(axis.values) for axis in axes))
    short = [axis.place[1] for axis in axes]
    names = [axis.place[1] if short.count(axis.place[1]) == 1 else axis.title for axis in axes]
    runs = {}
    for combination in itertools.product(*(axis.values for axis in axes)):
        changed = copy.deepcopy(workflow)
        for axis, value in zip(axes, combination):
            replace_input(changed, "grid", axis.place, value)
        label = ", ".join(f"{name}={_shown(value)}" for name, value in zip(names, combination))
        values = dict(zip((axis.title for axis in axes), combination))
        digest = _digest(changed)
        runs.setdefault(digest, Run(changed, values, label, digest))
    return list(runs.values())


def _check_number(what: str, number: int) -> None:
    if number > MOST_VALUES:
        raise QueueError(f"grid: {what}: {number} runs are too many; at most {MOST_VALUES}, so split the grid")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _digest(workflow: Workflow) -> str:
    """Of what the host computes: titles are the reader's."""
    content = {node_id: (node.get("class_type"), node["inputs"]) for node_id, node in workflow.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """What ``run.json`` says of a run whose files are all there; None if it has still to be run."""
    folder = run.folder(out)
    try:
        about = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        there = all((folder / file).is_file() for file in [*about["saved"], *about["shown"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if there else None


# ---- running


class GridRunner:
    """Runs what of a grid isn't finished in ``out``, on all ``hosts`` at once; each takes the next run when it is free.

    A host that stops answering leaves its run to the others. A refused workflow ends everything, since the next run
    would be refused as well; a run that fails is told, and the others go on.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        hosts: Sequence[RunningHost],
        out: Path,
        say: Callable[[str], None],
        previews: bool = False,
    ):
        self.runs, self.hosts, self.out, self.previews, self._say = list(runs), list(hosts), out, previews, say
        self._told: dict[str, set[tuple[str, str]]] = {host.url: set() for host in self.hosts}
        self._waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._telling = threading.Lock()
        self._failed: list[str] = []
        self._lost: list[str] = []
        self._fatal: BaseException | None = None
        self._done = self._open = 0
        self._began = 0.0

    def todo(self) -> list[Run]:
        """The runs that aren't finished, or whose previews are wanted now and were not when they were run."""
        reports = [finished(run, self.out) for run in self.runs]
        done = [about is not None and (about.get("previews", True) or not self.previews) for about in reports]
        return [run for run, is_done in zip(self.runs, done) if not is_done]

    def run(self) -> None:
        """Raises QueueError, RunFailed, Interrupted, OutputError; what is done by then is kept."""
        todo = self.todo()
        if len(todo) < len(self.runs):
            self._say(f"{len(self.runs) - len(todo)} of {len(self.runs)} runs are in {self.out} already")
        for run in todo:
            self._waiting.put(run)
        self._open, self._began = len(todo), time.monotonic()
        workers = [threading.Thread(target=self._work, args=(host,), daemon=True) for host in self.hosts if todo]
        for worker in workers:
            worker.start()
        try:
            self._join(workers)
        except KeyboardInterrupt:
            self._stop.set()
            self._join(workers)  # a second Ctrl-C leaves at once
        self._raise_what_happened(len(todo))

    @staticmethod
    def _join(workers: Iterable[threading.Thread]) -> None:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)

    def _raise_what_happened(self, wanted: int) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._stop.is_set():
            raise Interrupted(f"stopped after {self._done} of {wanted} runs; the same command goes on")
        if self._open:
            raise HostLost("no host is left:\n" + "\n".join(self._lost))
        if self._failed:
            count = f"{len(self._failed)} of {wanted} runs failed (the same command tries them again)"
            raise RunFailed("\n".join([f"{count}:", *self._failed]))

    def _work(self, host: RunningHost) -> None:
        while not self._stop.is_set():
            try:
                run = self._waiting.get(timeout=0.1)
            except queue.Empty:
                if self._open == 0:
                    return
                continue  # another host may be lost, and its run come back
            try:
                self._one(run, host)
            except HostLost as e:
                self._waiting.put(run)
                self._lost.append(str(e))
                self._tell(f"{e}; its run waits for another host")
                return
            except RunFailed as e:
                self._close(f"failed: {run.label}", f"{run.label}: {e}")
            except Interrupted as e:
                if not self._stop.is_set():  # in the browser, by somebody: this run alone
                    self._close(f"stopped: {run.label}", f"{run.label}: {e}")
            except BaseException as e:
                self._fatal = e
                self._stop.set()

    def _one(self, run: Run, host: RunningHost) -> None:
        where = f" on {host.url}" if len(self.hosts) > 1 else ""

        def say(text: str) -> None:
            if not text.startswith("queued as"):
                self._tell(f"{run.label}{where}: {text}")

        began, folder = time.monotonic(), run.folder(self.out)
        told = self._told[host.url]
        shown = run_to_end(run.workflow, host, folder, say, self._stop.is_set, previews=self.previews, told=told)
        files = [result for result in shown if result.path]
        about = {
            "values": run.values,
            "saved": list(dict.fromkeys(r.path.name for r in files if r.saved)),
            "shown": list(dict.fromkeys(r.path.name for r in files if not r.saved)),
            "previews": self.previews,
            "texts": [[r.title, r.text] for r in shown if r.text],
            "seconds": round(time.monotonic() - began, 1),
            "host": host.url,
            "workflow": run.workflow,
        }
        write_json(folder / RUN_FILE, about)
        self._close(f"done: {run.label}{where} ({about['seconds']:.0f} s)")

    def _close(self, text: str, failure: str = "") -> None:
        """Count a run, and say how many there are and how long the others may take."""
        with self._telling:
            self._open -= 1
            if failure:
                self._failed.append(failure)
            else:
                self._done += 1
            closed = self._done + len(self._failed)
            left = (time.monotonic() - self._began) / closed * self._open
            after = f"; {closed} of {closed + self._open}" + (f", about {duration(left)} left" if self._open else "")
            self._say(text + after)

    def _tell(self, text: str) -> None:
        with self._telling:
            self._say(text)


# ---- the results


def collect(runs: Sequence[Run], out: Path, columns: int) -> list[Path]:
    """Write the table and the contact sheets of all runs that are finished; returns their paths.

    ``columns``: runs in one row of a sheet, as many as the last axis has values. A run shows the pictures that it
    saved, or if it saved none, those previews that were fetched. Raises OutputError.
    """
    from ..evaluation.sheets import contact_sheet, save_sheet  # here, since it brings torch: a refusal needs none

    reports = [finished(run, make_folder(out)) for run in runs]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow([*runs[0].values, "state", "seconds", "host", "folder", "files"])
    for run, about in zip(runs, reports):
        values = [v if isinstance(v, (str, int, float)) else json.dumps(v) for v in run.values.values()]
        files = "; ".join(about["saved"] or about["shown"]) if about else ""
        rows.writerow(
            [*values, "done", about["seconds"], about["host"], run.folder(out).name, files] if about else values
        )
    write_text(out / TABLE_FILE, table.getvalue())
    written = [out / TABLE_FILE]
    columns = min(columns, SHEET_CELLS)
    per_sheet = min(SHEET_CELLS // columns, SHEET_ROWS) * columns
    for number, start in enumerate(range(0, len(runs), per_sheet), 1):
        some = range(start, min(start + per_sheet, len(runs)))
        if not any(reports[i] for i in some):
            continue
        cells = [_tile(runs[i].folder(out), reports[i]) for i in some]
        path = out / (SHEET_FILE if number == 1 else SHEET_FILE.replace(".", f"-{number}."))
        save_sheet(path, contact_sheet(cells, [runs[i].label for i in some], columns=columns, cell=CELL))
        written.append(path)
    return written


def _tile(folder: Path, about: dict[str, Any] | None) -> Image.Image:
    """The pictures of one run as one; a grey field where there is none."""
    from PIL import Image, UnidentifiedImageError

    from ..evaluation.sheets import contact_sheet

    pictures = []
    for name in (about["saved"] or about["shown"]) if about else ():
        try:
            with Image.open(folder / name) as picture:
                picture.thumbnail((2 * CELL, 2 * CELL))
                pictures.append(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError):
            continue  # a text, a video, weights
    if not pictures:
        return Image.new("RGB", (CELL, CELL), (128, 128, 128))
    if len(pictures) == 1:
        return pictures[0]
    side = 2 if len(pictures) <= 4 else 3
    return contact_sheet(pictures[:PICTURES], columns=side, cell=2 * CELL // side)
