"""The two lists of what the project needs: of a clone in ComfyUI, and of the installed package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_both_lists_name_the_same():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    package = re.findall(r'"(.+?)"', re.search(r"^dependencies = \[\n(.*?)^\]", project, re.M | re.S)[1])
    assert len(package) > 10
    assert sorted(package) == sorted(line for line in lines if line and not line.startswith("#"))
