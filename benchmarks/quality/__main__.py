"""``python -m benchmarks.quality``: compare FaR with other methods in the small world.

See docs/explanation/benchmark.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from far_train.cli.parsing import Argument, Command, Inputs
from far_train.cli.program import Program
from far_train.cli.shared import DEVICE, device_name
from far_train.utils.terminal import progress_bars, stop_on_interrupt

from .settings import BenchConfig


def run_bench(inputs: Inputs, config: BenchConfig) -> None:
    """Make the runs of a plan that are missing, and write the report."""
    from far_train.data.sam import load_sam
    from far_train.mini import shipped
    from far_train.mini.oracle import load_oracle, read_confusion
    from far_train.utils.devices import choose_device

    from .plans import build_plan
    from .run import Bench
    from .tables import write_report

    out, weights = Path(inputs.get("out") or "outputs/bench"), Path(inputs.get("weights") or shipped.WEIGHTS)
    device, _ = choose_device(device_name(inputs))
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


QUALITY = Command(
    "quality",
    "measure FaR and its rivals in the small world (docs/explanation/benchmark.md); resumes where it stopped",
    (
        Argument("out", "folder for the runs and the report (default: outputs/bench)"),
        Argument(
            "weights", "folder of small models, as benchmarks.small_models.learn exports it (default: the shipped ones)"
        ),
        DEVICE,
    ),
    run_bench,
    BenchConfig,
)
PROGRAM = Program("benchmarks.quality", (QUALITY,))

if __name__ == "__main__":
    sys.exit(PROGRAM.run())
