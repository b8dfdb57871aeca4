"""What several commands have in common: the base model's flags, and how inputs are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import ConfigError
from .parsing import Argument, Inputs

if TYPE_CHECKING:
    from ..models.base import BaseModel

MAX_SHOWN = 96  # pictures on a contact sheet; JPEG ends at 65,535 pixels a side

BASE = (
    Argument(
        "base", "base model, SD 1.5, 2.1 or XL: a .safetensors file, or a folder in diffusers' layout", required=True
    ),
    Argument("base_config", "folder with the component configs, for single files of another size than their family's"),
    Argument("prediction_type", "v_prediction or epsilon; default: detected from the weights"),
)
DEVICE = Argument("device", "auto, cpu, cuda, cuda:1, mps, xpu … (default: auto)")


def open_base(inputs: Inputs) -> BaseModel:
    """The base model that :data:`BASE` names. Raises BaseModelError."""
    from ..models.loading import load_base

    return load_base(inputs["base"], prediction_type=inputs.get("prediction_type"), config=inputs.get("base_config"))


def device_name(inputs: Inputs) -> str:
    return str(inputs.get("device") or "auto")


def beside(folder: Path, suffix: str) -> Path:
    """FOLDER.suffix: a sheet inside the folder would be taken for one of its pictures."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.{suffix}")


def texts(value: str | Sequence[Any] | None) -> list[str]:
    """A repeatable input: a settings file may hold a single text in place of a list."""
    return [value] if isinstance(value, str) else [str(v) for v in value or ()]


def picture_count(inputs: Inputs, default: int) -> int:
    """The number of pictures to draw of each. Raises ConfigError."""
    count = inputs.get("count", default)
    if count < 1:
        raise ConfigError(f"count: {count!r} is no number of pictures; use 1 or more")
    return count
