"""Running commands in this process and judging how they end."""

from __future__ import annotations

from pathlib import Path

from far_train.cli import main as cli_main
from far_train.cli.program import Program


def refused(capsys, argv: list, *words: str, program: Program | None = None) -> str:
    """Run a command that must end in one line of error, with exit status 2 and no traceback."""
    capsys.readouterr()
    program = program or cli_main.PROGRAM
    status = program.run([str(a) for a in argv])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith(f"{program.name}: error: ")]
    assert status == 2 and captured.out == "" and "Traceback" not in captured.err, captured
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]), captured.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}
