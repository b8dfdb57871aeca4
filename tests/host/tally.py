"""How many tests a ComfyUI served, for the end of a run: a green one without a host proves little about ComfyUI."""

from __future__ import annotations

from collections import Counter

import pytest

from .find_host import HOW_TO_GET_A_HOST, Host, HostError, find_host, find_python

FOLDER = "tests/host/"


class HostTally:
    """A plugin of the process that reports; tests may run in others."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid.startswith(FOLDER) and (report.when == "call" or report.skipped or report.failed):
            self.outcomes[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.outcomes:
            return
        try:
            path = find_host()
        except HostError as error:  # The tests have failed with it already.
            terminalreporter.write_line(f"host tests: none ran: {error}")
            return
        where = f"on ComfyUI {Host(path, find_python(path)).version}" if path else f"({HOW_TO_GET_A_HOST})"
        ran = self.outcomes["passed"] + self.outcomes["failed"]
        terminalreporter.write_line(f"host tests: {ran} ran, {self.outcomes['skipped']} skipped {where}")
