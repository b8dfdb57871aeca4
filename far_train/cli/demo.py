"""The command that shows the whole pipeline."""

from __future__ import annotations

from pathlib import Path

from ..utils.terminal import progress_bars
from .parsing import Argument, Command, Inputs
from .shared import DEVICE, device_name


def demo(inputs: Inputs, _: None) -> None:
    """Run every stage on the small models and write a page of what each made."""
    from ..mini.demo import run_demo

    with progress_bars() as bars:
        page = run_demo(Path(inputs.get("out") or "outputs/demo"), device_name(inputs), bars)
    print(f"Every stage's pictures → {page}")


DEMO = Command(
    "demo",
    "run the full pipeline on a small model and on subjects that the project draws itself",
    (Argument("out", "folder for the results (default: outputs/demo)"), DEVICE),
    demo,
)
