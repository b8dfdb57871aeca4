"""Several benches' results taken together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "pool_bench.py"


def pool(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)


def results(path: Path, group: str, far: float, rival: float) -> Path:
    rows = [f"far,{group},near,0,{far},", f"custom-diffusion,{group},near,0,{rival},0.5"]
    path.write_text("\n".join(["arm,group,kind,seed,success,solo", *rows]) + "\n", encoding="utf-8")
    return path


def test_pairs_of_several_benches_are_compared_each_within_its_own(tmp_path):
    first, second = results(tmp_path / "a.csv", "near-1", 0.9, 0.1), results(tmp_path / "b.csv", "near-2", 0.7, 0.1)
    lines = pool(first, second).stdout.splitlines()
    assert lines[2:6] == [
        "| arm | All pairs | Near twins |",
        "| --- | --- | --- |",
        "| custom-diffusion | 10 (2) | 10 (2) |",
        "| far | 80 (2) | 80 (2) |",
    ]
    assert "| joint accuracy | far − custom-diffusion (2 pairs) | +70.0 | +60.0 … +80.0 | 0.5 | 0.5 |" in lines
    assert any("far to custom-diffusion (2) | +70.0" in line and line.endswith("| yes |") for line in lines)


def test_what_can_not_be_pooled_is_named(tmp_path):
    first, again = results(tmp_path / "a.csv", "near-1", 0.5, 0.1), results(tmp_path / "b.csv", "near-1", 0.3, 0.1)
    other = tmp_path / "other.csv"
    other.write_text("name,value\nx,1\n", encoding="utf-8")
    for refused, named in ((pool(first, again), "near-1"), (pool(other), "other.csv")):
        assert refused.returncode == 1 and named in refused.stderr
