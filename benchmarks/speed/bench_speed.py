"""How fast a training step is on this device, beside Custom Diffusion's, and what a whole run takes.

Everything is measured in one process on the same work. The reference is :mod:`benchmarks.speed.reference`.
"""

from __future__ import annotations

import gc
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from far_train.mini.shipped import BASE as SMALL_BASE
from far_train.mini.shipped import small_base
from far_train.models.base import BaseModel
from far_train.models.families import SD21
from far_train.models.loading import packaged_configs, read_configs
from far_train.models.sampling import check_size
from far_train.training.memory_plan import PeakMemory
from far_train.training.settings import TrainConfig
from far_train.utils.devices import choose_device
from far_train.utils.files import write_json, write_text

from .counting import Counts
from .settings import SpeedConfig
from .speed_phases import Phase, measure_phases
from .speed_work import RandomPictures, count_steps, our_run, random_base, reference_run, work_config

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

SWEEP = ((2, 2), (8, 2), (32, 2), (2, 1), (2, 4))  # composites in the pool, concepts


@dataclass(frozen=True)
class Row:
    """One step measured: seconds as median and quartiles, ``peak_bytes`` where they could be read.

    ``share_of_peak`` is the FLOPs of the UNet's and text encoder's forward and backward pass, the same for all modes,
    against the measured matrix product. A row without ``seconds`` did not fit the memory.
    """

    size: int
    batch: int
    mode: str
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    samples_per_second: float | None = None
    share_of_peak: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Swept:
    """A fast step with ``pool`` composites and as many class pictures, of so many ``concepts``."""

    pool: int
    concepts: int
    seconds: float | None
    quartiles: tuple[float, float] | None


def run_bench_speed(out: Path, config: SpeedConfig, on_progress: Progress = lambda *_: None) -> Path:
    """Measure, and write ``speed.md`` and ``speed.json`` into ``out``; returns the former. Raises ConfigError."""
    device, dtype = choose_device(config.device, config.precision)
    model = config.model
    if model == "auto":
        model = "small" if device.type == "cpu" else "sd21"
    sizes = config.sizes or ((128,) if model == "small" else (256,) if device.type == "cpu" else (512, 768))
    batches = config.batches or ((1, 2) if (model, device.type) == ("sd21", "cpu") else (1, 2, 4, 8))
    configs = packaged_configs(SD21, "v_prediction") if model == "sd21" else read_configs(SMALL_BASE)
    started = time.perf_counter()
    base = random_base(configs, str(device), dtype) if model == "sd21" else small_base().to(device, dtype)
    loading = time.perf_counter() - started
    for size in sizes:
        check_size(base, size, size)
    modes = ("reference", "fast", "lean", *(("compiled",) if config.compile else ()))

    peak = matmul_peak(device, dtype)
    rows: list[Row] = []
    counts: dict[int, dict[str, Counts]] = {}
    phases: list[Phase] = []
    sweep: list[Swept] = []
    total = len(sizes) * len(batches) * len(modes)
    for size in sizes:
        counts[size] = count_steps(configs, size, 4, dtype)
        for batch in batches:
            for mode in modes:
                on_progress("steps", len(rows), total)
                row = measure_step(base, size, batch, mode, config, device)
                rows.append(_rated(row, counts[size]["fast"].flops / 4, peak))
                took = _milliseconds(row.seconds, row.quartiles)
                log.info("%d px, %d samples, %s: %s ms a step", size, batch, mode, took)
    on_progress("steps", total, total)
    if config.sweep:
        for pool, concepts in SWEEP:
            pictures = RandomPictures(sizes[0], pool, concepts)
            row = measure_step(base, sizes[0], batches[-1], "fast", config, device, pictures)
            sweep.append(Swept(pool, concepts, row.seconds, row.quartiles))
    if config.phases:
        defaults = TrainConfig(device=config.device, precision=config.precision, memory="fast")
        phases = measure_phases(base, sizes[0], defaults, loading, lambda work: seconds_of(work, device), on_progress)
    report = {
        "machine": _machine(device),
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_second": peak,
        "steps": [asdict(r) for r in rows],
        "phases": {"size": sizes[0], "of": [asdict(p) for p in phases]},
        "sweep": [asdict(s) for s in sweep],
        "counts": {str(s): {k: c.to_dict() for k, c in of.items()} for s, of in counts.items()},
        "config": config.to_dict(),
    }
    write_json(out / "speed.json", report)
    write_text(out / "speed.md", _as_markdown(report, rows, phases, counts, sweep))
    return out / "speed.md"


# ---- measuring


def measure_step(
    base: BaseModel,
    size: int,
    batch: int,
    mode: str,
    config: SpeedConfig,
    device: torch.device,
    pictures: RandomPictures | None = None,
) -> Row:
    """Warm up, then take the time of single steps on a CPU, or of blocks of five on a GPU, which runs on its own."""
    settings: dict[str, Any] = {"device": config.device, "precision": config.precision}
    if mode == "reference":
        prepared = reference_run(base, size, batch)
    else:
        settings |= {"memory": "lean" if mode == "lean" else "fast", "compile": mode == "compiled"}
        prepared = our_run(base, size, work_config(batch, **settings), pictures)
    block = 1 if device.type == "cpu" else 5
    seconds = []
    try:
        with PeakMemory(device) as memory, prepared as run:

            def steps() -> None:
                for _ in range(block):
                    run.take_step()
                    if mode != "reference":
                        run.readback.take()

            for _ in range(config.warmup):
                steps()
            memory.restart()
            for _ in range(config.repeats):
                seconds.append(seconds_of(steps, device) / block)
            peak = memory.peak()
    except torch.OutOfMemoryError:
        return Row(size, batch, mode)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    spread = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Row(size, batch, mode, statistics.median(seconds), (spread[0], spread[2]), peak_bytes=peak)


def _rated(row: Row, sample_flops: float, peak: float) -> Row:
    if row.seconds is None:
        return row
    rate = row.batch / row.seconds
    return Row(**{**asdict(row), "samples_per_second": rate, "share_of_peak": rate * sample_flops / peak})


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes, until the device is done with it.

    On a CPU with one thread these are the process's own: what else the machine does then is not counted.
    """
    clock = time.process_time if _own_time(device) else time.perf_counter
    _finish(device)
    started = clock()
    work()
    _finish(device)
    return clock() - started


def _own_time(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: the best of several."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(seconds_of(lambda: a @ a, device) for _ in range(12))


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about: dict[str, Any] = {"device": device.type, "name": name, "torch": torch.__version__}
    if device.type == "cpu":
        about["threads"] = torch.get_num_threads()
        about["clock"] = "of the process" if _own_time(device) else "of the wall"
    return about


# ---- the tables


def _as_markdown(
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
        "Median, with quartiles. The reference is Custom Diffusion's step from diffusers' own parts.",
        "",
        "| px | batch | mode | ms a step | samples/s | against reference | of peak | peak memory | against reference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_key = {(r.size, r.batch, r.mode): r for r in rows}
    lines += [_step_line(row, by_key[row.size, row.batch, "reference"]) for row in rows]
    lines += ["", "## Counts of a step of 4 samples, whatever the machine", ""]
    lines += [
        "| px | what | kernels | waits for the device | TFLOP | kept for the backward |",
        "| --- |" + " --- |" * 5,
    ]
    lines += [
        f"| {size} | {name} | {c.kernels} | {c.waits.total()} | {c.flops / 1e12:.3f} | {c.saved_bytes / 1e6:.0f} MB |"
        for size, of in counts.items()
        for name, c in of.items()
    ]
    if sweep:
        lines += ["", f"## A fast step of {rows[-1].batch} samples with more pictures and more concepts", ""]
        lines += ["| pictures in the pool | concepts | ms a step |", "| --- | --- | --- |"]
        lines += [f"| {2 * s.pool} | {s.concepts} | {_milliseconds(s.seconds, s.quartiles)} |" for s in sweep]
    if phases:
        total = sum(p.seconds for p in phases)
        lines += ["", f"## A whole run: two concepts at {report['phases']['size']} px, default settings", ""]
        lines += ["| phase | of | in a run | seconds of one | seconds of all |", "| --- |" + " --- |" * 4]
        lines += [f"| {p.name} | {p.unit} | {p.count} | {p.each:.3g} | {p.seconds:.3g} |" for p in phases]
        lines += [f"| all | | | | {total:.3g} |", "", "Each is measured on a part and multiplied up."]
    return "\n".join(lines) + "\n"


def _step_line(row: Row, reference: Row) -> str:
    cells = [str(row.size), str(row.batch), row.mode]
    if row.seconds is None:
        return "| " + " | ".join([*cells, "does not fit", *[""] * 5]) + " |"
    cells += [
        _milliseconds(row.seconds, row.quartiles),
        f"{row.samples_per_second:.3g}",
        f"{reference.seconds / row.seconds:.2f}×" if reference.seconds else "",
        f"{row.share_of_peak:.0%}" if row.share_of_peak is not None else "",
        f"{row.peak_bytes / 2**30:.2f} GB" if row.peak_bytes else "",
        f"{row.peak_bytes / reference.peak_bytes:.2f}×" if row.peak_bytes and reference.peak_bytes else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _milliseconds(seconds: float | None, quartiles: tuple[float, float] | None) -> str:
    if seconds is None:
        return "does not fit"
    low, high = quartiles or (seconds, seconds)
    return f"{1000 * seconds:.4g} ({1000 * low:.4g}–{1000 * high:.4g})"
