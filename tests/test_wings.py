"""The layout of the code: which wing may import which, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("utils", "data", "models", "training", "evaluation", "mini", "cli")  # each may import those before it
LONGEST = 400  # lines


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports, at its top or inside a function, as the parts of its name."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*name, alias.name) for alias in node.names)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_those_below_it(wing: str):
    above = WINGS[WINGS.index(wing) + 1 :]
    files = modules(f"far_train/{wing}")
    assert files
    for path in files:
        for name in imported(path):
            assert not (name[0] == "far_train" and len(name) > 1 and name[1] in above), f"{path}: {'.'.join(name)}"


def test_the_library_knows_neither_its_benchmarks_nor_the_host():
    for path in modules("far_train"):
        for name in imported(path):
            assert name[0] not in ("benchmarks", "nodes", "comfy", "comfy_api", "folder_paths"), path


def test_every_module_of_the_library_stands_in_a_wing():
    assert {p.name for p in (ROOT / "far_train").glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {p.parent.name for p in (ROOT / "far_train").glob("*/__init__.py")} == set(WINGS)


def test_only_the_host_modules_touch_comfyui():
    """`comfy_api` is the public interface of nodes; everything else of the host's may change."""
    for path in modules("nodes"):
        if not path.name.startswith("host"):
            for name in imported(path):
                assert name[0] not in ("comfy", "folder_paths", "execution", "server"), path


def test_no_file_is_too_long():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in listed.stdout.split()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


# Modules that scanners flag, and the files that may import them; SECURITY.md gives the reasons.
FLAGGED = {
    "http": {"comfy_client.py", "comfy_progress.py"},
    "urllib": {"comfy_client.py", "comfy_progress.py"},
    "socket": {"comfy_progress.py"},
    "ssl": {"comfy_progress.py"},
    "base64": {"comfy_progress.py", "sheets.py"},
    "subprocess": set(),
    "pickle": set(),
    "marshal": set(),
    "ctypes": set(),
    "requests": set(),
    "ray": {"fleet_ray.py"},
}


def test_what_scanners_flag_is_where_the_security_page_says():
    found = {name: set() for name in FLAGGED}
    for path in [ROOT / "__init__.py", *modules("nodes"), *modules("far_train")]:
        for name in imported(path):
            if name[0] in found:
                found[name[0]].add(path.name)
    assert found == FLAGGED
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page and all(file in page for file in files) for name, files in FLAGGED.items() if files)
