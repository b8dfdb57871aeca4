"""The host-free modules of `nodes/`, imported without ComfyUI: only the package's own `__init__` asks for it."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[1]


def node_module(name: str) -> ModuleType:
    """`nodes/NAME.py` as a module of the pack, whose relative imports lead to a far_train of its own."""
    for package, folder in (("far_pack", REPO), ("far_pack.nodes", REPO / "nodes")):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"far_pack.nodes.{name}")
