"""The nodes' names and tooltips in other languages, as files: the same keys everywhere, readable by the front end."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LANGUAGES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())

specification = importlib.util.spec_from_file_location("locales", REPOSITORY / "scripts" / "locales.py")
locales = importlib.util.module_from_spec(specification)
specification.loader.exec_module(locales)


def texts(language: str) -> dict[tuple[str, ...], str]:
    return dict(locales.texts(locales.read(language)))


def test_english_and_chinese_are_there():
    assert {"en", "zh"} <= set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_keys_are_the_same_everywhere(language):
    assert texts(language).keys() == texts("en").keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_front_ends_message_format(language):
    """Outside of {'…'}, the characters { } @ | have a meaning: the message would be broken or cut."""
    for path, text in texts(language).items():
        assert text and not re.search(r"[{}@|]", re.sub(r"\{'[{}@|]'\}", "", text)), path


def test_chinese_is_translated_and_keeps_numbers_and_tokens():
    english = texts("en")
    for path, text in texts("zh").items():
        same = {"CLIP", "VAE", "LoRA", "Min-SNR γ"}
        assert re.search(r"[\u4e00-\u9fff]", text) or text in same, path
        for kept in re.findall(r"<[a-z-]+>|\d+(?:\.\d+)?|(?:models|output)/\w+", english[path]):
            assert kept in text, (path, kept)


def test_merging_keeps_adds_and_drops():
    english = {"A": {"display_name": "a", "inputs": {"x": {"name": "x"}}}, "B": {"display_name": "b"}}
    other = {"A": {"display_name": "甲", "inputs": {"y": {"name": "y"}}}, "C": {"display_name": "丙"}}
    expected = {"A": {"display_name": "甲", "inputs": {"x": {"name": "x"}}}, "B": {"display_name": "b"}}
    assert locales.merged(english, other) == expected
    assert json.loads(json.dumps(locales.escaped("{a|b}@c"))) == "{'{'}a{'|'}b{'}'}{'@'}c"
