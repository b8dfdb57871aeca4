"""The nodes' help pages: one for each, with every input, a picture, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = REPOSITORY / "web" / "docs"
NODES = json.loads((REPOSITORY / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))  # as the schemas are


def test_there_is_a_page_for_each_node_and_none_for_others():
    assert {path.stem for path in PAGES.glob("*.md")} == NODES.keys()


@pytest.mark.parametrize("node", NODES)
def test_a_page_tells_every_input(node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    assert len(page.split("\n\n")[0]) > 80, "the first paragraph says what the node does"
    table = re.search(r"^\| input \| what \|\n\| --- \| --- \|\n((?:\|.*\n)*)", page, re.M)
    rows = table[1].splitlines() if table else []
    told = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1])}
    assert told == NODES[node].get("inputs", {}).keys()
    assert "**Pitfall" in page


@pytest.mark.parametrize("node", NODES)
def test_tables_have_two_columns_at_most(node):
    """The front end's info panel is 240 px wide, and cuts off a third."""
    rows = [line for line in (PAGES / f"{node}.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), rows


@pytest.mark.parametrize("node", NODES)
def test_a_pages_picture_is_there(node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", page)
    for caption, name in pictures:
        assert caption and (PAGES / name).stat().st_size < 60_000
    assert {p.name for p in PAGES.glob("*.jpg") if p.stem == node} <= {name for _, name in pictures}
