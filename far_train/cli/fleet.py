"""The command that trains many subject sets, on one machine or on a cluster.

``fleet_jobs`` reads the job file, ``fleet_steps`` does one job, ``fleet_ray`` has many done, ``fleet_table`` and
``fleet_page`` tell how they are.
"""

from __future__ import annotations

from pathlib import Path

from ..utils.errors import ConfigError, JobsFailed
from ..utils.files import make_folder
from ..utils.locks import locked
from .fleet_jobs import Jobs, read_jobs
from .parsing import SWITCH, Argument, Command, Inputs

LOCK_FILE = ".fleet.lock"  # in the folder of the results, while a fleet is at work there


def fleet(inputs: Inputs, _: None) -> None:
    """Do all jobs of a file, and write the page of what came of them."""
    from .fleet_page import write_page
    from .fleet_ray import Fleet, connected, import_ray
    from .fleet_steps import DONE, read_state
    from .fleet_table import Table

    jobs = read_jobs(Path(inputs["jobs"]))
    if not inputs.get("resume"):
        _refuse_begun(jobs)
    ray = import_ray()
    make_folder(jobs.out)
    table = Table(jobs.jobs, jobs.out)
    busy = f"out: another fleet works in {jobs.out}; wait for it, or give another out in the job file"
    with locked(jobs.out / LOCK_FILE, busy), connected(ray, inputs.get("address")):
        try:
            Fleet(ray, jobs, table, may_grow=inputs.get("address") is not None).run()
        finally:
            table.close()
            page = write_page(jobs.jobs, jobs.out)
    print(f"{len(jobs.jobs)} jobs → {page}")
    states = {job.name: read_state(jobs.out / job.name) for job in jobs.jobs}
    failed = [f"  {name}: {state.get('error')}" for name, state in states.items() if state.get("state") != DONE]
    if failed:
        count = f"{len(failed)} of {len(jobs.jobs)} jobs failed (--resume tries them again)"
        raise JobsFailed("\n".join([f"{count}:", *failed]))


def _refuse_begun(jobs: Jobs) -> None:
    if begun := [job.name for job in jobs.jobs if (jobs.out / job.name).exists()]:
        raise ConfigError(
            f"resume: {jobs.out} holds {', '.join(begun[:3])}{' …' if len(begun) > 3 else ''} already; give --resume "
            "to go on, or another out in the job file"
        )


FLEET = Command(
    "fleet",
    "train many subject sets, on one machine or a cluster (needs Ray)",
    (
        Argument("jobs", "job file, YAML or JSON: the subject sets, and the settings of each step", True, bare=True),
        Argument("address", "a Ray cluster, such as ray://head:10001 or auto (default: this machine alone)"),
        Argument("resume", "continue the jobs of this file that are not done", options=SWITCH),
    ),
    fleet,
)
