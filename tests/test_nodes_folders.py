"""The pack's model folders: made beside the host's own when the pack loads, known to the host in any case."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from .nodes_pack import pack_module


@pytest.fixture
def folders(tmp_path, monkeypatch) -> ModuleType:
    """nodes.host_folders on a host whose models folder isn't there yet, and where another pack knows models/sams."""
    known: dict[str, tuple[list[str], set[str]]] = {"sams": (["/elsewhere"], {".onnx"})}

    def add(kind: str, path: str) -> None:
        known.setdefault(kind, ([], set()))[0].append(path)

    host = SimpleNamespace(models_dir=str(tmp_path / "models"), folder_names_and_paths=known, add_model_folder_path=add)
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    monkeypatch.delitem(sys.modules, "far_pack.nodes.host_folders", raising=False)
    module = pack_module("nodes.host_folders")
    monkeypatch.delitem(sys.modules, "far_pack.nodes.host_folders")  # other tests need the real host's, or none
    return module


def registered(folders: ModuleType) -> dict[str, tuple[list[str], set[str]]]:
    folders.register_model_folders()
    return folders.folder_paths.folder_names_and_paths


def test_the_folders_are_made_and_registered(folders, tmp_path):
    known = registered(folders)
    assert (tmp_path / "models" / "far").is_dir() and (tmp_path / "models" / "sams").is_dir()
    assert known["far"] == ([str(tmp_path / "models" / "far")], {".safetensors"})
    assert known["sams"] == (
        ["/elsewhere", str(tmp_path / "models" / "sams")],
        {".onnx", ".pth", ".pt", ".safetensors"},
    )
    (tmp_path / "models" / "far" / "dogs.safetensors").touch()
    registered(folders)  # a second load leaves what is there
    assert (tmp_path / "models" / "far" / "dogs.safetensors").exists()


def test_folders_that_cannot_be_made_are_registered_all_the_same(folders, tmp_path):
    Path(tmp_path / "models").touch()  # a file: what can't be written, for root, too
    assert registered(folders).keys() == {"far", "sams"}
    assert (tmp_path / "models").is_file()


def test_the_hosts_datasets_folders_if_it_has_some(folders, tmp_path):
    host = folders.folder_paths
    host.get_folder_paths = lambda kind: host.folder_names_and_paths[kind][0]
    assert folders.dataset_roots() == []  # before ComfyUI 0.33
    host.folder_names_and_paths["datasets"] = ([str(tmp_path / "datasets"), "/elsewhere"], set())
    assert folders.dataset_roots() == [tmp_path / "datasets", Path("/elsewhere")]


def test_subfolders_of_the_input_folder_are_found_without_asking_of_every_file(folders, tmp_path, monkeypatch):
    for name in ("dogs/corgi/old", ".hidden/dogs", "cats", "dogs/.cache/x", "elsewhere"):
        (tmp_path / "input" / name).mkdir(parents=True)
    (tmp_path / "input" / "dogs" / "1.png").touch()
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "input" / "dogs", target_is_directory=True)
    folders.folder_paths.get_input_directory = lambda: str(tmp_path / "input")
    asked: list[Path] = []
    monkeypatch.setattr(Path, "is_dir", lambda self, **_: asked.append(self))
    monkeypatch.setattr(Path, "stat", lambda self, **_: asked.append(self))
    assert folders.input_subfolders() == ["cats", "dogs", "dogs/corgi", "dogs/corgi/old", "elsewhere", "linked"]
    assert asked == []
