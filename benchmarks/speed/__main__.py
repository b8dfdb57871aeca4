"""Measure a training step next to Custom Diffusion's, and a whole run: ``python -m benchmarks.speed``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from far_train.cli.main import DEVICE, Argument, Command, Inputs, run_single
from far_train.utils.terminal import progress_bars

from .measure import measure_speed
from .settings import SpeedConfig

COMMAND = Command(
    "speed",
    "measure a training step next to Custom Diffusion's, and the phases of a whole run",
    (Argument("out", "folder for speed.md and speed.json (default: outputs/speed)"), DEVICE),
    SpeedConfig,
)


def run_speed(inputs: Inputs, config: SpeedConfig) -> None:
    with progress_bars() as bars:
        page = measure_speed(Path(inputs.get("out") or "outputs/speed"), config, bars)
    print(page.read_text(encoding="utf-8"))
    print(f"The same as JSON → {page.with_suffix('.json')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, as :func:`far_train.cli.main.main` does."""
    return run_single(COMMAND, run_speed, "benchmarks.speed", argv)


if __name__ == "__main__":
    sys.exit(main())
