"""Settings of the quality benchmark, in a module that imports fast because --help needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from far_train.utils.config import Config, setting


@dataclass(frozen=True)
class BenchConfig(Config):
    """What ``python -m benchmarks.quality`` runs."""

    plan: str = setting(
        "reduced",
        "reduced: core arms on two dev pairs; dev: all arms on nine dev pairs, a triple and three alone; core: core "
        "arms and the upper bound on all test groups, two seeds; full: all arms on them, three seeds",
        choices=("reduced", "dev", "core", "full"),
    )
    arms: tuple[str, ...] = setting((), "only these arms, by name")
    groups: tuple[str, ...] = setting((), "only these groups of the plan, by name")
    more_pictures: int = setting(1, "factor on the plan's number of pictures", low=1, high=64)
    seeds: int | None = setting(None, "runs of each arm and group (default: the plan's)", low=1, high=100)
    # For tuning: the same change to all arms.
    steps: int | None = setting(None, "training steps of every arm (default: each arm's own)", low=1, high=100_000)
    kv_lr: float | None = setting(None, "learning rate of K and V in every arm that trains them", low=0, high=1)
    lora_lr: float | None = setting(
        None, "LoRA learning rate of every arm that trains one", low=0, high=1, was=("low_rank_lr",)
    )
    embedding_lr: float | None = setting(None, "learning rate of the embeddings in every arm", low=0, high=1)

    def training_changes(self) -> dict[str, Any]:
        """Changes of every arm's training."""
        names = ("steps", "kv_lr", "lora_lr", "embedding_lr")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
