"""The speed of a training step beside Custom Diffusion's, and of a run: ``python -m benchmarks.speed``."""

from __future__ import annotations

import sys
from pathlib import Path

from .bench_speed import run_bench_speed
from .cli import DEVICE, Argument, Command, Inputs, run_single
from .speed_settings import SpeedConfig
from .terminal import progress_bars

COMMAND = Command(
    "speed",
    "measure the training step beside Custom Diffusion's, and the phases of a whole run",
    (Argument("out", "folder for speed.md and speed.json (default: outputs/bench-speed)"), DEVICE),
    SpeedConfig,
)


def run_speed(inputs: Inputs, config: SpeedConfig) -> None:

    with progress_bars() as bars:
        page = run_bench_speed(Path(inputs.get("out") or "outputs/bench-speed"), config, bars)
    print(page.read_text(encoding="utf-8"))
    print(f"The same as JSON → {page.with_suffix('.json')}")


if __name__ == "__main__":
    sys.exit(run_single(COMMAND, run_speed, "benchmarks.speed"))
