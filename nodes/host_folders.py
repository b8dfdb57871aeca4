"""The host's folders: input, output, and the folders of its models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import folder_paths

# What the pack reads from models/NAME. Other packs may have registered the same folders: theirs and ours are united.
MODEL_FOLDERS = {"far": {".safetensors"}, "sams": {".pth", ".pt", ".safetensors"}}


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def input_subfolders() -> list[str]:
    """Folders below the input folder, relative, with forward slashes; hidden ones left out."""
    root = input_folder()
    found = []
    for folder, inside, _files in os.walk(root):  # for each node that the host lists: it must not ask of every file
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in inside]
    return sorted(found)


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def dataset_roots() -> list[Path]:
    """The host's folders for training sets; none before ComfyUI 0.33, which made "datasets" a kind of model folder."""
    kind = "datasets"
    known = kind in folder_paths.folder_names_and_paths
    return [Path(root) for root in folder_paths.get_folder_paths(kind)] if known else []


def register_model_folders() -> None:
    """Make models/far and models/sams known, keeping what other packs registered under these names.

    The folders are made, too, so that people find where their files go; where that can't be, reading needs none.
    """
    for kind, extensions in MODEL_FOLDERS.items():
        folder = Path(folder_paths.models_dir) / kind
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(folder))
        paths, known = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = (paths, set(known) | extensions)


def model_files(kind: str) -> list[str]:
    """Names of the files in models/``kind`` that the host lists."""
    return folder_paths.get_filename_list(kind)


def model_path(kind: str, name: str) -> Path:
    """The file ``name`` of models/``kind``. Raises FileNotFoundError."""
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def model_subfolders(kind: str) -> list[Path]:
    """Folders right below models/``kind`` that hold a model in transformers' layout (config.json)."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind) if Path(root).is_dir()]
    return sorted(path.parent for root in roots for path in root.glob("*/config.json"))


def model_folder(kind: str) -> Path:
    """Where new files of models/``kind`` are written."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def files_fingerprint(paths: Sequence[Path]) -> str:
    """Changes when a file of these changes, comes or goes: a digest of paths, sizes and times.

    Both times count: a file that takes another one's place by renaming keeps its time of modification.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            continue
        digest.update(f"{path.as_posix()}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\0".encode())
    return digest.hexdigest()
