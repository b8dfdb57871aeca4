"""Measure a training step on this device next to Custom Diffusion's, and the phases of a whole run.

Everything is measured in one process on the same work. The reference is :mod:`benchmarks.speed.reference`.
"""

from __future__ import annotations

import gc
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
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
from .launches import profile_step
from .phases import Phase, measure_phases
from .settings import SpeedConfig
from .tables import Row, Swept, as_markdown, milliseconds
from .work import STEP_MODES, RandomPictures, count_steps, our_run, random_base, reference_run, work_config

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

# Where there is no CUDA device, every step is eager.
MODES: dict[str, dict[str, Any]] = STEP_MODES | {
    "fast eager": {"memory": "fast", "cuda_graph": "off"},
    "lean eager": {"memory": "lean", "cuda_graph": "off"},
    "compiled": {"memory": "fast", "compile": True},
}
SWEEP = ((2, 2), (8, 2), (32, 2), (2, 1), (2, 4))  # composites in the latent cache, concepts


def measure_speed(out: Path, config: SpeedConfig, on_progress: Progress = lambda *_: None) -> Path:
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
        check_size(base, size, size, ("sizes", "sizes"))
    modes = ("reference", "fast", "preserving", "lean")
    if device.type == "cuda":
        modes = ("reference", "fast", "fast eager", "preserving", "lean", "lean eager")
    if config.compile:
        modes = (*modes, "compiled")

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
                useful = counts[size]["preserving" if mode == "preserving" else "fast"].flops / 4
                rows.append(_rated(row, useful, peak))
                took = milliseconds(row.seconds, row.quartiles)
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
    write_text(out / "speed.md", as_markdown(report, rows, phases, counts, sweep))
    return out / "speed.md"


def measure_step(
    base: BaseModel,
    size: int,
    batch: int,
    mode: str,
    config: SpeedConfig,
    device: torch.device,
    pictures: RandomPictures | None = None,
) -> Row:
    """Warm up, then time single steps on a CPU, or blocks of five on a GPU, which runs asynchronously."""
    settings: dict[str, Any] = {"device": config.device, "precision": config.precision}
    if mode == "reference":
        prepared = reference_run(base, size, batch)
    else:
        settings |= MODES[mode]
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
            launches = profile_step(run.take_step) if device.type == "cuda" else None
    except torch.OutOfMemoryError:
        return Row(size, batch, mode)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    spread = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    row = Row(size, batch, mode, statistics.median(seconds), (spread[0], spread[2]), peak_bytes=peak)
    return replace(row, gpu_seconds=launches.gpu_seconds, launches=launches.count) if launches else row


def _rated(row: Row, sample_flops: float, peak: float) -> Row:
    if row.seconds is None:
        return row
    rate = row.batch / row.seconds
    return Row(**{**asdict(row), "samples_per_second": rate, "share_of_peak": rate * sample_flops / peak})


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes until the device has finished it.

    On a CPU with one thread this is process time, so other load on the machine isn't counted.
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
        about["clock"] = "process time" if _own_time(device) else "wall time"
    return about
