"""A job of a fleet without the fleet: its steps, how it goes on, how it fails; the table and the page. Without Ray."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from far_train.cli import fleet_page, fleet_ray, training
from far_train.cli.fleet import LOCK_FILE
from far_train.cli.fleet_jobs import read_jobs
from far_train.cli.fleet_ray import Fleet
from far_train.cli.fleet_steps import is_done, read_state, run_job
from far_train.cli.fleet_table import Table, last_metrics
from far_train.cli.main import main
from far_train.data.dataset import DatasetFolder
from far_train.mini import shipped
from far_train.utils.locks import locked

from .command_line import refused
from .fleets import check_equal, subject, work_of, write_jobs, write_photos
from .tiny_encoders import write_encoder

SAM = Path(shipped.__file__).parent / "weights" / "sam" / "sam.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path, tiny_folder: Path) -> Path:
    """A job file whose job 'red' has been done from photos to scores."""
    encoder = write_encoder(place / "encoder", "dinov2")
    steps = {"generate": {"sampling_steps": 1}, "evaluate": {"sam": str(SAM), "encoder": str(encoder)}}
    path = write_jobs(place / "whole.json", tiny_folder, [subject("red", place, **steps)])
    (job,) = read_jobs(path).jobs
    assert run_job(work_of(job, place / "fleet"))["error"] == ""
    return path


def test_a_job_goes_from_photos_to_scores(whole: Path, place: Path, tiny_folder: Path):
    state, folder = read_state(place / "fleet" / "red"), place / "fleet" / "red"
    assert state["state"] == "done" and state["attempts"] == 1
    assert list(state["steps"]) == ["extract 1", "fuse", "train", "export", "generate", "evaluate"]
    assert (folder / "export" / "loras" / "red.safetensors").exists()
    scores = json.loads((folder / "pictures.scores.json").read_text())
    assert scores["pictures"] == 1 and scores["concepts"].keys() == {"<red-ball>"}
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in read_jobs(whole).jobs[0].sections["train"].items()]
    inputs = ["--base", str(tiny_folder), "--dataset", str(folder / "dataset"), "--out", str(place / "by-hand" / "run")]
    assert main(["train", *inputs, "--device=cpu", *settings]) == 0
    check_equal(folder, place / "by-hand", 4)


def test_what_is_done_is_not_done_again_and_never_with_other_settings(whole: Path, place: Path):
    (job,) = read_jobs(whole).jobs
    folder = place / "fleet" / "red"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.startswith("job.")}
    assert is_done(work_of(job, place / "fleet"))
    state = run_job(work_of(job, place / "fleet"))
    assert state["state"] == "done" and state["attempts"] == 2
    job.sections["train"]["steps"] = 5
    assert not is_done(work_of(job, place / "fleet"))
    state = run_job(work_of(job, place / "fleet"))
    assert state["state"] == "failed" and "train: was done with other settings (steps: 4 then, 5 now)" in state["error"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_stopped_training_goes_on_to_the_same_bits(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    asked = 0

    @contextmanager
    def stop_at_the_fourth_step():
        def should_stop() -> bool:
            nonlocal asked
            asked += (place / "stopped" / "red" / "run" / "metrics.jsonl").exists()
            return asked > 3

        yield should_stop

    (job,) = read_jobs(whole).jobs
    for step in ("export", "generate", "evaluate"):
        del job.sections[step]
    work = work_of(job, place / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_on_interrupt", stop_at_the_fourth_step)
        state = run_job(work)
    assert (state["state"], state["step"], state["error"]) == ("stopped", "train", "")
    assert (work.folder / "run" / "checkpoints" / "checkpoint-00000003.safetensors").exists()
    assert run_job(work)["state"] == "done"
    check_equal(work.folder, place / "fleet" / "red", 4)


def test_what_a_killed_step_left_is_made_anew(whole: Path, place: Path):
    """Killed after the dataset got its name, and before the step was noted as done."""
    (job,) = read_jobs(whole).jobs
    del job.sections["train"], job.sections["export"], job.sections["generate"], job.sections["evaluate"]
    work = work_of(job, place / "killed")
    run_job(work)
    state = read_state(work.folder)
    state["steps"]["fuse"]["done"] = False
    (work.folder / "job.json").write_text(json.dumps({**state, "state": "running"}))
    (work.folder / "dataset" / "dataset.json").write_text("cut off")
    assert run_job(work)["state"] == "done"
    assert DatasetFolder(work.folder / "dataset").composite_count() == 2


def test_a_job_fails_by_its_input_with_the_file_in_its_error(place: Path, tiny_folder: Path):
    path = write_jobs(place / "bad.json", tiny_folder, [subject("bad", place)])
    (job,) = read_jobs(path).jobs
    state = run_job(work_of(job, place / "failed"))
    assert state == read_state(place / "failed" / "bad")
    assert (state["state"], state["step"]) == ("failed", "extract 1") and "bad/0.png: is not a PNG" in state["error"]
    assert "bad/0.png: is not a PNG" in (place / "failed" / "bad" / "job.log").read_text()


def test_the_page_shows_every_job(whole: Path, place: Path, tiny_folder: Path):
    path = write_jobs(place / "both.json", tiny_folder, [subject("red", place), subject("blue", place)])
    text = fleet_page.write_page(read_jobs(path).jobs, place / "fleet").read_text()
    assert "<h2>blue: not begun</h2>" in text
    for picture in ("curves.png", "pictures.grid.jpg", "pictures.verdicts.jpg"):
        assert text.count(f"<figcaption>{picture}") == 1
    scores = json.loads((place / "fleet" / "red" / "pictures.scores.json").read_text())
    assert f"<td>{scores['score']:.3f}</td>" in text


def test_the_table_tells_each_step_once_and_how_a_job_ended(tmp_path: Path, tiny_folder: Path):
    jobs = read_jobs(write_jobs(tmp_path / "jobs.json", tiny_folder, [subject("red", tmp_path)])).jobs
    said = io.StringIO()
    table = Table(jobs, tmp_path, said)
    state = {"state": "running", "step": "train", "machine": "m1", "attempts": 1, "steps": {"fuse": {"seconds": 2.5}}}
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "job.json").write_text(json.dumps(state))
    for _ in range(2):
        table._next = 0
        table.refresh()
    table.ended("red", {**state, "state": "failed", "error": "why"})
    table.refresh()
    assert said.getvalue() == "red: train on m1\nred: failed, 2 s: why\n"


def test_the_last_metrics_are_those_of_the_last_whole_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) == {}
    path.write_text("x" * 5000 + '\n{"step": 7}\n{"step": ')
    assert last_metrics(path) == {"step": 7}


class FakeRay:
    """A Ray that has no GPUs and runs nothing."""

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 2.0}

    @staticmethod
    def remote(**_: object) -> Callable:
        return lambda function: function


def test_a_job_that_could_not_begin_says_why_in_its_folder(tmp_path: Path, tiny_folder: Path):
    jobs = read_jobs(write_jobs(tmp_path / "jobs.json", tiny_folder, [subject("red", tmp_path)]))
    fleet = Fleet(FakeRay, jobs, Table(jobs.jobs, jobs.out, io.StringIO()), may_grow=False)
    fleet._close(fleet.jobs[0], "stopped", "")
    assert not (jobs.out / "red").exists()
    fleet._close(fleet.jobs[0], "failed", "its environment can't be made")
    assert read_state(jobs.out / "red") == {"state": "failed", "error": "its environment can't be made"}


def test_jobs_that_would_wait_for_a_gpu_are_told_that_they_do_not(tmp_path: Path, tiny_folder: Path):
    path = write_jobs(tmp_path / "jobs.json", tiny_folder, [subject("red", tmp_path, gpus=None)])
    said = io.StringIO()
    jobs = read_jobs(path)
    Fleet(FakeRay, jobs, Table(jobs.jobs, jobs.out, said), may_grow=False)
    assert said.getvalue() == ""
    Fleet(FakeRay, jobs, Table(jobs.jobs, jobs.out, said), may_grow=True)
    assert "run on the CPU; gpus: 1 waits for one" in said.getvalue()


def test_a_second_fleet_in_the_same_folder_is_refused(place: Path, tiny_folder: Path, monkeypatch, capsys):
    monkeypatch.setattr(fleet_ray, "import_ray", lambda: FakeRay)
    path = write_jobs(place / "twice.json", tiny_folder, [subject("blue", place)])
    out = read_jobs(path).out
    out.mkdir(exist_ok=True)
    with locked(out / LOCK_FILE, "busy"):
        refused(capsys, ["fleet", path, "--resume"], "another fleet works in", str(out))


def test_a_fleet_without_ray_says_how_to_get_it(place: Path, tiny_folder: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_jobs(place / "without.json", tiny_folder, [subject("blue", place)])
    refused(capsys, ["fleet", path], "needs Ray", "pip install")
    (place / "fleet" / "blue").mkdir(parents=True, exist_ok=True)
    refused(capsys, ["fleet", path], "holds blue already", "--resume")
