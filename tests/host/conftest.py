"""Fixtures of the host tests: find a ComfyUI, start one for the session, and say how many tests it served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .comfy_server import HOW_TO_GET_A_HOST, ComfyServer, Host, HostError, find_host, find_python

HERE = Path(__file__).resolve().parent
OUTCOMES: pytest.StashKey[Counter] = pytest.StashKey()


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI to test on. Skips, and says how to get one, where there is none."""
    path = find_host()
    if path is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    return Host(path, find_python(path))


@pytest.fixture(scope="session")
def comfy(host: Host) -> Iterator[ComfyServer]:
    """One running host for all tests that need neither a restart nor an empty base directory."""
    with ComfyServer(host) as server:
        yield server


@pytest.fixture
def template_files(comfy: ComfyServer) -> Iterator[None]:
    """Whatever the templates name, as empty files and folders: enough to open and to validate them."""
    names = {
        "checkpoints": "v2-1_768-ema-pruned.safetensors",
        "sams": "sam_vit_b_01ec64.pth",
        "far": "two-dogs.safetensors",
    }
    made = [comfy.folder(f"models/{folder}") / name for folder, name in names.items()]
    made.append(comfy.folder("output/far/datasets/two-dogs") / "dataset.json")
    folders = [comfy.folder(f"input/{name}") for name in ("corgi", "chow", "husky")] + [made[-1].parent]
    for path in made:
        path.touch()
    yield
    for path in made:  # other tests share this host
        path.unlink()
    for folder in folders:
        folder.rmdir()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = Counter()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    if HERE in item.path.parents and (report.when == "call" or report.skipped or report.failed):
        item.config.stash[OUTCOMES][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A green run without a host proves little about ComfyUI, so the summary says what really ran, and on what."""
    counts = config.stash.get(OUTCOMES, Counter())
    if not counts:
        return
    try:
        path = find_host()
    except HostError as error:  # The tests have failed with it already.
        terminalreporter.write_line(f"host tests: none ran: {error}")
        return
    where = f"on ComfyUI {Host(path, find_python(path)).version}" if path else f"({HOW_TO_GET_A_HOST})"
    ran = counts["passed"] + counts["failed"]
    terminalreporter.write_line(f"host tests: {ran} ran, {counts['skipped']} skipped {where}")
