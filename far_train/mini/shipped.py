"""The small models and sample subjects that come with the package, to try the full pipeline on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data.captions import Name
from ..data.images import Photo
from ..data.sam import load_sam
from ..data.settings import FusionConfig
from ..models.base import BaseModel
from ..models.loading import load_base
from ..models.settings import SampleConfig
from ..training.settings import TrainConfig
from ..utils.errors import BaseModelError
from .identity import Identity
from .oracle import FILE as ORACLE_FILE
from .oracle import Oracle, load_oracle
from .world import reference_photos

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "base"
SAM = WEIGHTS / "sam" / "sam.safetensors"
ORACLE = WEIGHTS / "oracle" / ORACLE_FILE
SIZE = 128  # pixels, the small base's native side
DRAWING = SampleConfig(sampling_steps=25, guidance=5.0, sample_batch=8)  # tuned for the small base
EMPTY_PLACES = DRAWING.replace(guidance=2.0)  # with more guidance the small base draws empty places too pale
# Tuned for a small model with 16 × 16 latent cells; the defaults are for Stable Diffusion 2.1.
TRAINING = TrainConfig(
    steps=300,
    batch_size=6,
    prior_batch_size=2,
    embedding_lr=1e-2,
    trainable="lora",
    kv_lr=4e-5,
    lora_lr=2e-4,  # times the eight samples of a step: 1.6e-3
    min_snr_gamma=None,
    refinement_weight=0.1,
    sample_every=0,
)
# Subjects of the small world stand upright and side by side in constant light, and pasting leaves no marks. Filled-in
# photos are not used as backgrounds, because in a drawing the outline of the subject remains visible.
FUSING = FusionConfig(
    size=SIZE,
    rotation=0,
    brightness=0,
    collage_caption_probability=0,
    row_probability=1.0,
    background_weights={"scene": 0.85, "plain": 0.15},
)
# The loss of Custom Diffusion and MuDI: no refinement, images learned as they are, all cells and timesteps alike.
PLAIN_LOSS = {
    "refinement_weight": 0.0,
    "output_preservation": False,
    "background_weight": 1.0,
    "min_snr_gamma": None,
}

# Two pairs of look-alikes that the small base was not trained on: dogs with different trim, robots with two different
# details.
SUBJECTS: dict[str, tuple[Name, Identity]] = {
    "rex": (Name("dog", "<rex-dog>"), Identity("dog", "blue", "pink", "plain", "none", "floppy")),
    "max": (Name("dog", "<max-dog>"), Identity("dog", "blue", "yellow", "plain", "none", "floppy")),
    "bolt": (Name("robot", "<bolt-robot>"), Identity("robot", "yellow", "red", "spotted", "scarf", "round")),
    "dot": (Name("robot", "<dot-robot>"), Identity("robot", "yellow", "purple", "spotted", "none", "round")),
}


def small_base() -> BaseModel:
    """The small base model, fp32 on the CPU. Raises BaseModelError."""
    return load_base(_present(BASE))


def small_sam(device: str | torch.device = "cpu") -> Any:
    """The small segment-anything model. Raises BaseModelError, SubjectError."""
    return load_sam(_present(SAM), device)


def small_oracle() -> Oracle:
    """The oracle, for measurement. Raises BaseModelError."""
    return load_oracle(_present(ORACLE))


def sample_photos(subject: str, count: int = 5, size: int = SIZE) -> list[Photo]:
    """Photos of one of ``SUBJECTS`` without masks: several poses, always in the same two places, like the photos
    that users have. Raises KeyError."""
    _, identity = SUBJECTS[subject]
    pictures = reference_photos(identity, seed=list(SUBJECTS).index(subject), count=count, size=size)
    return [Photo(f"{subject}-{i}", image, None, Path(f"{subject}-{i}")) for i, (image, _) in enumerate(pictures)]


def _present(path: Path) -> Path:
    if not path.exists():
        raise BaseModelError(
            f"{path}: the small models' weights are missing; get the complete repository, or train them: "
            "python -m benchmarks.small_models.learn --help"
        )
    return path
