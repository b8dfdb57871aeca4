"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.config import Config, setting
from ..utils.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training recipe: what is learned, with which loss, and what is written while it runs."""

    steps: int | None = setting(None, "optimizer steps; default 500 per concept", low=1, high=10_000_000)
    batch_size: int = setting(2, "composites per step", low=1, high=4096)
    prior_batch_size: int = setting(
        2, "class pictures per step (prior preservation); 0 switches them off", low=0, high=4096
    )
    micro_batch: int | None = setting(
        None, "samples run at once, none for all; fewer need less memory for the same step", low=1, high=4096
    )
    train_seed: int = setting(0, "seed of noise, timesteps and batch order", low=0, high=2**63 - 1)
    embedding_lr: float = setting(5e-4, "learning rate of the modifier tokens' embeddings", low=0, high=1)
    trainable: str = setting(
        "attention",  # in benchmarks/reports/2026-11-26/tuning.md it learns looks that K and V alone don't
        "what learns beside the embeddings; attention: low-rank changes of all attention; kv: cross-attention K and V",
        choices=("attention", "kv"),
    )
    kv_lr: float = setting(
        1e-5, "learning rate of cross-attention K and V, per sample of the whole step", low=0, high=1
    )
    low_rank: int = setting(8, "rank of the changes of all attention", low=1, high=1024)
    low_rank_lr: float = setting(
        3e-5, "learning rate of the changes of all attention, per sample of the whole step", low=0, high=1
    )
    lr_decay: float = setting(
        0.5,  # benchmarks/reports/2026-11-26/tuning.md: subjects alone get better, none together worse
        "share of the steps, the last ones, over which all learning rates fall linearly to 0; 0 keeps them",
        low=0,
        high=1,
    )
    weight_decay: float = setting(0.01, "AdamW decay of the model's changes (embeddings have none)", low=0, high=1)
    grad_clip: float = setting(1.0, "largest norm of the whole gradient", low=1e-6, high=1e6)
    vectors_per_token: int = setting(1, "embedding vectors behind each modifier token", low=1, high=16)
    prior_weight: float = setting(1.0, "weight of the prior preservation loss", low=0, high=100)
    background_weight: float = setting(0.3, "weight of the denoising error outside the subjects", low=0, high=1)
    per_mention: bool = setting(
        True,  # better on each of three dev pairs (benchmarks/reports/2026-11-27)
        "in the losses each subject of a composite counts alike; off: each cell, so that large ones count more",
    )
    min_snr_gamma: float | None = setting(5.0, "Min-SNR weighting; none switches it off", low=0.01, high=1e6)
    refinement_weight: float = setting(
        0.01, "weight λ of the localized refinement loss; 0 switches it off", low=0, high=100
    )
    refinement_ramp: float = setting(0.1, "share of the steps over which λ rises from 0", low=0, high=1)
    noun_weight: float = setting(0.5, "weight of the class nouns' maps in the localization loss", low=0, high=10)
    competition_weight: float = setting(1.0, "weight of the competition between mentions", low=0, high=10)
    localization: str = setting("mse", "form of the localization loss", choices=("mse", "none"))
    attention_cells: int = setting(
        16, "supervise the smallest attention maps of at least this many cells a side", low=2, high=256
    )
    prior_pictures: int = setting(
        50, "class pictures per noun that the base draws where the dataset has none", low=1, high=10_000
    )
    prior_steps: int = setting(20, "sampling steps of those class pictures (DPM-Solver++)", low=1, high=1000)
    prior_cache: str | None = setting(
        None,
        "folder that keeps those class pictures for other runs with the same base, size, steps and seed; "
        "default: the run's own",
        shapes_result=False,
    )
    gradient_checkpointing: bool = setting(False, "trade time for memory in the UNet", shapes_result=False)
    memory: str = setting(
        "auto",
        "fast: the whole step at once; lean: checkpointed, for small cards; auto: on a CUDA card what fits, else fast",
        choices=("auto", "fast", "lean"),
        shapes_result=False,
    )
    compile: bool = setting(
        False, "compile the UNet's blocks: minutes at the start, faster steps after", shapes_result=False
    )
    precision: str = setting("auto", "arithmetic of the frozen model", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, xpu …", shapes_result=False)
    save_every: int = setting(100, "steps between checkpoints", low=1, high=10_000_000, shapes_result=False)
    keep_checkpoints: int = setting(2, "checkpoints kept on disk", low=1, high=10_000, shapes_result=False)
    sample_every: int = setting(
        250, "steps between sample pictures; 0 switches them off", low=0, high=10_000_000, shapes_result=False
    )
    sample_steps: int = setting(25, "sampling steps of the sample pictures", low=1, high=1000, shapes_result=False)
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts of the sample pictures; default: each concept, and all together", shapes_result=False
    )

    def check(self) -> None:
        if self.embedding_lr == 0 and self.change_lr == 0:
            raise ConfigError("embedding_lr: both learning rates are 0, so nothing would be learned; raise one")

    @property
    def change_lr(self) -> float:
        """The rate at which the model's own changes are learned, per sample of the whole step."""
        return self.kv_lr if self.trainable == "kv" else self.low_rank_lr

    def steps_for(self, concepts: int) -> int:
        """Steps of a run: 500 per concept unless set, at most 2,500."""
        return self.steps if self.steps is not None else min(500 * concepts, 2500)
