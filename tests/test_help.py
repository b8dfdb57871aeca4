"""The nodes' help pages, in English and in Chinese: every input, a picture, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = REPOSITORY / "web" / "docs"
NODES = json.loads((REPOSITORY / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))  # as the schemas are
ENGLISH = {node: PAGES / f"{node}.md" for node in NODES}
CHINESE = {node: PAGES / node / "zh.md" for node in NODES}  # where the front end looks before
EVERY = pytest.mark.parametrize(
    ("node", "path"), [*ENGLISH.items(), *CHINESE.items()], ids=lambda value: getattr(value, "stem", value)
)
PICTURE = re.compile(r"!\[(.+?)\]\((.+?)\)")
CODE, FIGURE = re.compile(r"`([^`]+)`"), re.compile(r"−?\d+(?:\.\d+)*")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def told(page: str) -> list[list[str]]:
    """The ids in each row of the table of inputs."""
    table = re.search(r"^\| (?:input|输入) \| .+ \|\n\| --- \| --- \|\n((?:\|.*\n)*)", page, re.M)
    rows = table[1].splitlines() if table else []
    return [re.findall(r"`([a-z0-9_]+)`", row.split("|")[1]) for row in rows]


def outline(page: str) -> list[str]:
    """How each paragraph begins, where it is no plain text: a table, a picture, a list or bold words."""
    return [paragraph[:2] if paragraph[0] in "|!*" else "" for paragraph in page.split("\n\n")]


def test_there_is_a_page_for_each_node_and_none_for_others():
    assert set(PAGES.rglob("*.md")) == {*ENGLISH.values(), *CHINESE.values()}


@EVERY
def test_a_page_tells_every_input(node: str, path: Path):
    page = read(path)
    assert len(page.split("\n\n")[0]) > (30 if path.stem == "zh" else 80), "the first paragraph says what the node does"
    assert {name for row in told(page) for name in row} == NODES[node].get("inputs", {}).keys()
    assert ("**注意**" if path.stem == "zh" else "**Pitfall") in page


@EVERY
def test_tables_have_two_columns_at_most(node: str, path: Path):
    """The front end's info panel is 240 px wide, and cuts off a third."""
    rows = [line for line in read(path).splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), rows


@pytest.mark.parametrize("node", NODES)
def test_a_pages_picture_is_there(node: str):
    pictures = PICTURE.findall(read(ENGLISH[node]))
    for caption, name in pictures:
        assert caption and (PAGES / name).stat().st_size < 60_000
    assert {p.name for p in PAGES.glob("*.jpg") if p.stem == node} <= {name for _, name in pictures}


@pytest.mark.parametrize("node", NODES)
def test_the_chinese_page_has_what_the_english_one_has(node: str):
    """Paragraphs, items, rows with their inputs, and pictures, in the same order."""
    english, chinese = read(ENGLISH[node]), read(CHINESE[node])
    assert outline(chinese) == outline(english)
    assert told(chinese) == told(english)
    assert len(re.findall(r"^(?:\||\* )", chinese, re.M)) == len(re.findall(r"^(?:\||\* )", english, re.M))
    # The front end looks for a page's pictures beside the English pages, in whatever language it is.
    assert [name for _, name in PICTURE.findall(chinese)] == [name for _, name in PICTURE.findall(english)]


@pytest.mark.parametrize("node", NODES)
def test_the_chinese_page_has_the_english_ones_figures_and_code(node: str):
    """So that a changed default or message is changed in both."""
    for english, chinese in zip(read(ENGLISH[node]).split("\n\n"), read(CHINESE[node]).split("\n\n"), strict=True):
        assert sorted(FIGURE.findall(chinese)) == sorted(FIGURE.findall(english))
        assert sorted(CODE.findall(chinese)) == sorted(" ".join(code.split()) for code in CODE.findall(english))


def test_chinese_pages_call_inputs_by_their_names_in_the_node():
    names = json.loads((REPOSITORY / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node, path in CHINESE.items():
        cells = " ".join(row.split("|")[1] for row in read(path).splitlines() if row.startswith("|"))
        for key, texts in names[node].get("inputs", {}).items():
            assert f"{texts['name']}（`{key}`）" in cells, (node, key)
