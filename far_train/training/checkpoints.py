"""Checkpoints: written atomically, verified by a checksum when read, resumable to the bit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fingerprint import fingerprint
from ..utils.errors import CheckpointError, UnreadableFile
from ..utils.files import parse_json, read_tensors, write_tensors

log = logging.getLogger(__name__)

LOSS_SCALE = "scaler"  # by which name a checkpoint has fp16's loss scale

_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    keep: int,
    precision: torch.dtype | None = None,
) -> Path:
    """Write parameters and optimizer moments after ``step`` steps, then delete all but the newest ``keep`` files.

    Others are deleted only when the new one is complete on disk. ``precision``: of the frozen weights, for
    :func:`load_checkpoint` to compare. Raises OutputError.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    path = folder / f"checkpoint-{step:08d}.safetensors"
    about = {"step": step, "sha256": fingerprint(tensors)} | ({"precision": _short(precision)} if precision else {})
    write_tensors(path, tensors, {"far_checkpoint": json.dumps(about)})
    # Those of later steps are damaged, or the run would have gone on from them.
    later = [p for p in _checkpoints(folder) if p.name > path.name]
    for old in later + _checkpoints(folder)[len(later) + keep :]:
        old.unlink(missing_ok=True)
    return path


def checkpoint_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """The approximate size of a checkpoint of these parameters: their values and AdamW's two moments."""
    return 3 * sum(p.numel() * p.element_size() for p in parameters.values())


def weights_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """The approximate size of the weights file of these parameters, whose values are saved in fp16."""
    return sum(p.numel() * torch.float16.itemsize for p in parameters.values())


def load_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    precision: torch.dtype | None = None,
) -> int:
    """Restore the newest intact checkpoint; returns its step, or 0 if there is no checkpoint.

    A damaged file is skipped with a warning. Another ``precision`` than it was saved at, as another device may choose,
    is told in a warning; a loss scale, which only fp16 has, then stays as it is in ``parameters``. Raises
    CheckpointError if all are damaged, or if the newest intact one belongs to other parameters.
    """
    found = _checkpoints(folder)
    for path in found:
        try:
            about, tensors = _read(path)
        except (UnreadableFile, ValueError, KeyError, TypeError) as e:
            log.warning("%s is damaged (%s); trying the one before.", path.name, e)
            continue
        before, now = about.get("precision"), _short(precision) if precision else None
        if before and now and before != now:
            log.warning("The run goes on in %s; until step %d it was trained in %s.", now, about["step"], before)
            parameters = {k: p for k, p in parameters.items() if k != LOSS_SCALE or f"value/{k}" in tensors}
        _restore(path, tensors, parameters, optimizer)
        return about["step"]
    if found:
        raise CheckpointError(f"{folder}: all {len(found)} checkpoints are damaged; start anew in another folder")
    return 0


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, which may be damaged; 0 if there is none."""
    found = _checkpoints(folder)
    return int(_NAME.fullmatch(found[0].name)[1]) if found else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _short(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, metadata = read_tensors(path)
    about = parse_json(metadata["far_checkpoint"])
    if fingerprint(tensors) != about["sha256"]:
        raise ValueError("its content doesn't match its checksum")
    if about["step"] != int(_NAME.fullmatch(path.name)[1]):
        raise ValueError(f"it is of step {about['step']}")
    return about, tensors


def _restore(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    for name, parameter in parameters.items():
        value = tensors.get(f"value/{name}")
        moments = {k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors}
        shapes = [tuple(m.shape) for m in moments.values()]
        fitting = ([], [parameter.shape], [(), parameter.shape, parameter.shape])  # none yet, Muon's, AdamW's
        if value is None or value.shape != parameter.shape or shapes not in fitting:
            raise CheckpointError(
                f"{path}: holds no matching '{name}'; it belongs to another run, choose another folder"
            )
        with torch.no_grad():
            parameter.copy_(value)
        # A fused AdamW counts its steps where the parameters are.
        optimizer.state[parameter] = {k: m.to(parameter.device) for k, m in moments.items()}
