"""Settings of image generation, and what adapters need of a training's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..utils.config import Config, setting
from ..utils.errors import ConfigError


@dataclass(frozen=True)
class DrawConfig(Config):
    """How a base draws images."""

    sample_seed: int = setting(0, "random seed of the first image; each further one adds 1", low=0, high=2**63 - 1)
    sampler: str = setting("ddim", "ddim, or dpm++ (DPM-Solver++), which needs fewer steps", choices=("ddim", "dpm++"))
    sampling_steps: int = setting(50, "sampling steps", low=1, high=500)
    guidance: float = setting(7.0, "classifier-free guidance scale", low=1, high=50)
    negative_prompt: str = setting("", "what the images should not show")
    width: int | None = setting(None, "width in pixels; default: the base model's own", low=64, high=4096)
    height: int | None = setting(None, "height in pixels; default: the base model's own", low=64, high=4096)
    sample_batch: int = setting(4, "images per batch", low=1, high=256)


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """How images are drawn with FaR weights."""

    strength: float = setting(1.0, "strength of the trained UNet weights; 0 disables them", low=-4, high=4)
    concept_strength: dict[str, float] | None = setting(
        None, "strength of each placeholder token; 0: the class noun's embedding, 1: the learned one"
    )

    def check(self) -> None:
        for token, value in (self.concept_strength or {}).items():
            if not -4 <= value <= 4:
                raise ConfigError(f"concept_strength: {value} for {token} is out of range; it must be between -4 and 4")


class AdapterSettings(Protocol):
    """What adapters need of a training's settings; ``TrainConfig`` has it all."""

    @property
    def trainable(self) -> str: ...

    @property
    def lora_rank(self) -> int: ...

    @property
    def vectors_per_token(self) -> int: ...

    @property
    def train_seed(self) -> int: ...

    @property
    def embedding_lr(self) -> float: ...

    @property
    def change_lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...
