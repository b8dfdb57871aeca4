"""Measure FaR and its rivals in the small world: ``python -m benchmarks.quality`` (docs/explanation/benchmark.md)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from far_train.cli.main import DEVICE, Argument, Command, Inputs, run_single
from far_train.data.sam import load_sam
from far_train.mini import shipped
from far_train.mini.oracle import load_oracle, read_confusion
from far_train.utils.devices import choose_device
from far_train.utils.terminal import progress_bars, stop_on_interrupt

from .plans import build_plan
from .run import Bench
from .settings import BenchConfig
from .tables import write_report

COMMAND = Command(
    "quality",
    "measure FaR and its rivals in the small world (docs/explanation/benchmark.md); goes on where it stopped",
    (
        Argument("out", "folder for the runs and the report (default: outputs/bench)"),
        Argument("weights", "folder of small models, as mini.learn exports it (default: the shipped ones)"),
        DEVICE,
    ),
    BenchConfig,
)


def run_bench(inputs: Inputs, config: BenchConfig) -> None:

    out, weights = Path(inputs.get("out") or "outputs/bench"), Path(inputs.get("weights") or shipped.WEIGHTS)
    device, _ = choose_device(str(inputs.get("device") or "auto"))
    plan, oracle = build_plan(config), weights / shipped.ORACLE.relative_to(shipped.WEIGHTS)
    with progress_bars() as bars, stop_on_interrupt() as should_stop:
        rows = Bench(
            out,
            plan,
            weights / shipped.BASE.relative_to(shipped.WEIGHTS),
            load_sam(weights / shipped.SAM.relative_to(shipped.WEIGHTS), device),
            load_oracle(oracle, device),
            read_confusion(oracle.parent),
            changes=config.training_changes(),
            device=device,
            on_progress=bars,
            should_stop=should_stop,
        ).run()
    print(f"Tables and plots → {write_report(rows, out, f'Bench: {config.plan}')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, as :func:`far_train.cli.main.main` does."""
    return run_single(COMMAND, run_bench, "benchmarks.quality", argv)


if __name__ == "__main__":
    sys.exit(main())
