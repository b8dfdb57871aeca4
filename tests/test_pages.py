"""What the pages promise exists: their links lead somewhere, and the commands that they show are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.small_models import learn
from benchmarks.speed import __main__ as speed
from far_train.cli.main import PROGRAM as FAR_TRAIN

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/reports/*/*.md")])
LEARN = "python -m benchmarks.small_models.learn"
FAR = "python -m far_train"
PROGRAMS = {program.name: program for program in (FAR_TRAIN, quality.PROGRAM, speed.PROGRAM)}
PROGRAM = r"python -m (far_train|benchmarks\.)"
ALIASES = {"far": FAR, "learn": f"{LEARN}"}


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, each whole and without its comment, aliases written out."""
    lines: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split("; "):
                words = part.strip().split(" ", 1)
                lines.append(" ".join([ALIASES.get(words[0], words[0]), *words[1:]]))
    return [line for line in lines if re.search(PROGRAM, line) and '"$@"' not in line]


def is_archived(page: Path) -> bool:
    """A report tells what was run at its time, with the flags of that time."""
    return "reports" in page.parts


SHOWN = [(page, line) for page in PAGES if not is_archived(page) for line in commands(page)]


def test_there_are_commands_to_check():
    assert len(SHOWN) >= 30 and {"README.md", "protocol.md"} <= {page.name for page, _ in SHOWN}


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=lambda v: v.name if isinstance(v, Path) else v[:60])
def test_a_command_is_understood(page: Path, line: str):
    words = shlex.split(line[re.search(PROGRAM, line).start() :])
    start = words.index("-m") + 1
    if words[start] == "benchmarks.small_models.learn":
        learn._parser().parse_args([*words[start + 1 :], "--out", "anywhere"])
    elif words[start + 1 :] != ["--help"]:
        PROGRAMS[words[start]].parse(words[start + 1 :])


# ---- links


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    if not re.match(r"https?:", link)
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda v: v.name if isinstance(v, Path) else v)
def test_a_link_leads_somewhere(page: Path, link: str):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path):
    assert not re.search(r"@[A-Za-z_]+@", page.read_text(encoding="utf-8"))
