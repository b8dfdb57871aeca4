"""The engine of a fleet: Ray runs each job as a task of its own, on this machine or on a cluster.

What is left to do here: drawing what jobs share before them, the order by priority, going on after a loss, stopping. A
task's result is the job's state, which is in the job's folder as well: nothing depends on this process living on.
Tasks run in processes of their own, so that a job that crashes takes no other with it. Ray itself serializes the tasks
between its processes with pickle; files of users are never read that way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.errors import ConfigError, Interrupted
from ..utils.files import make_folder, write_json
from .fleet_jobs import SHARED, Job, Jobs
from .fleet_steps import (
    FAILED,
    STATE_FILE,
    STOPPED,
    ClassPictures,
    Work,
    draw_shared,
    is_done,
    read_state,
    run_job,
    shared_pictures,
)
from .fleet_table import Table

REFRESH = 1.0  # seconds between looks at the jobs
HOW_TO_GET_RAY = "fleet: needs Ray, which isn't installed; run 'python -m pip install \"ray[client]>=2.40\"'"
EXCLUDED = ["mini/weights", "**/__pycache__"]  # of the package, when it is sent to other machines

Ref = Any  # a ray.ObjectRef; Ray's types are not there without it


def import_ray() -> Any:
    """Ray, told to keep to itself. Raises ConfigError that says how to get it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to its makers
    try:
        import ray
    except ImportError as e:
        raise ConfigError(HOW_TO_GET_RAY) from e
    return ray


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """Within, Ray runs: on this machine alone, or on the cluster at ``address``. Raises ConfigError."""
    package = str(Path(__file__).parents[1])
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        # The same code on every machine; a line of progress every ten seconds is enough for a log.
        "runtime_env": {
            "py_modules": [package],
            "excludes": EXCLUDED,
            "env_vars": {"TQDM_MININTERVAL": "10"},
        },
    }
    if address is None:
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError, ImportError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"address: can't reach Ray at {address or 'this machine'} ({reason})") from e
    try:
        yield
    finally:
        ray.shutdown()


class Fleet:
    """The jobs of a file that are still to be done, on a running Ray. ``may_grow``: machines may join later."""

    def __init__(self, ray: Any, jobs: Jobs, table: Table, may_grow: bool):
        self.ray, self.out, self.table, self.may_grow = ray, jobs.out, table, may_grow
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        if may_grow and not has_gpus and any(job.placement.gpus is None for job in jobs.jobs):
            table.say("no machine has a GPU now: jobs that don't say gpus run on the CPU; gpus: 1 waits for one")
        self.jobs = [_placed(job, has_gpus) for job in jobs.jobs]
        # A process for each: what a job leaves in memory, or on a GPU, ends with it.
        self._job_task = ray.remote(max_calls=1)(_run_job)
        self._pictures_task = ray.remote(max_calls=1)(_draw_shared)
        self._running: dict[Ref, Job] = {}
        self._losses: dict[str, int] = {}
        self._stopping = False

    def run(self) -> None:
        """Do what isn't done. Raises Interrupted after Ctrl-C, when all jobs have saved."""
        todo = [job for job in self.jobs if not is_done(self._work(job))]
        self.table.done_before([job.name for job in self.jobs if job not in todo])
        self._check_fits(todo)
        todo.sort(key=lambda job: -job.placement.priority)  # of equal ones, in the order of the file
        try:
            before = self._draw_what_is_shared(todo)
            for job in todo:
                self._submit(job, before[job.name])
            self._wait()
        except KeyboardInterrupt:
            self._stopping = True
            self.table.say("Stopping: each job saves first. Ctrl-C again stops at once, without saving.")
            for ref in self._running:
                self.ray.cancel(ref, recursive=False)
            self._wait()
            raise Interrupted("stopped; every job is saved, --resume goes on") from None

    def _wait(self) -> None:
        while self._running:
            ended, _ = self.ray.wait(list(self._running), timeout=REFRESH)
            for ref in ended:
                self._end(self._running.pop(ref), ref)
            self.table.refresh()

    def _check_fits(self, todo: Sequence[Job]) -> None:
        """Say which jobs no machine can run now. Raises ConfigError if none will."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for job in todo:
            needs = {"CPU": job.placement.cpus, "GPU": job.placement.gpus}
            if not any(all(node.get(kind, 0) >= need for kind, need in needs.items()) for node in nodes):
                text = f"{job.name}: no machine has {needs['CPU']} CPU cores and {needs['GPU']:g} GPUs"
                if not self.may_grow:
                    raise ConfigError(f"{text}; lower cpus or gpus")
                self.table.say(f"{text} now; it waits for one")

    def _draw_what_is_shared(self, todo: list[Job]) -> dict[str, list[Ref]]:
        """Begin to draw the regularization images of several jobs; what each job has to wait for."""
        refs: dict[ClassPictures, Ref] = {}
        after: dict[str, list[Ref]] = {}
        for name, wanted in shared_pictures(todo).items():
            for pictures in wanted:
                if pictures not in refs:
                    task = self._pictures_task.options(**_resources(pictures.job), max_retries=3)
                    refs[pictures] = task.remote(pictures, self._work(pictures.job))
            after[name] = [refs[pictures] for pictures in wanted]
        return after

    def _work(self, job: Job) -> Work:
        device = "auto" if job.placement.gpus else "cpu"
        return Work(job, self.out / job.name, self.out / SHARED, device)

    def _submit(self, job: Job, after: Sequence[Ref] = ()) -> None:
        # Ray would retry by itself, but without a word.
        task = self._job_task.options(**_resources(job), max_retries=0, name=job.name)
        self._running[task.remote(self._work(job), *after)] = job

    def _end(self, job: Job, ref: Ref) -> None:
        """Tell how a job ended; one whose machine or process was lost goes on elsewhere."""
        errors = self.ray.exceptions
        try:
            self.table.ended(job.name, self.ray.get(ref))
            return
        except errors.TaskCancelledError:
            self._close(job, STOPPED, "")
            return
        except (errors.RayTaskError, errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as e:
            self._close(job, FAILED, str(e).strip().splitlines()[-1])
            return
        except errors.RayError as e:
            lost = f"its machine or process was lost ({type(e).__name__})"
        self._losses[job.name] = losses = self._losses.get(job.name, 0) + 1
        if self._stopping:
            self._close(job, STOPPED, "")
        elif losses > job.placement.retries:
            self._close(job, FAILED, f"{lost} {losses} times; does it have enough memory? --resume tries again")
        else:
            self.table.say(f"{job.name}: {lost}; it goes on elsewhere from its last checkpoint")
            self._submit(job)

    def _close(self, job: Job, state: str, error: str) -> None:
        """Write how a job ended that could not say so itself."""
        folder = self.out / job.name
        about = {**read_state(folder), "state": state, "error": error}
        if state == FAILED or folder.exists():  # a job that never began is only stopped
            write_json(make_folder(folder) / STATE_FILE, about)
        self.table.ended(job.name, about)


def _placed(job: Job, has_gpus: bool) -> Job:
    gpus = job.placement.gpus
    return replace(job, placement=job.placement.replace(gpus=float(has_gpus) if gpus is None else gpus))


def _resources(job: Job) -> dict[str, float]:
    return {"num_cpus": job.placement.cpus, "num_gpus": job.placement.gpus}


def _run_job(work: Work, *_after: None) -> dict[str, Any]:
    return run_job(work)


def _draw_shared(pictures: ClassPictures, work: Work) -> None:
    draw_shared(pictures, work)
