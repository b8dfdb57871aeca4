"""Trainings of the small models that are short enough for tests."""

from __future__ import annotations

from pathlib import Path

from benchmarks.small_models.learning import LearnConfig
from far_train.training.run_folder import read_metrics


def quick(**changes) -> LearnConfig:
    """A dozen steps on the CPU."""
    settings = {
        "steps": 12,
        "batch_size": 4,
        "lr": 2e-3,
        "warmup": 2,
        "device": "cpu",
        "log_every": 1,
        "ema_decay": 0.8,
    }
    return LearnConfig(**{**settings, **changes})


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [m[name] for m in read_metrics(folder / "metrics.jsonl")]
