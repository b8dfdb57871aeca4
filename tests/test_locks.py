"""Two processes never write into one run or one dataset at the same time."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from far_train.data.dataset import write_dataset
from far_train.training.recipe import TrainingRun
from far_train.training.run_folder import LOCK_FILE
from far_train.training.settings import TrainConfig
from far_train.utils.errors import OutputError
from far_train.utils.locks import locked

QUICK = TrainConfig(steps=2, sample_every=0, device="cpu")
HOLD = (
    "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
)


def held_elsewhere(path: Path) -> subprocess.Popen:
    """A process that holds a lock until it is killed."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    return holder


def test_a_run_that_another_process_trains(base, fusion, tmp_path: Path):
    folder = tmp_path / "run"
    with TrainingRun(base, fusion, QUICK, folder) as run:
        run.train_step()
        run.save_checkpoint()
    assert not (folder / LOCK_FILE).exists()
    holder = held_elsewhere(folder / LOCK_FILE)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="run: another process is training this run; wait for it"):
        TrainingRun(base, fusion, QUICK, folder, resume=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    holder.kill()  # which frees the lock, although its file stays
    holder.communicate()
    with TrainingRun(base, fusion, QUICK, folder, resume=True) as run:
        assert run.state.step == 1


def test_a_dataset_that_another_process_writes(fusion, tmp_path: Path):
    holder = held_elsewhere(tmp_path / "dogs.lock")
    theirs = tmp_path / "dogs.unfinished" / "composites" / "0000.png"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with pytest.raises(OutputError, match="dogs: another process is writing this dataset"):
        write_dataset(fusion, tmp_path / "dogs")
    assert theirs.exists() and not (tmp_path / "dogs").exists()
    holder.kill()
    holder.communicate()
    write_dataset(fusion, tmp_path / "dogs")
    assert [path.name for path in tmp_path.iterdir()] == ["dogs"]


def test_where_there_are_no_locks_the_work_goes_on(tmp_path: Path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "x.lock", "busy"):
        pass
    assert "x.lock: can't be locked ([Errno 37] No locks available)" in caplog.text
