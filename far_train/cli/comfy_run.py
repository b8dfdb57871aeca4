"""One run of a workflow on a running ComfyUI, from the queue to its files: say how far it is, fetch what it saved."""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils.errors import HostLost, Interrupted, QueueError, RunFailed
from ..utils.files import make_folder, replacing
from .comfy_client import LATE_SECONDS, RunningHost, StoppedWaiting, Workflow, title_of
from .comfy_progress import ProgressListener


@dataclass(frozen=True)
class Result:
    """One thing that a node showed or saved: a file on the host, with its ``path`` here once fetched, or a text."""

    title: str
    file: Mapping[str, str] | None = None  # filename, subfolder, type
    text: str = ""
    cached: bool = False  # the host had it from an earlier run
    path: Path | None = None

    @property
    def saved(self) -> bool:
        """Whether the host keeps it: a preview lies in its temporary folder."""
        return self.file is not None and self.file.get("type") != "temp"


def check_success(workflow: Workflow, entry: Mapping[str, Any]) -> None:
    """Raises RunFailed with the node's title if a run failed, Interrupted if somebody stopped it."""
    status = entry.get("status") or {}
    if status.get("status_str", "success") == "success":
        return
    for event, data in status.get("messages", ()):
        where = f"'{title_of(workflow, str(data.get('node_id')))}'"
        if event == "execution_interrupted":
            raise Interrupted(f"stopped on the host, at {where}")
        if event == "execution_error":
            raise RunFailed(f"{where} failed: {str(data.get('exception_message', '')).strip()}")
    raise RunFailed("the run failed; the host's log says why")


def results(workflow: Workflow, entry: Mapping[str, Any]) -> Iterator[Result]:
    """Everything that the nodes showed or saved, in the workflow's order."""
    outputs = entry.get("outputs") or {}
    messages = (entry.get("status") or {}).get("messages", ())
    cached = {str(node) for event, data in messages if event == "execution_cached" for node in data.get("nodes", ())}
    for node_id in sorted(outputs, key=list(workflow).index if set(outputs) <= set(workflow) else str):
        for values in outputs[node_id].values():
            for value in values if isinstance(values, list) else ():
                if isinstance(value, Mapping) and value.get("filename"):
                    yield Result(title_of(workflow, node_id), file=value, cached=node_id in cached)
                elif isinstance(value, str):
                    yield Result(title_of(workflow, node_id), text=value, cached=node_id in cached)


def save(content: bytes, folder: Path, name: str) -> Path:
    """Write a file as ``folder``/``name``, or with a number where another file has that name. Returns its path."""
    plain = Path(name.replace("\\", "/")).name  # the host chose it, and must not choose the folder
    for number in itertools.count(1):
        path = folder / plain if number == 1 else folder / f"{Path(plain).stem}-{number}{Path(plain).suffix}"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            return path
        if path.read_bytes() == content:
            return path


def run_workflow(
    workflow: Workflow,
    host: RunningHost,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    previews: bool = False,
) -> list[Path]:
    """Queue a workflow, wait for its end, and fetch what it saved into ``out``, with ``previews`` also what its nodes
    only showed; returns those files.

    Ctrl-C takes it out of the host's queue or interrupts it there. Raises QueueError, Interrupted, OutputError.
    """
    return [result.path for result in run_to_end(workflow, host, out, say, previews=previews) if result.path]


def run_to_end(
    workflow: Workflow,
    host: RunningHost,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
    *,
    previews: bool = False,
    told: set[tuple[str, str]] | None = None,
) -> list[Result]:
    """As :func:`run_workflow`, with all that was shown; once ``stopped`` says yes, it ends as with Ctrl-C.

    ``told``: titles and texts of earlier runs, which are not said again of nodes that the host has cached; this run's
    are added.
    """
    if out is not None:
        make_folder(out)  # now: a place that can't be written should not show after hours of training
    client_id = uuid.uuid4().hex
    with ProgressListener(host.url, client_id) as progress:

        def at_work() -> tuple[str, str]:
            step = progress.step
            if step is None:
                return "running", "running"
            return step.node_id, step.words(title_of(workflow, step.node_id))

        prompt_id = None
        try:
            prompt_id = host.submit(workflow, client_id)
            say(f"queued as {prompt_id}")
            entry = host.wait(prompt_id, say, stopped, at_work)
        except (KeyboardInterrupt, StoppedWaiting):
            say("asking the host to stop; press Ctrl-C again to leave at once")
            try:
                prompt_id = prompt_id or host.find_queued(client_id, LATE_SECONDS)
                if prompt_id is None:
                    raise Interrupted(
                        "stopped before the host had queued the workflow; should it still appear there, delete it"
                    )
                host.cancel(prompt_id)
            except HostLost as e:
                raise Interrupted(f"{e}, so what was queued may still run there") from None
            with suppress(QueueError):  # it had not begun, and is gone from the queue
                host.wait(prompt_id, say)  # a training saves before it stops
            raise Interrupted("the host was asked to stop, and did") from None
    check_success(workflow, entry)
    shown = list(results(workflow, entry))
    _tell_texts(shown, say, set() if told is None else told)
    return shown if out is None else _fetch_files(shown, host, out, say, previews)


def _tell_texts(shown: Sequence[Result], say: Callable[[str], None], told: set[tuple[str, str]]) -> None:
    texts = [result for result in shown if result.text]
    for result in texts:
        if not (result.cached and (result.title, result.text) in told):
            say(f"{result.title}: {result.text}")
    told.update((result.title, result.text) for result in texts)


def _fetch_files(
    shown: Sequence[Result], host: RunningHost, out: Path, say: Callable[[str], None], previews: bool
) -> list[Result]:
    """The results, with the files that are wanted in ``out``; says so where that is none of them."""
    wanted = [result.file is not None and (result.saved or previews) for result in shown]
    left = sum(result.file is not None for result in shown)
    if left and not any(wanted):
        say(f"nothing was saved, and {left} temporary previews were left on the host; --previews fetches them")
    return [
        replace(result, path=save(host.fetch(result.file), out, file_name(result))) if fetch else result
        for result, fetch in zip(shown, wanted)
    ]


def file_name(result: Result) -> str:
    """What a fetched file is called: as it was saved; a preview, whose own name says nothing, by its node's title."""
    name = result.file["filename"]
    if result.saved:
        return name
    title = " ".join(re.sub(r"[^\w.+-]+", " ", result.title).split()).strip(" .")
    return (title or "preview") + Path(name).suffix
