"""Writing dataset folders: complete or not at all, and never over anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from far_train.data.dataset import write_dataset
from far_train.data.fusion import ConceptFusion
from far_train.utils.errors import OutputError

from .cats import SIZE, fuse_cats
from .command_line import files


@pytest.fixture(scope="module")
def fused() -> ConceptFusion:
    return fuse_cats()


def test_progress_is_told(fused, tmp_path):
    told = []
    write_dataset(fused, tmp_path / "cats", on_progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 8) for i in range(9)]


@pytest.mark.parametrize("step", [0, 3, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(fused, tmp_path, step, error):
    def stop(done: int, total: int) -> None:
        if done == step:
            raise error

    with pytest.raises(error):
        write_dataset(fused, tmp_path / "cats", on_progress=stop)
    assert files(tmp_path) == set()


def test_what_a_killed_process_left_does_not_get_in(fused, tmp_path):
    stale = tmp_path / "cats.unfinished" / "priors"
    stale.mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(stale / "0007.png")
    assert write_dataset(fused, tmp_path / "cats").prior_count() == 2
    assert not (tmp_path / "cats.unfinished").exists()


def test_only_empty_folders_are_written_to(fused, tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    write_dataset(fused, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(OutputError, match="cats: is not empty"):
        write_dataset(fused, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before and files(tmp_path) >= {"cats"}


def test_places_that_can_not_be_written_are_named(fused, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "cats", file / "deep" / "cats"):
        with pytest.raises(OutputError, match=str(folder)):
            write_dataset(fused, folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the current folder"):
        write_dataset(fused, Path("."))
    assert files(tmp_path) == {"file"} and file.read_text() == "mine"


def test_a_full_disk_leaves_nothing(fused, tmp_path, monkeypatch):
    real, count = os.replace, []

    def full(source, target):
        count.append(target)
        if len(count) > 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_dataset(fused, tmp_path / "cats")
    monkeypatch.undo()
    assert files(tmp_path) == set()
