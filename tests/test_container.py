"""The Dockerfile, as far as it can be checked without building it: it says what the project says elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_it_takes_the_newest_comfyui_that_is_tested():
    page = (ROOT / "docs" / "reference" / "compatibility.md").read_text(encoding="utf-8")
    newest = re.search(r"^\| ComfyUI \| \S+ \| (\S+) \|", page, re.M)[1]
    assert f"ARG COMFYUI_VERSION=v{newest}\n" in DOCKERFILE


def test_it_installs_the_ray_that_the_project_names():
    needed = re.search(r"^fleet = \[(.+?)\]  #", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert f"-r requirements.txt {needed}\n" in DOCKERFILE


def test_the_build_sees_what_it_copies_and_the_pack_needs():
    ignored = [line.rstrip("/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()]
    needed = {"__init__.py", "nodes", "far_train", "web", "locales", "workflows", "requirements.txt", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in needed) and not needed & set(ignored)


def test_its_page_names_its_arguments_and_their_defaults():
    page = (ROOT / "docs" / "how-to" / "docker.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", page, re.M))
    assert told == dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.M))
