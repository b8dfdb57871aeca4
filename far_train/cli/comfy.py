"""The command that runs workflows on a ComfyUI: queue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import ConfigError
from .parsing import SWITCH, Argument, Command, Inputs, repeatable
from .shared import texts

if TYPE_CHECKING:
    from .comfy_grid import GridRunner


def queue(inputs: Inputs, _: None) -> None:
    """Run a workflow, or a grid of its variants, and save the pictures."""
    from .comfy_client import DEFAULT_HOST, RunningHost, read_workflow, set_inputs
    from .comfy_grid import GridRunner, plan, read_axis
    from .comfy_run import run_workflow

    workflow = set_inputs(read_workflow(Path(inputs["workflow"])), texts(inputs.get("set")))
    axes = [read_axis(workflow, text) for text in texts(inputs.get("grid"))]
    hosts = [RunningHost(url) for url in texts(inputs.get("host")) or [DEFAULT_HOST]]
    out = Path(inputs["out"]) if inputs.get("out") else None
    previews, dry_run = bool(inputs.get("previews")), bool(inputs.get("dry_run"))
    if axes:
        if out is None:
            raise ConfigError("out: a --grid needs a folder; it keeps there what is done, and goes on where it stopped")
        runner = GridRunner(plan(workflow, axes), hosts, out, _say, previews)
        _queue_grid(runner, len(axes[-1].values), dry_run)
        return
    if len(hosts) > 1:
        raise ConfigError("host: several hosts share the runs of a --grid; without one, name a single host")
    if dry_run:
        print("1 run; nothing was queued")
        return
    files = run_workflow(workflow, hosts[0], out, _say, previews)
    if out is not None:
        print(f"{len(files)} {'file' if len(files) == 1 else 'files'} → {out}")


def _queue_grid(runner: GridRunner, columns: int, dry_run: bool) -> None:
    from ..utils.files import make_folder
    from .comfy_grid import collect, finished

    runs, out, todo = runner.runs, runner.out, runner.todo()
    if dry_run:
        for run in runs:
            print(f"{'to do' if run in todo else 'done'}: {run.label}")
        print(f"{len(runs)} runs; nothing was queued")
        return
    make_folder(out)
    try:
        runner.run()
    finally:
        done = [run for run in runs if finished(run, out)]
        if done:
            written = collect(runs, out, columns)
            print(f"{len(done)} of {len(runs)} runs → {out}; look at {written[-1]}")


def _say(text: str) -> None:
    print(text, flush=True)


QUEUE = Command(
    "queue",
    "run a workflow on a running ComfyUI and wait for its end",
    (
        Argument("workflow", "API-format JSON, such as those in workflows/api", True, bare=True),
        Argument(
            "host",
            "the ComfyUI's address (default: http://127.0.0.1:8188); repeat to share a grid among several",
            False,
            repeatable("URL"),
        ),
        Argument(
            "set",
            "replace an input of the node with this title; repeat for several",
            False,
            repeatable("TITLE.INPUT=VALUE"),
        ),
        Argument(
            "grid",
            "one run for each of these values (a JSON list, A..B, or values with commas between); repeat for all "
            "combinations",
            False,
            repeatable("TITLE.INPUT=VALUES"),
        ),
        Argument(
            "out",
            "folder for the pictures that the workflow saves (without it they stay on the host); a grid resumes in the "
            "same folder",
        ),
        Argument("previews", "fetch the nodes' temporary previews, too", options=SWITCH),
        Argument("dry_run", "check the inputs and list the runs, but queue nothing", options=SWITCH),
    ),
    queue,
)
