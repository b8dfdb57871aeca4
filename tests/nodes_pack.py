"""The pack's host-free modules, imported without ComfyUI: only the `__init__` of `nodes/` asks for it."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[1]


def pack_module(name: str) -> ModuleType:
    """A module such as "nodes.pictures". The pack has a far_train of its own, as in the host."""
    for package, folder in (("far_pack", REPO), ("far_pack.nodes", REPO / "nodes")):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"far_pack.{name}")
