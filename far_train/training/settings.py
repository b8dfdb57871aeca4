"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.config import Config, setting
from ..utils.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training recipe: what is trained, with which loss, and what is written meanwhile."""

    steps: int | None = setting(None, "optimizer steps; default: 500 per concept, at most 2500", low=1, high=10_000_000)
    batch_size: int = setting(2, "composites per step", low=1, high=4096)
    prior_batch_size: int = setting(
        2, "regularization images per step (prior preservation); 0 disables them", low=0, high=4096
    )
    micro_batch: int | None = setting(
        None,
        "samples per forward pass; fewer need less memory, and the step stays the same (gradient accumulation); "
        "default: all of a step, on a CUDA device as many as fit",
        low=1,
        high=4096,
        shapes_result=False,
    )
    train_seed: int = setting(0, "random seed of noise, timesteps and batch order", low=0, high=2**63 - 1)
    embedding_lr: float = setting(5e-4, "learning rate of the placeholder tokens' embeddings", low=0, high=1)
    trainable: str = setting(
        "lora",  # in benchmarks/reports/2026-11-26/tuning.md it learns looks that K and V alone don't
        "what is trained besides the embeddings; lora: LoRA on all attention layers; kv: the key and value matrices of "
        "cross-attention, as in Custom Diffusion",
        choices=("lora", "kv"),
        was_values={"attention": "lora"},
    )
    kv_lr: float = setting(
        1e-5,
        "learning rate of the key and value matrices; multiplied by the samples per step",
        low=0,
        high=1,
    )
    lora_rank: int = setting(
        8, "LoRA rank (network_dim in kohya's tools); alpha equals it", low=1, high=1024, was=("low_rank",)
    )
    lora_lr: float = setting(
        3e-5,
        "learning rate of the LoRA, multiplied by the samples per step: AdamW's is 1.2e-4 with the default 2 + 2",
        low=0,
        high=1,
        was=("low_rank_lr",),
    )
    lr_decay: float = setting(
        0.5,  # benchmarks/reports/2026-11-26/tuning.md: subjects alone get better, none together worse
        "fraction of the steps, at the end, over which all learning rates fall linearly to 0; 0: constant rates",
        low=0,
        high=1,
    )
    weight_decay: float = setting(
        0.01, "AdamW weight decay of the UNet's trained weights; embeddings have none", low=0, high=1
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", low=1e-6, high=1e6, was=("grad_clip",))
    vectors_per_token: int = setting(1, "embedding vectors per placeholder token", low=1, high=16)
    prior_loss_weight: float = setting(
        1.0, "weight of the prior preservation loss", low=0, high=100, was=("prior_weight",)
    )
    output_preservation: bool = setting(
        True,
        "around the subjects and in regularization images, learn what the base model predicts there instead of the "
        "image (differential output preservation): keeps the base's style, for about 40 % more computation",
        before=False,
    )
    background_weight: float = setting(0.1, "weight of the denoising loss outside the subjects' masks", low=0, high=1)
    per_mention: bool = setting(
        True,  # better on each of three dev pairs (benchmarks/reports/2026-11-27)
        "average the losses over subjects, so that small and large ones count alike; off: over latent pixels, so that "
        "large ones count more",
    )
    min_snr_gamma: float | None = setting(
        5.0, "gamma of the Min-SNR loss weighting; none disables it", low=0.01, high=1e6
    )
    refinement_weight: float = setting(
        0.01, "weight λ of the localized refinement loss; 0 disables it", low=0, high=100
    )
    refinement_ramp: float = setting(0.1, "fraction of the steps over which λ rises linearly from 0", low=0, high=1)
    noun_weight: float = setting(
        0.5, "weight of the class nouns' attention maps in the localization loss", low=0, high=10
    )
    competition_weight: float = setting(
        1.0, "weight of the competition loss, which keeps the subjects' attention maps apart", low=0, high=10
    )
    localization: str = setting("mse", "form of the localization loss; none disables it", choices=("mse", "none"))
    attention_cells: int = setting(
        16, "attention maps of this many cells a side are supervised, or the next larger ones", low=2, high=256
    )
    num_class_images: int = setting(
        50,
        "regularization images to generate per class noun, if the dataset has none",
        low=1,
        high=10_000,
        was=("prior_pictures",),
    )
    class_image_steps: int = setting(
        20,
        "sampling steps of generated regularization images (DPM-Solver++)",
        low=1,
        high=500,
        was=("prior_steps",),
    )
    class_image_cache: str | None = setting(
        None,
        "folder that keeps generated regularization images for other runs with the same base model, size, steps and "
        "seed; default: inside the run folder",
        shapes_result=False,
        was=("prior_cache",),
    )
    encoding_cache: str | None = setting(
        None,
        "folder that keeps encoded images for other runs with the same VAE; default: inside the run folder, until the "
        "run is finished",
        shapes_result=False,
    )
    gradient_checkpointing: bool = setting(
        False, "recompute the UNet's activations: less memory, slower steps", shapes_result=False
    )
    memory: str = setting(
        "auto",
        "fast: the whole step at once; lean: with gradient checkpointing, for small GPUs; auto: the fastest that fits "
        "on a CUDA device, fast elsewhere",
        choices=("auto", "fast", "lean"),
        shapes_result=False,
    )
    cuda_graph: str = setting(
        "auto",
        "run a step's forward and backward passes from a CUDA graph: faster on fast GPUs; auto: on a CUDA device",
        choices=("auto", "on", "off"),
        shapes_result=False,
    )
    compile: bool = setting(
        False,
        "compile the UNet's blocks with torch.compile: a minute or more at the start, faster steps afterwards",
        shapes_result=False,
    )
    precision: str = setting("auto", "precision of the frozen weights", choices=("auto", "fp32", "bf16", "fp16"))
    fp8_base: bool = setting(
        False,
        "hold the UNet's frozen weights in 8 bits, half of their memory in bf16: for SDXL on 8 GB; only with lora",
        before=False,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, xpu …", shapes_result=False)
    save_every: int = setting(100, "steps between checkpoints", low=1, high=10_000_000, shapes_result=False)
    keep_checkpoints: int = setting(2, "number of checkpoints to keep", low=1, high=10_000, shapes_result=False)
    sample_every: int = setting(
        250, "steps between sample images; 0 disables them", low=0, high=10_000_000, shapes_result=False
    )
    sample_steps: int = setting(25, "sampling steps of the sample images", low=1, high=500, shapes_result=False)
    sample_prompts: tuple[str, ...] = setting(
        (),
        "prompts of the sample images; default: one per concept, and one with all of them",
        shapes_result=False,
    )

    def check(self) -> None:
        if self.embedding_lr == 0 and self.change_lr == 0:
            raise ConfigError("embedding_lr: both learning rates are 0, so nothing would be learned; raise one")
        if self.fp8_base and self.trainable == "kv":
            raise ConfigError(
                "fp8_base: kv changes the weights that it would round; use trainable lora, or switch it off"
            )

    @property
    def change_lr(self) -> float:
        """Learning rate of the UNet's trained weights, per sample of a step."""
        return self.kv_lr if self.trainable == "kv" else self.lora_lr

    def steps_for(self, concepts: int) -> int:
        """Steps of a run: 500 per concept unless set, at most 2,500."""
        return self.steps if self.steps is not None else min(500 * concepts, 2500)
