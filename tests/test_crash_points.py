"""kill −9 at random moments of a training: what is on disk is whole, and resuming ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork, which the test is made of")


def kill(folder: Path, seed: int, kills: int, in_saves: int) -> None:
    """See ``tests/torture/crashes.py``; prints what happened."""
    command = [sys.executable, ROOT / "tests" / "torture" / "crashes.py", folder, seed, kills, in_saves]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(map(str, command), cwd=ROOT, env=env, check=True, timeout=120 + 20 * kills)
    result = json.loads((folder / "result.json").read_text())
    print("\n" + json.dumps(result))
    assert result["wrong"] == []
    assert result["kills"]["save"] >= in_saves and result["kills"]["save"] + result["kills"]["elsewhere"] >= kills
    assert any(int(steps) > 0 for steps in result["steps lost"])  # some kills did hurt


def test_killed_at_six_moments(tmp_path: Path):
    kill(tmp_path, 0, 6, 2)


@pytest.mark.torture
def test_killed_at_two_hundred_moments(tmp_path: Path):
    kill(tmp_path, 1, 200, 60)
