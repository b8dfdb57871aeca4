"""Measure a training step next to Custom Diffusion's, and a whole run: ``python -m benchmarks.speed``."""

from __future__ import annotations

import sys
from pathlib import Path

from far_train.cli.parsing import Argument, Command, Inputs
from far_train.cli.program import Program
from far_train.cli.shared import DEVICE
from far_train.utils.terminal import progress_bars

from .settings import SpeedConfig


def run_speed(inputs: Inputs, config: SpeedConfig) -> None:
    """Measure, and write and print the tables."""
    from .measure import measure_speed

    with progress_bars() as bars:
        page = measure_speed(Path(inputs.get("out") or "outputs/speed"), config, bars)
    print(page.read_text(encoding="utf-8"))
    print(f"The same as JSON → {page.with_suffix('.json')}")


SPEED = Command(
    "speed",
    "measure the training step beside Custom Diffusion's, and the phases of a whole run",
    (Argument("out", "folder for speed.md and speed.json (default: outputs/speed)"), DEVICE),
    run_speed,
    SpeedConfig,
)
PROGRAM = Program("benchmarks.speed", (SPEED,))

if __name__ == "__main__":
    sys.exit(PROGRAM.run())
