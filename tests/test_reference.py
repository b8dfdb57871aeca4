"""The pages that are made from the code: every command, flag and setting stands there, as it is now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from far_train.cli.main import PROGRAM

ROOT = Path(__file__).parents[1]

specification = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
reference = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reference)


@pytest.mark.parametrize("path", reference.pages(), ids=lambda path: path.name)
def test_a_reference_page_is_up_to_date(path: Path):
    committed = path.read_text(encoding="utf-8") if path.exists() else ""
    assert committed == reference.pages()[path], f"{path.name} is out of date; run: python scripts/reference.py"


def test_every_setting_and_flag_stands_in_its_page():
    settings, commands = reference.settings_page(), reference.cli_page()
    for command in PROGRAM.commands:
        assert f"\n## {command.name}\n" in commands
        for argument in command.arguments:
            assert f"| `{argument.flag}" in commands, argument.name
        for field in command.flags_of_settings:
            assert f"`{reference.flag_of(field.name)}`" in commands and f"| `{field.name}`" in settings
