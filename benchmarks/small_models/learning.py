"""What the four trainings of the small models share: the loop, averaged weights, checkpoints, metrics.

Every random choice of a step is derived from the seed and the step's number, so a run that was stopped, or killed,
resumes from its last checkpoint and ends, on the CPU, in the same bits. A step that is captured as a CUDA graph draws
from the device's generator instead, and a run whose rate follows the clock depends on the machine's speed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from far_train.training.checkpoints import load_checkpoint, save_checkpoint
from far_train.training.run_folder import CHECKPOINTS, METRICS_FILE, cut_metrics, open_run, read_metrics
from far_train.utils.config import Config, setting
from far_train.utils.devices import choose_device
from far_train.utils.errors import CheckpointError, Interrupted, TrainingDiverged
from far_train.utils.files import make_folder, write_json, write_tensors
from far_train.utils.seeding import derive_seed

from .captured import CapturedStep
from .muon import Muon

log = logging.getLogger(__name__)

SESSIONS_FILE = "sessions.jsonl"
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LearnConfig(Config):
    """Settings of one training. ``steps`` may differ when a run goes on: it is extended, or brought to its end."""

    steps: int = setting(20_000, "optimizer steps in all", low=1, shapes_result=False)
    batch_size: int = setting(64, "samples per step", low=1, high=65536)
    lr: float = setting(1e-3, "learning rate at its highest, of Muon and AdamW alike", low=0, high=1)
    warmup: int = setting(500, "steps over which the rate rises; then it falls as a cosine", low=0)
    weight_decay: float = setting(0.01, "decay of matrices and kernels", low=0, high=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", low=1e-6, high=1e6, was=("grad_clip",))
    ema_decay: float = setting(0.999, "decay of the averaged weights, which are the result", low=0, high=1)
    learn_seed: int = setting(0, "seed of the first weights and of every step's choices", low=0, high=2**31)
    precision: str = setting("auto", "bf16 (autocast) or fp32; auto: bf16 on CUDA", choices=("auto", "fp32", "bf16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 …", shapes_result=False)
    minutes: float | None = setting(
        None, "train for this long in all; the rate follows the clock, not the steps", low=0.001, shapes_result=False
    )
    pause_after: float | None = setting(None, "save and stop after so many minutes", low=0, shapes_result=False)
    save_every: int = setting(1000, "steps between checkpoints", low=1, shapes_result=False)
    keep_checkpoints: int = setting(2, "checkpoints kept on disk", low=1, shapes_result=False)
    log_every: int = setting(50, "steps between lines of metrics", low=1, shapes_result=False)


# The loss to descend and further figures, all scalars on the device.
Loss = tuple[Tensor, dict[str, Tensor]]
StepLoss = Callable[[int], Loss]  # asked for a step's number
OnStep = Callable[[int, dict[str, float]], None]


def learning_rate(config: LearnConfig, step: int, seconds: float = 0.0) -> float:
    """Linear warm-up, then half a cosine down to 0 at the last step.

    With ``minutes``, the cosine goes by the ``seconds`` trained so far and scales the warm-up as well.
    """
    rise = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    if config.minutes is not None:
        progress = seconds / (60 * config.minutes)
    elif step < config.warmup:
        progress = 0.0
    else:
        progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def draw_rows(seed: int, step: int, count: int, total: int) -> Tensor:
    """Rows of a step's samples among ``total``, int64 [count]."""
    rng = np.random.default_rng([derive_seed(seed, "rows", step)])
    return torch.from_numpy(rng.integers(total, size=count))


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The source of a step's noise."""
    return torch.Generator(device).manual_seed(derive_seed(seed, "noise", step))


def seeded(seed: int, build: Callable[[], M]) -> M:
    """Build a module whose first weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fit(
    module: M,
    step_loss: StepLoss,
    config: LearnConfig,
    folder: Path,
    about: Mapping[str, Any],
    *,
    captured_loss: Callable[[], Loss] | None = None,
    before_step: Callable[[], None] = lambda: None,
    on_step: OnStep = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> M:
    """Train ``module`` (moved to the config's device, all parameters that require a gradient), or resume its training.

    ``about`` names what else decides the result (architecture, data), in JSON types; a run of another kind in the
    same ``folder`` is refused. ``captured_loss``: the same loss, drawing from the device's default generator; with it
    the whole step is one CUDA graph where there is CUDA. ``before_step()`` is called before each step; the first call
    may wait for data, which is no part of the training's time. ``on_step(step, metrics)`` is called at each line of
    metrics.
    Returns a copy with the averaged weights, in eval mode. Raises Interrupted after saving, when ``should_stop`` says
    so or ``pause_after`` is over, TrainingDiverged, CheckpointError, OutputError.
    """
    device, dtype = choose_device(config.device, config.precision)
    open_run(folder, json.loads(json.dumps({"config": config.result_shaping(), **about})), resume=True)
    module.to(device).train()
    parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
    average = {k: nn.Parameter(p.detach().clone(), requires_grad=False) for k, p in parameters.items()}
    captures = captured_loss is not None and device.type == "cuda"
    optimizer = _optimizer(module, parameters, config, capturable=captures)
    saved = {f"model/{k}": p for k, p in parameters.items()} | {f"average/{k}": p for k, p in average.items()}
    first = step = load_checkpoint(folder / CHECKPOINTS, saved, optimizer)
    cut_metrics(folder / METRICS_FILE, step)
    trained = _seconds_trained(folder / METRICS_FILE)
    started, kept = time.monotonic(), step
    window, since = [], started
    descend = partial(_descend, parameters, average, optimizer, config.max_grad_norm, device, dtype)
    captured = None
    if captures:
        if device.index is not None:
            torch.cuda.set_device(device)  # captures and default generators are the current device's
        torch.cuda.manual_seed(derive_seed(config.learn_seed, "captured", first))
        captured = CapturedStep(partial(descend, captured_loss), optimizer, device)

    def seconds() -> float:
        return trained + time.monotonic() - started

    def finished() -> bool:
        return step >= config.steps if config.minutes is None else seconds() >= 60 * config.minutes

    def take_step() -> dict[str, Tensor]:
        rate = learning_rate(config, step, seconds())
        stay = min(config.ema_decay, (1 + step) / (10 + step))  # the first weights shall not linger
        if captured is not None:
            return captured(rate, stay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return descend(lambda: step_loss(step), stay)

    def report(metrics_file: TextIO) -> None:
        """A line of metrics of the steps since the last; waits for the device, and refuses what isn't finite."""
        nonlocal window, since
        if window:
            figures, now = _mean_figures(window, step), time.monotonic()
            speed = len(window) * config.batch_size / max(now - since, 1e-9)
            window, since = [], now
            metrics = {**figures, "lr": learning_rate(config, step - 1, seconds())}
            metrics |= {"samples_per_second": round(speed, 1), "seconds": round(seconds(), 1)}
            metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
            metrics_file.flush()
            on_step(step, metrics)

    def save(metrics_file: TextIO) -> None:
        nonlocal kept
        report(metrics_file)
        if step != kept:
            save_checkpoint(folder / CHECKPOINTS, step, saved, optimizer, config.keep_checkpoints)
            kept = step

    try:
        with open(folder / METRICS_FILE, "a", encoding="utf-8") as metrics_file:
            if not (done := finished()):
                before_step()  # which may wait long for data: no part of the training's time
                started = since = time.monotonic()
            while not done:
                late = config.pause_after is not None and time.monotonic() - started > 60 * config.pause_after
                if late or should_stop():
                    save(metrics_file)
                    of = f" of {config.steps}" if config.minutes is None else ""
                    raise Interrupted(f"stopped at step {step}{of}, which is saved; start again to resume")
                window.append(take_step())
                step += 1
                done = finished()
                if done or step % config.save_every == 0:
                    save(metrics_file)
                elif step % config.log_every == 0:
                    report(metrics_file)
                if not done:
                    try:
                        before_step()
                    except BaseException:
                        save(metrics_file)
                        raise
    finally:
        _note_session(folder, config, device, first, kept, time.monotonic() - started)
    return _averaged(module, average)


def _seconds_trained(metrics: Path) -> float:
    """Seconds of training behind a run's last line of metrics, 0 for a new run."""
    lines = read_metrics(metrics) if metrics.exists() else []
    return lines[-1].get("seconds", 0.0) if lines else 0.0


def _optimizer(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], config: LearnConfig, capturable: bool
) -> Muon:
    # Rows of rare words get no gradient: neither decay nor a matrix's step belongs there.
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    kernels = [p for p in parameters.values() if p.dim() >= 2 and id(p) not in tables]
    others = [p for p in parameters.values() if p.dim() < 2 or id(p) in tables]
    return Muon(kernels, others, config.lr, config.weight_decay, capturable=capturable)


def _descend(
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    device: torch.device,
    dtype: torch.dtype,
    loss_of: Callable[[], Loss],
    stay: float | Tensor,
) -> dict[str, Tensor]:
    """One step of the optimizer and of the average, of which the share ``stay`` stays; reads nothing back."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss, figures = loss_of()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        for mean, parameter in zip(average.values(), parameters.values()):
            mean.lerp_(parameter, 1 - stay)
    return {"loss": loss.detach(), **{k: v.detach() for k, v in figures.items()}, "grad_norm": norm.detach()}


def _mean_figures(window: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """Means over the steps since the last line. Raises TrainingDiverged."""
    stacked = torch.stack([torch.stack([v.float() for v in figures.values()]) for figures in window])
    means = dict(zip(window[0], stacked.mean(0).tolist()))
    if not math.isfinite(means["loss"]) or not math.isfinite(means["grad_norm"]):
        raise TrainingDiverged(
            f"the loss or its gradient was not finite up to step {step}; the last checkpoint is kept. Lower lr, or use "
            "precision fp32"
        )
    return {k: round(v, 6) for k, v in means.items()}


def _averaged(module: M, average: Mapping[str, Tensor]) -> M:
    copy = deepcopy(module)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name in average:
                parameter.copy_(average[name])
    return copy.eval().requires_grad_(False)


def load_averaged(module: M, folder: Path) -> tuple[M, int]:
    """A copy of ``module`` with the averaged weights of a run's newest checkpoint, and its step.

    Raises CheckpointError if there is none.
    """
    average = {k: nn.Parameter(p.detach().clone(), requires_grad=False) for k, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters())
    step = load_checkpoint(folder / CHECKPOINTS, {f"average/{k}": p for k, p in average.items()}, optimizer)
    if not step:
        raise CheckpointError(f"{folder}: holds no checkpoint; train this model first")
    return _averaged(module, average), step


def weights_digest(start: Path | None) -> str | None:
    """What a run began with, for its identity: a digest of all weights in the file or below the folder ``start``."""
    if start is None:
        return None
    digest = hashlib.sha256()
    for path in [start] if start.is_file() else sorted(start.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_module(
    path: Path, module: nn.Module, metadata: Mapping[str, str] | None = None, *, half: bool = False
) -> None:
    """Write a module's weights, in fp16 if ``half``."""
    dtype = torch.float16 if half else torch.float32
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    write_tensors(path, state, metadata or {})


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Keep what was measured of a model beside it, for its card."""
    write_json(make_folder(folder) / "figures.json", figures)


def device_name(device: torch.device) -> str:
    """The machine in words, for a model's card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _note_session(
    folder: Path, config: LearnConfig, device: torch.device, first: int, last: int, seconds: float
) -> None:
    """One line for every time that a training ran: what a model's card reports."""
    if last == first:
        return
    arguments = ["FOLDER" if before in ("--out", "--start") else word for before, word in pairwise(sys.argv)]
    line = {
        "command": shlex.join(["python", "-m", "benchmarks.small_models.learn", *arguments]),
        "seed": config.learn_seed,
        "machine": device_name(device),
        "from_step": first,
        "to_step": last,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }
    with open(folder / SESSIONS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
