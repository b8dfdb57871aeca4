"""The repository, and the installed ComfyUI that the host tests run."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[2]
HOW_TO_GET_A_HOST = (
    "no ComfyUI found: clone it (git clone https://github.com/comfyanonymous/ComfyUI ~/comfy/ComfyUI), install its "
    "requirements into ~/comfy/venv, or set COMFYUI_PATH (and COMFYUI_PYTHON, the Python that runs it)"
)


class HostError(RuntimeError):
    """The host did not start, died, or did not answer in time; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Host:
    """An installed ComfyUI: its folder and the Python that runs it."""

    path: Path
    python: Path

    @property
    def version(self) -> str:
        """The release number, from the file that the host's release script writes; "unknown" for very old hosts."""
        file = self.path / "comfyui_version.py"
        found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
        return found.group(1) if found else "unknown"


def _is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def find_host() -> Path | None:
    """ComfyUI's folder: COMFYUI_PATH, else ~/comfy/ComfyUI, else the host in whose custom_nodes this repository lies.

    Raises HostError if COMFYUI_PATH is set but holds no ComfyUI: a typo must not turn into a silent skip.
    """
    configured = os.environ.get("COMFYUI_PATH")
    if configured:
        path = Path(configured).expanduser().resolve()
        if not _is_host(path):
            raise HostError(f"COMFYUI_PATH={configured} holds no ComfyUI (main.py and comfy/ are missing)")
        return path
    candidates = [Path.home() / "comfy" / "ComfyUI"]
    if REPO.parent.name == "custom_nodes":
        candidates.append(REPO.parent.parent)
    return next((path for path in candidates if _is_host(path)), None)


def find_python(host: Path) -> Path:
    """The Python that runs `host`: COMFYUI_PYTHON, else a venv beside or inside the host, else this interpreter."""
    configured = os.environ.get("COMFYUI_PYTHON")
    if configured:
        return Path(configured).expanduser()
    inside = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    for venv in (host.parent / "venv", host / "venv", host / ".venv"):
        if (venv / inside).is_file():
            return venv / inside
    return Path(sys.executable)


def script(name: str) -> ModuleType:
    """One of the repository's scripts as a module. Scripts import each other by name."""
    folder = str(REPO / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
