#!/usr/bin/env python3
"""Print the tables of a report over several benches together, from their results.csv.

    python scripts/pool_bench.py benchmarks/reports/2026-11-26/bench-*.csv

Each pair is compared within its own bench, so the benches may have had different settings. A pair may be in one alone.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality.summary import COLUMNS  # noqa: E402
from benchmarks.quality.tables import report_tables  # noqa: E402


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a bench from its results.csv. Raises SystemExit where the columns are others."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"arm", "group", "kind", "seed", "success"} <= lines[0].keys():
        sys.exit(f"{path}: is no results.csv of a bench; give the file that 'python -m benchmarks.quality' wrote")
    return [
        {key: line[key] for key in ("arm", "group", "kind", "seed")}
        | {"figures": {name: float(line[name]) for name in COLUMNS if line.get(name)}}
        for line in lines
    ]


def main(paths: list[Path]) -> None:
    benches = [read_rows(path) for path in paths]
    rows = [row for bench in benches for row in bench]
    groups = [group for bench in benches for group in {row["group"] for row in bench}]
    if twice := {group for group in groups if groups.count(group) > 1}:
        sys.exit(f"{', '.join(sorted(twice))}: in more than one file, which would mix settings; leave one out")
    print("\n".join(report_tables(rows)).strip())


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
