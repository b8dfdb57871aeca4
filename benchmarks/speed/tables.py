"""Figures of the speed benchmark, and the Markdown page that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .counting import Counts
from .phases import Phase


@dataclass(frozen=True)
class Row:
    """One measured step: seconds as median and quartiles, ``peak_bytes`` if the device reports it.

    ``share_of_peak``: FLOP/s of the UNet's and text encoder's forward and backward pass (the FLOPs are the same for all
    modes), relative to the measured matrix product. A row without ``seconds`` ran out of memory. ``gpu_seconds`` that
    kernels ran and ``launches`` from the host are of one step on a CUDA device.
    """

    size: int
    batch: int
    mode: str
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples_per_second: float | None = None
    share_of_peak: float | None = None
    peak_bytes: int | None = None
    gpu_seconds: float | None = None
    launches: int | None = None


@dataclass(frozen=True)
class Swept:
    """A fast step with ``pool`` composites and as many class pictures, for a number of ``concepts``."""

    pool: int
    concepts: int
    seconds: float | None
    quartiles: tuple[float, float] | None


def as_markdown(
    report: dict[str, Any],
    rows: list[Row],
    phases: list[Phase],
    counts: dict[int, dict[str, Counts]],
    sweep: list[Swept],
) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    random = ", random weights" if report["model"] == "sd21" else ""
    lines = [
        "# Speed",
        "",
        f"{machine}; model {report['model']}{random}; {report['dtype']}; a large matrix product reaches "
        f"{report['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s.",
        "",
        "## A training step",
        "",
        "Median, with quartiles. The reference is Custom Diffusion's step, built from diffusers' own parts.",
        "",
        "| px | batch | mode | ms per step | samples/s | vs. reference | of peak | peak memory | vs. reference "
        "| GPU ms | launches |",
        "| --- |" + " --- |" * 10,
    ]
    by_key = {(r.size, r.batch, r.mode): r for r in rows}
    lines += [_step_line(row, by_key[row.size, row.batch, "reference"]) for row in rows]
    lines += ["", "## Counts for a step of 4 samples, independent of the machine", ""]
    lines += [
        "| px | what | kernels | host waits | TFLOP | saved for the backward pass |",
        "| --- |" + " --- |" * 5,
    ]
    for size, counted in counts.items():
        for name, c in counted.items():
            cells = [size, name, c.kernels, c.waits.total(), f"{c.flops / 1e12:.3f}", f"{c.saved_bytes / 1e6:.0f} MB"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if sweep:
        lines += ["", f"## A fast step of {rows[-1].batch} samples with more pictures and more concepts", ""]
        lines += ["| pictures in the latent cache | concepts | ms per step |", "| --- | --- | --- |"]
        lines += [f"| {2 * s.pool} | {s.concepts} | {milliseconds(s.seconds, s.quartiles)} |" for s in sweep]
    if phases:
        total = sum(p.seconds for p in phases)
        lines += ["", f"## A whole run: two concepts at {report['phases']['size']} px, default settings", ""]
        lines += ["| phase | unit | per run | seconds each | seconds in total |", "| --- |" + " --- |" * 4]
        lines += [f"| {p.name} | {p.unit} | {p.count} | {p.each:.3g} | {p.seconds:.3g} |" for p in phases]
        lines += [f"| all | | | | {total:.3g} |", "", "Each is measured on a part of the work and scaled up."]
    return "\n".join(lines) + "\n"


def _step_line(row: Row, reference: Row) -> str:
    cells = [str(row.size), str(row.batch), row.mode]
    if row.seconds is None:
        return "| " + " | ".join([*cells, "does not fit", *[""] * 7]) + " |"
    cells += [
        milliseconds(row.seconds, row.quartiles),
        f"{row.samples_per_second:.3g}",
        f"{reference.seconds / row.seconds:.2f}×" if reference.seconds else "",
        f"{row.share_of_peak:.0%}" if row.share_of_peak is not None else "",
        f"{row.peak_bytes / 2**30:.2f} GiB" if row.peak_bytes else "",
        f"{row.peak_bytes / reference.peak_bytes:.2f}×" if row.peak_bytes and reference.peak_bytes else "",
        f"{1000 * row.gpu_seconds:.4g}" if row.gpu_seconds else "",
        str(row.launches) if row.launches else "",
    ]
    return "| " + " | ".join(cells) + " |"


def milliseconds(seconds: float | None, quartiles: tuple[float, float] | None) -> str:
    if seconds is None:
        return "does not fit"
    low, high = quartiles or (seconds, seconds)
    return f"{1000 * seconds:.4g} ({1000 * low:.4g}–{1000 * high:.4g})"
