"""The job file of a fleet: defaults, matrix, paths, and one clear line for every slip. Nothing here needs Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from far_train.cli.fleet_jobs import Jobs, read_jobs
from far_train.cli.fleet_steps import shared_pictures
from far_train.utils.errors import ConfigError

RED = {"token": "<red-ball>", "noun": "ball", "photos": "photos/red"}
BLUE = {"token": "<blue-ball>", "noun": "ball", "subjects": "/cut/blue"}


def read(folder: Path, values: object) -> Jobs:
    path = folder / "jobs.yaml"
    path.write_text(
        yaml.safe_dump(values, sort_keys=False) if not isinstance(values, str) else values, encoding="utf-8"
    )
    return read_jobs(path)


def one(**job: object) -> dict[str, object]:
    return {"jobs": [{"name": "red", "base": "base", "concepts": [RED], **job}]}


def test_a_job_takes_what_it_does_not_say_from_the_defaults(tmp_path: Path):
    defaults = {
        "base": "m/sd.safetensors",
        "train": {"steps": 7, "lora_rank": 2},
        "priority": 3,
        "generate": {"count": 4},
    }
    own = {"name": "red", "concepts": [RED, BLUE], "train": {"lora_rank": 4}, "generate": False, "cpus": 2}
    jobs = read(tmp_path, {"out": "results", "defaults": defaults, "jobs": [own, {"name": "b", "dataset": "d"}]})
    red, other = jobs.jobs
    assert jobs.out == tmp_path / "results"
    assert red.sections["train"] == {"steps": 7, "lora_rank": 4} and other.sections["train"]["lora_rank"] == 2
    assert list(red.sections) == ["extract", "fuse", "train", "export"]  # evaluate only where it stands
    assert list(other.sections) == ["train", "export", "generate"]  # what comes before a dataset is done
    assert (red.placement.cpus, red.placement.gpus, red.placement.priority, red.placement.retries) == (2, None, 3, 3)
    assert red.settings("train").steps == 7 and red.settings("fuse").size == 768
    assert other.inputs("generate") == {"count": 4}


def test_paths_are_relative_to_the_file(tmp_path: Path):
    fuse = {"backgrounds": "scenes", "prior": [{"noun": "ball", "folder": "balls"}]}
    train = {"check_encoder": "dino", "check_sam": "sam.pth"}
    job = read(tmp_path, one(concepts=[RED, BLUE], fuse=fuse, extract={"sam": "sam.pth"}, train=train)).jobs[0]
    assert job.base == {"base": str(tmp_path / "base")}
    assert job.concepts[0]["photos"] == str(tmp_path / "photos/red") and job.concepts[1]["subjects"] == "/cut/blue"
    assert job.sections["fuse"]["backgrounds"] == str(tmp_path / "scenes")
    assert job.sections["fuse"]["prior"] == [["ball", str(tmp_path / "balls")]]
    assert job.sections["extract"] == {"sam": str(tmp_path / "sam.pth")}
    assert job.inputs("train") == {k: str(tmp_path / v) for k, v in train.items()}


def test_a_matrix_makes_a_job_of_every_combination(tmp_path: Path):
    matrix = {"train.lora_rank": [2, 4], "base": ["a/v1.safetensors", "a/v2.safetensors"]}
    jobs = read(tmp_path, one(train={"steps": 3}, matrix=matrix)).jobs
    assert [job.name for job in jobs] == [
        f"red-lora_rank={rank}-base={base}" for rank in (2, 4) for base in ("v1", "v2")
    ]
    assert [job.sections["train"] for job in jobs] == [{"steps": 3, "lora_rank": r} for r in (2, 2, 4, 4)]
    assert [Path(job.base["base"]).name for job in jobs] == ["v1.safetensors", "v2.safetensors"] * 2


def test_keys_without_a_value_give_nothing(tmp_path: Path):
    (job,) = read(tmp_path, one(concepts=[{**BLUE, "photos": None, "box": ""}])).jobs
    assert job.concepts == (BLUE,)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"job": []}, "job: unknown; did you mean 'jobs'?"),
        ({"jobs": []}, "jobs: expected a list of jobs"),
        ({"jobs": {"red": {}}}, "jobs: expected a list of jobs"),
        (one(name="../red"), "jobs, entry 1: name: '../red' is no name"),
        (one(trian={}), "red.trian: unknown; did you mean 'train'?"),
        (one(train={"stepz": 3}), "red.train: stepz: unknown setting in 'train'; did you mean 'steps'?"),
        (one(train={"steps": 0}), "red.train: steps: 0 is out of range"),
        (one(train=5), "red.train: expected a mapping"),
        (one(train=False), "red.train: expected a mapping"),
        (one(train={"out": "x"}), "red.train.out: is filled in by the fleet"),
        (one(generate={"count": "two"}), "red.generate: count: expected a whole number"),
        (one(gpus=2), "red: gpus: 2.0 is out of range"),
        (one(base=None), "red.base: is needed"),
        (one(concepts=[]), "red: concepts, dataset: neither is given"),
        (one(dataset="d"), "red: concepts, dataset: both are given"),
        (one(concepts=[{"token": "<a-b>", "photos": "p"}]), "red.concepts, entry 1: noun: is needed"),
        (one(concepts=[{**RED, "noun": ""}]), "red.concepts, entry 1: noun: is needed"),
        (one(concepts=[{**RED, "subjects": "s"}]), "red.concepts, entry 1: photos: is needed"),
        (one(concepts=[{**RED, "photo": "s"}]), "red.concepts, entry 1: photo: unknown; did you mean 'photos'?"),
        (one(fuse={"prior": ["ball"]}), "red.fuse.prior: expected a list of {noun: …, folder: …}"),
        (one(evaluate={"sam": "s"}), "red.evaluate.encoder: is needed"),
        (one(evaluate={"sam": "s", "encoder": "e"}, generate=False), "red.generate: is needed by evaluate"),
        (one(matrix={"lora_rank": [1]}), "red.matrix: lora_rank: expected base or STEP.setting"),
        (one(matrix={"train.steps": 4}), "red.matrix: train.steps: expected a list of values"),
        (one(matrix={"train.steps": [4, 0]}), "red-steps=0.train: steps: 0 is out of range"),
        (one(matrix={"train.steps": [*range(101)], "train.lora_rank": [*range(100)]}), "10100 combinations"),
        ({"jobs": [*one()["jobs"], *one(name="Red")["jobs"]]}, "the name 'Red' is taken"),
        (one(name="shared"), "the name 'shared' is taken"),
        ("jobs: [", "is not valid YAML"),
        ("jobs: [{name: red, base: 2026-01-01}]", "put dates in quotes"),
        ("jobs: &a [*a]", "holds what is no text"),
    ],
)
def test_a_slip_is_named_with_its_file_and_field(tmp_path: Path, values: object, words: str):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, values)
    assert words in str(error.value) and "jobs.yaml" in str(error.value)


def test_jobs_that_need_the_same_regularization_images_share_them(tmp_path: Path):
    def job(name: str, **more: object) -> dict[str, object]:
        return {"name": name, "base": "base", "concepts": [RED], **more}

    jobs = read(
        tmp_path,
        {
            "jobs": [
                job("a", train={"num_class_images": 8}),
                job("b", train={"lora_rank": 2}),  # draws 50 of the same
                job("c", train={"train_seed": 1}),  # others: the seed is theirs, too
                job("d", train={"prior_batch_size": 0}),
                job("e", fuse={"prior": [["ball", "balls"]]}),
                job("f", base="another"),
                job("g", concepts=[{**RED, "noun": "cup"}]),
                {"name": "h", "base": "base", "dataset": "d"},
            ]
        },
    ).jobs
    shared = shared_pictures(list(jobs))
    assert [name for name, wanted in shared.items() if wanted] == ["a", "b"]
    assert shared["a"] == shared["b"] and (shared["a"][0].noun, shared["a"][0].count) == ("ball", 50)
