"""Fleets on Ray itself: a bad photo, Ctrl-C, a lost machine. They are left out where Ray isn't installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from far_train.cli.fleet_jobs import read_jobs
from far_train.cli.fleet_steps import read_state
from far_train.training.run_folder import read_metrics

from .fleets import check_equal, run_alone, subject, write_jobs, write_photos

pytest.importorskip("ray", reason="Ray isn't installed; 'make test-fleet' brings it")

ROOT = Path(__file__).parents[1]
LONGEST = 900  # seconds that a fleet may take, with what else runs on the machine


def start(jobs: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "far_train", "fleet", str(jobs), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(true: Callable[[], bool], fleet: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONGEST
    while not true():
        assert fleet.poll() is None and time.monotonic() < end, fleet.communicate()
        time.sleep(0.05)


def steps_taken(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def states(jobs: Path) -> dict[str, str]:
    fleet = read_jobs(jobs)
    return {job.name: read_state(fleet.out / job.name).get("state", "") for job in fleet.jobs}


def test_stopped_and_resumed_two_jobs_end_as_alone_and_the_bad_one_fails_alone(tmp_path: Path, tiny_folder: Path):
    write_photos(tmp_path)
    listed = [subject("red", tmp_path, train={"steps": 24}), subject("bad", tmp_path), subject("blue", tmp_path)]
    jobs, out = write_jobs(tmp_path / "jobs.json", tiny_folder, listed, save_every=100), tmp_path / "fleet"
    fleet = start(jobs)
    wait_until(lambda: steps_taken(out / "red") >= 2, fleet)
    fleet.send_signal(signal.SIGINT)
    _, said = fleet.communicate(timeout=LONGEST)
    assert fleet.returncode == 130 and "every job is saved" in said, said
    assert states(jobs)["red"] == "stopped"
    (checkpoint,) = (out / "red" / "run" / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.stem[-8:]) < 24  # saved where it stopped, not only every hundred steps

    fleet = start(jobs, "--resume")
    shown, said = fleet.communicate(timeout=LONGEST)
    assert fleet.returncode == 1 and str(out / "index.html") in shown, said
    assert "1 of 3 jobs failed" in said and "bad/0.png: is not a PNG" in said.splitlines()[-1], said
    assert states(jobs) == {"red": "done", "bad": "failed", "blue": "done"}
    assert len(list((out / "shared").rglob("*.png"))) == 2  # drawn once, for both
    run_alone(jobs, tmp_path / "alone")
    check_equal(out / "red", tmp_path / "alone" / "red", 24)
    check_equal(out / "blue", tmp_path / "alone" / "blue", 4)


@pytest.mark.torture
def test_a_lost_machine_costs_no_job(tmp_path: Path, tiny_folder: Path):
    """Two machines, twelve jobs, one of them with a bad photo; a machine is killed while it trains."""
    from ray.cluster_utils import Cluster

    write_photos(tmp_path)
    steps = 30
    listed = [
        subject("bad" if i == 5 else "red", tmp_path, train={"train_seed": i // 3}) | {"name": f"job-{i:02d}"}
        for i in range(12)
    ]
    jobs, out = write_jobs(tmp_path / "jobs.json", tiny_folder, listed, steps=steps, save_every=5), tmp_path / "fleet"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        fleet = start(jobs, "--address", cluster.address)
        busy: set[str] = set()

        def both_train() -> bool:
            busy.clear()
            busy.update(f.name for f in out.glob("job-*") if 7 <= steps_taken(f) < steps - 5)
            return len(busy) == 2

        wait_until(both_train, fleet)
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        _, said = fleet.communicate(timeout=4 * LONGEST)
    finally:
        cluster.shutdown()
    assert fleet.returncode == 1, said
    assert said.count("it goes on elsewhere") == 1, said
    attempts = {name: read_state(out / name)["attempts"] for name in states(jobs)}
    assert sorted(attempts.values()) == [1] * 11 + [2]
    (moved,) = (name for name, count in attempts.items() if count == 2)
    assert moved in busy
    assert [name for name, state in states(jobs).items() if state != "done"] == ["job-05"]
    assert said.count("bad/0.png: is not a PNG") == 2  # when it failed, and at the end
    run_alone(jobs, tmp_path / "alone")
    for name in attempts.keys() - {"job-05"}:
        check_equal(out / name, tmp_path / "alone" / name, steps)
    print(json.dumps({"moved": moved, "jobs": len(attempts)}))
