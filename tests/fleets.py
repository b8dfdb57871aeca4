"""What the tests of fleets share: photos of two subjects, one that is none, and job files of tiny trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from far_train.cli.fleet_jobs import Job, read_jobs
from far_train.cli.fleet_steps import Work, run_job
from far_train.data.images import save_pair
from far_train.training.run_folder import read_metrics

from .conftest import disc

TRAIN = {"steps": 4, "batch_size": 1, "prior_batch_size": 1, "num_class_images": 2, "class_image_steps": 1}
TRAIN |= {"save_every": 2, "sample_every": 0, "attention_cells": 8}
COLOURS = {"red": (0.9, 0.1, 0.1), "blue": (0.1, 0.1, 0.9)}


def write_photos(folder: Path) -> None:
    """``folder``/red and /blue: two photos each, with masks; ``folder``/bad: a file that is no photo."""
    for name, colour in COLOURS.items():
        for i in range(2):
            save_pair(folder / name / f"{i}.png", *disc(96 + 24 * i, colour, (0.5, 0.4 + 0.1 * i), 0.3))
    (folder / "bad").mkdir()
    (folder / "bad" / "0.png").write_bytes(b"no picture")


def subject(name: str, folder: Path, **job: Any) -> dict[str, Any]:
    """A job for the photos of this name below ``folder``."""
    concept = {"token": f"<{name}-ball>", "noun": "ball", "photos": str(folder / name)}
    return {"name": name, "concepts": [concept], **job}


def write_jobs(path: Path, base: Path, jobs: list[dict[str, Any]], **train: Any) -> Path:
    """A job file of tiny trainings on the CPU that draw nothing; ``train``: what differs from :data:`TRAIN`."""
    defaults = {"base": str(base), "fuse": {"size": 128, "count": 2}, "train": {**TRAIN, **train}}
    defaults |= {"generate": False, "gpus": 0}
    path.write_text(json.dumps({"out": "fleet", "defaults": defaults, "jobs": jobs}), encoding="utf-8")
    return path


def work_of(job: Job, out: Path) -> Work:
    return Work(job, out / job.name, out / "shared", "cpu")


def run_alone(jobs: Path, out: Path) -> None:
    """Run a job file's jobs one after another in this process."""
    for job in read_jobs(jobs).jobs:
        run_job(work_of(job, out))


def check_equal(fleet: Path, alone: Path, steps: int) -> None:
    """A job of a fleet learned the same to the bit as alone, and took every step once."""
    for file in ("weights.safetensors", f"checkpoints/checkpoint-{steps:08d}.safetensors"):
        left, right = load_file(fleet / "run" / file), load_file(alone / "run" / file)
        assert left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left), (fleet, file)
    assert [m["step"] for m in read_metrics(fleet / "run" / "metrics.jsonl")] == [*range(1, steps + 1)]
