"""What the pages promise exists: links, commands, flags, files, messages; and every page can be found."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.small_models import learn
from benchmarks.speed import __main__ as speed
from far_train.cli.main import PROGRAM as FAR_TRAIN
from far_train.utils import errors

ROOT = Path(__file__).parents[1]
DOCS, REPORTS, HELP = ROOT / "docs", ROOT / "benchmarks" / "reports", ROOT / "web" / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *HELP.rglob("*.md"), *REPORTS.rglob("*.md")])
CURRENT = [page for page in PAGES if not page.is_relative_to(REPORTS)]  # a report has the commands of its time
LEARN = "benchmarks.small_models.learn"
PROGRAMS = {program.name: program for program in (FAR_TRAIN, quality.PROGRAM, speed.PROGRAM)}
CALL = r"-m (far_train|benchmarks\.)"
ALIASES = {"far": "python -m far_train", "learn": f"python -m {LEARN}"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def name(value: object) -> str | None:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)[:60]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", read(page), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# ---- commands


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, each whole and without its comment, aliases written out."""
    lines: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", read(page), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split("; "):
                words = part.strip().split(" ", 1)
                lines.append(" ".join([ALIASES.get(words[0], words[0]), *words[1:]]))
    return [line for line in lines if re.search(CALL, line) and '"$@"' not in line]


SHOWN = [(page, line) for page in CURRENT for line in commands(page)]


def test_there_are_commands_to_check():
    assert len(SHOWN) >= 40 and {"README.md", "measure-your-subjects.md"} <= {page.name for page, _ in SHOWN}


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=name)
def test_a_command_is_understood(page: Path, line: str):
    words = shlex.split(line[re.search(CALL, line).start() :])
    start = words.index("-m") + 1
    if words[start] == LEARN:
        learn._parser().parse_args([*words[start + 1 :], "--out", "anywhere"])
    elif words[start + 1 :] != ["--help"]:
        PROGRAMS[words[start]].parse(words[start + 1 :])


@cache
def known_flags() -> set[str]:
    """Every flag of the commands, and of the trainers of the small models."""
    subparsers = next(action for action in FAR_TRAIN.parser()._actions if action.dest == "command").choices
    return {flag for parser in (*subparsers.values(), learn._parser()) for flag in parser._option_string_actions}


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_a_flag_in_the_text_exists(page: Path):
    flags = {flag for code in inline_code(page) for flag in FLAG.findall(code)}
    assert flags <= known_flags()


# ---- links


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    return [unquote(link) for link in found if not re.match(r"https?:", link)]


def target_of(page: Path, link: str) -> Path:
    path = link.partition("#")[0]
    folder = HELP if page.is_relative_to(HELP) else page.parent  # the front end takes them all to lie there
    return (folder / path).resolve() if path else page


@pytest.mark.parametrize(("page", "link"), [(page, link) for page in PAGES for link in links(page)], ids=name)
def test_a_link_leads_somewhere(page: Path, link: str):
    target, anchor = target_of(page, link), link.partition("#")[2]
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            waiting += [target_of(page, link) for link in links(page)]
    pages = {p for p in PAGES if p.parent != ROOT} - {p for p in HELP.rglob("*.md") if p.parent != HELP}  # translations
    assert pages <= seen


# ---- what else a page names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_placeholder_is_left(page: Path):
    assert not re.search(r"@[A-Za-z_]+@|\bREPOSITORY\b|\bTODO\b|\bTBD\b|example\.(com|org)", read(page))


PATH = re.compile(r"(?:far_train|nodes|benchmarks|tests|scripts|workflows|docs|web)/[\w./-]+")


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_a_file_that_a_page_names_exists(page: Path):
    named = [code for code in inline_code(page) if PATH.fullmatch(code)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_what_a_python_example_imports_exists(page: Path):
    for block in re.findall(r"```python\n(.*?)```", read(page), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_a_page_that_the_code_names_exists():
    cited = re.compile(r"(?<![\w/])(?:docs/[\w/-]+|benchmarks/reports/[\w/-]+)\.md")
    files = [
        p for folder in ("far_train", "nodes", "benchmarks", "scripts", "tests") for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    files += [*ROOT.glob("workflows/*.json"), *ROOT.glob("far_train/**/card.md")]
    missing = {f"{p.name}: {page}" for p in files for page in cited.findall(read(p)) if not (ROOT / page).exists()}
    assert missing == set()


def test_every_error_stands_in_the_reference():
    page = read(DOCS / "reference" / "errors.md")
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FarError)]
    for kind in kinds:
        if kind is not errors.FarError:
            row = re.search(rf"^\| `{kind.__name__}` \|.*\| (\d+) \|$", page, re.MULTILINE)
            assert row and int(row[1]) == kind.exit_status, kind.__name__


@cache
def messages() -> str:
    """All texts of the library and the nodes, with … where a value is put in."""
    texts = []
    for path in [ROOT / "__init__.py", *ROOT.glob("far_train/**/*.py"), *ROOT.glob("nodes/*.py")]:
        for node in ast.walk(ast.parse(read(path))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return re.sub(r"%(\.\d)?[sdf]", "…", "\n".join(texts))


TROUBLE = read(DOCS / "how-to" / "troubleshooting.md")
QUOTED = [code for row in re.findall(r"^\| (`.*?) \|", TROUBLE, re.MULTILINE) for code in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("message", [m for m in QUOTED if "…" in m or " " in m])
def test_a_message_in_troubleshooting_is_a_real_one(message: str):
    for part in message.split("…"):
        assert part.strip() in messages()
