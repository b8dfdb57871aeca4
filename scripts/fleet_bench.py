#!/usr/bin/env python3
"""How much faster a fleet's trainings are done by two workers than by one. Needs Ray; keep the machine quiet.

    PYTHONPATH=$(scripts/other_versions.sh "ray[client]") $(scripts/python.sh) scripts/fleet_bench.py

Eight trainings of the small base on the CPU, one core each, that draw nothing. Prints JSON: the seconds of the whole
command with one worker and with two, and how many times as fast two are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from far_train.data.images import save_pair  # noqa: E402
from far_train.mini.shipped import BASE, SIZE, SUBJECTS  # noqa: E402
from far_train.mini.world import reference_photos  # noqa: E402

JOBS = 8


def write_jobs(folder: Path, steps: int) -> Path:
    """A job file of equal trainings that differ in their seed, and the photos of their subject."""
    name, identity = SUBJECTS["rex"]
    for number, (image, mask) in enumerate(reference_photos(identity, seed=0, count=4, size=SIZE)):
        save_pair(folder / "rex" / f"{number}.png", image, mask)
    train = {"steps": steps, "batch_size": 2, "prior_batch_size": 0, "sample_every": 0}
    job = {
        "name": "rex",
        "concepts": [{"token": name.token, "noun": name.noun, "subjects": str(folder / "rex")}],
        "matrix": {"train.train_seed": list(range(JOBS))},
    }
    defaults = {"base": str(BASE), "fuse": {"size": SIZE, "count": 16}, "train": train, "export": False}
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"out": "fleet", "defaults": {**defaults, "generate": False, "gpus": 0}, "jobs": [job]}))
    return jobs


def seconds(workers: int, steps: int) -> float:
    """How long the command takes on a Ray with this many cores."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as folder:
        jobs = write_jobs(Path(folder), steps)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": workers})
        try:
            command = [sys.executable, "-m", "far_train", "fleet", str(jobs), "--address", cluster.address]
            began = time.monotonic()
            subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)
            return time.monotonic() - began
        finally:
            cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training (default 200)")
    steps = parser.parse_args().steps
    one, two = (seconds(workers, steps) for workers in (1, 2))
    print(json.dumps({"jobs": JOBS, "steps": steps, "one": one, "two": two, "ratio": one / two}))


if __name__ == "__main__":
    main()
