"""What a run holds while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.concepts import TrainingSet
from ..models.adapters import Adapter
from ..models.attention_maps import AttentionRecorder
from ..models.base import BaseModel
from ..models.conditioning import TextConditioner
from ..models.tokens import Vocabulary
from .distributed import World
from .latent_cache import LatentCache
from .loss_scaler import LossScaler
from .oom_fallback import OomFallback
from .run_folder import CHECKPOINTS
from .settings import TrainConfig
from .step_graph import GraphedPasses


@dataclass(eq=False)
class RunState:
    """Everything that a step needs; :func:`build.build_run` makes it, :func:`step.take_step` advances it.

    ``step`` of ``steps`` are taken. ``training_set`` includes regularization images that the run has drawn.
    ``alphas_cumprod`` [timesteps] is ᾱ of the noise schedule, on the device. ``recorder`` is None for a run without
    refinement loss. ``graphed_passes`` runs the step's passes from a CUDA graph; None: they run eagerly.
    """

    base: BaseModel
    training_set: TrainingSet
    config: TrainConfig
    folder: Path
    world: World
    device: torch.device
    dtype: torch.dtype
    steps: int
    step: int
    vocabulary: Vocabulary
    latent_cache: LatentCache
    conditioner: TextConditioner
    alphas_cumprod: Tensor
    adapter: Adapter
    recorder: AttentionRecorder | None
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    oom_fallback: OomFallback
    graphed_passes: GraphedPasses | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return self.training_set.size, self.training_set.size

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    def saved(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds besides the optimizer's moments: the learned parameters and fp16's loss scale."""
        return {**self.adapter.named_parameters(), **self.scaler.saved()}

    def release_graphs(self) -> None:
        """Give the memory of captured graphs back, for other work between steps; the next step captures anew."""
        if self.graphed_passes is not None:
            self.graphed_passes.release()
