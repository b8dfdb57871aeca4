"""Settings of the speed benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from far_train.utils.config import Config, setting
from far_train.utils.errors import ConfigError


@dataclass(frozen=True)
class SpeedConfig(Config):
    """What the speed benchmark measures, and how often."""

    model: str = setting(
        "auto",
        "small: the trained model that comes with the project; sd21: Stable Diffusion 2.1 at its real size with random "
        "weights, which are as fast as trained ones; auto: sd21 on an accelerator, small on a CPU",
        choices=("auto", "small", "sd21"),
    )
    sizes: tuple[int, ...] = setting((), "sides of the pictures in pixels; default 512 768 (on a CPU 256, small 128)")
    batches: tuple[int, ...] = setting((), "samples in a step; default 1 2 4 8 (sd21 on a CPU: 1 2)")
    warmup: int = setting(3, "steps before anything is measured", low=1, high=1000)
    repeats: int = setting(10, "number of measurements of a step, or of a block of five on a GPU", low=1, high=1000)
    phases: bool = setting(True, "also measure the phases of a whole run")
    sweep: bool = setting(False, "also measure a step with larger latent caches and with one to four concepts")
    compile: bool = setting(False, "also measure the fast mode with compiled blocks")
    precision: str = setting("auto", "arithmetic of the frozen model", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, xpu …")

    def check(self) -> None:
        for name, values in (("sizes", self.sizes), ("batches", self.batches)):
            if any(v < 1 for v in values):
                raise ConfigError(f"{name}: {min(values)} is out of range; it must be at least 1")
