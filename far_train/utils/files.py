"""Writing files so that a reader never sees half of one, and reading those that strangers made."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from .errors import BaseModelError, OutputError, UnreadableFile

if TYPE_CHECKING:  # what only writes texts and pictures, such as `queue`, begins without torch
    from torch import Tensor, nn

MAX_HEADER = 16 * 2**20  # bytes of a safetensors file's header; that of a whole Stable Diffusion is below a megabyte
SPARE_BYTES = 16 * 2**20  # of free space that a write leaves to everybody else
UMASK = os.umask(0)  # it can only be read by setting it, so this is done once and before there are other threads
os.umask(UMASK)
# Windows takes these for devices, whatever the suffix; compare in lower case.
RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(
            f"{path}: can't make this folder ({e.strerror or e}); choose one that you may write to"
        ) from e
    return path


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something, or can't be read. Raises OutputError."""
    try:
        taken = folder.exists() and any(folder.iterdir())
    except NotADirectoryError as e:
        raise OutputError(f"{folder}: is a file; choose another folder") from e
    except OSError as e:
        raise OutputError(f"{folder}: can't be read ({e.strerror or e}); choose another folder") from e
    if taken:
        raise OutputError(f"{folder}: is not empty; choose another folder or delete it")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced to disk and takes the name, else it vanishes. So
    it does where the very same bytes are there already: a file that doesn't change keeps its times.

    Raises OutputError where the folder or the file can't be written.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=f".part{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if path.is_file() and filecmp.cmp(temporary, path, shallow=False):
            return
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise OutputError(
            f"{path}: can't write this file ({e.strerror or e}); free space or choose another place"
        ) from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content; ``metadata`` holds plain strings."""
    from safetensors.torch import save_file

    check_space(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    with replacing(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
            _sort_metadata(temporary)
        except OSError:
            raise
        except Exception as e:  # safetensors reports a full disk as an error type of its own
            raise OutputError(f"{path}: can't write this file ({e}); free space or choose another place") from e


def _sort_metadata(path: Path) -> None:
    """Bring a safetensors file's metadata into order, which the library leaves to chance. Its length stays."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        if len(text) > length:  # the library's own form is as short
            raise OSError(f"its header can't be put in order ({len(text)} bytes for {length})")
        file.seek(8)
        file.write(text.ljust(length))


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had not finished to write, in ``folder`` and below: ours, and safetensors' own."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.part(\.\w+)?|\.[0-9a-f]{32}\.tmp|\.tmp\w{6}", path.name):
            path.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk can't hold: ``needed`` bytes below ``folder``, which may not exist yet.

    Raises OutputError.
    """
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    try:
        free = shutil.disk_usage(place).free if place else None
    except OSError:  # some network drives don't tell; then the write itself will
        return
    if free is not None and free < needed + SPARE_BYTES:
        raise OutputError(
            f"{folder}: {needed / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB of the disk are free; free space "
            "or choose another place"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises UnreadableFile, which says why but not which file, for callers to add.
    """
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UnreadableFile(f"it claims a header of {header} bytes, more than any model needs")
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except UnreadableFile:
        raise
    except Exception as e:  # damaged headers, and dtypes that torch lacks, raise almost anything
        raise UnreadableFile(str(e) or type(e).__name__) from e


def parse_json(text: str) -> Any:
    """JSON of unknown origin. Raises ValueError, also for what is nested too deeply or holds too long a number."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that can't open a folder (Windows) do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a module's weights, read from ``path``, in fp32. Raises BaseModelError if they are of another model."""
    try:
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as e:
        raise BaseModelError(f"{path}: these weights are of another model ({str(e)[:200]})") from e
