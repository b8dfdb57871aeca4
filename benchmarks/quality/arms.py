"""The arms of the benchmark: each method as a change to one recipe, with the same photos, class pictures and budget.

Nothing here is tuned on test pairs. benchmarks/reports/2026-11-26/tuning.md lists what was tried on dev pairs.
The names of arms stand in published results and stay as they are; titles may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from far_train.data.settings import FusionConfig
from far_train.mini.shipped import DRAWING, FUSING, PLAIN_LOSS, TRAINING
from far_train.models.settings import SampleConfig
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError

CLASS_PICTURES = 32
PHOTOS = 5  # of each subject
FUSION = FUSING.replace(count=160)
RESIZED_LOSS = PLAIN_LOSS | {"background_weight": 0.0}  # only the photo counts, not the grey around it
NO_REFINEMENT = {"refinement_weight": 0.0}
KV = {"trainable": "kv"}
IMAGES_ALONE = {"output_preservation": False}
# At four times this rate, which FaR used on the first small base, a loss that includes the photos' backgrounds learns
# their places (benchmarks/reports/2026-11-26/tuning.md).
PHOTOS_RATE = {"lora_lr": 1.25e-4}
ORIGINALS = {"layout_weights": {"original": 1.0}}


@dataclass(frozen=True)
class Arm:
    """One method under test.

    ``data``: fused (Concept Fusion with the changes in ``fusion``), true_pairs (the same with true pictures of both),
    resized, seg_mix, true_scenes; without training, none (prompts with bare nouns) or prompt_only (prompts with all
    attributes). ``masks``: exact, shuffled, degraded, sam_refined. ``training``: changes to TRAINING.
    ``photos``: number of each subject. ``class_pictures``: number per noun, drawn with the changes to DRAWING in
    ``class_drawing``.
    """

    name: str
    title: str
    note: str
    data: str = "fused"
    masks: str = "exact"
    fusion: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    photos: int = PHOTOS
    class_pictures: int = CLASS_PICTURES
    class_drawing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        return self.data not in ("none", "prompt_only")

    def train_config(self, train_seed: int) -> TrainConfig:
        return TRAINING.replace(train_seed=train_seed, **self.training)

    def fusion_config(self, fusion_seed: int) -> FusionConfig:
        return FUSION.replace(fusion_seed=fusion_seed, **self.fusion)

    def class_config(self) -> SampleConfig:
        return DRAWING.replace(**self.class_drawing)


CORE = (
    Arm("floor", "Lower bound", "the untrained base, prompted with 'a dog and another dog'", data="none"),
    Arm(
        "custom-diffusion",
        "Custom Diffusion",
        "arXiv 2212.04488: embeddings and K/V, class pictures, photos resized and captioned accordingly",
        data="resized",
        training=RESIZED_LOSS | KV,
    ),
    Arm(
        "seg-mix",
        "Seg-Mix",
        "MuDI, arXiv 2404.04243, on the same modules: 30 % of the pictures are two cut-outs on a plain background",
        data="seg_mix",
        training=PLAIN_LOSS | PHOTOS_RATE,
    ),
    Arm("fusion", "Fusion alone", "Concept Fusion, masked denoising loss, no refinement", training=NO_REFINEMENT),
    Arm("refinement", "Refinement alone", "unchanged photos, with the refinement loss", fusion=ORIGINALS),
    Arm("far", "FaR", "Concept Fusion and Localized Refinement"),
)
FURTHER = (
    Arm(
        "textual-inversion",
        "Textual inversion",
        "arXiv 2208.01618: embeddings only, unchanged photos",
        data="resized",
        training=RESIZED_LOSS | {"lora_lr": 0.0},
    ),
    Arm(
        "dreambooth-lora",
        "DreamBooth-LoRA",
        "arXiv 2208.12242 with 2106.09685: unchanged photos, learned tokens, rank 8 on all attention",
        fusion=ORIGINALS,
        training=PLAIN_LOSS | PHOTOS_RATE,
    ),
    Arm(
        "masked-loss",
        "Custom Diffusion + masked loss",
        "unchanged photos, with FaR's masked denoising loss",
        fusion=ORIGINALS,
        training=NO_REFINEMENT | KV | IMAGES_ALONE,
    ),
    Arm(
        "far-companions",
        "FaR + S3",
        "a tenth of the composites show a subject beside another of its class instead of alone",
        fusion={"layout_weights": {"original": 0.10, "solo": 0.15, "pair": 0.65, "beside_prior": 0.10}},
    ),
    Arm(
        "far-plain-backgrounds",
        "FaR − backgrounds",
        "plain backgrounds only",
        fusion={"background_weights": {"plain": 1.0}},
    ),
    Arm(
        "far-kv",
        "FaR on K/V",
        "FaR's data and loss, with Custom Diffusion's trainable set",
        training=KV,
    ),
    Arm(
        "far-images-alone",
        "FaR − output preservation",
        "backgrounds and class pictures are learned as they are, as in DreamBooth",
        training=IMAGES_ALONE,
    ),
    Arm(
        "far-per-cell",
        "FaR, per cell",
        "the losses weight every cell equally instead of every subject",
        training={"per_mention": False},
    ),
    Arm("far-no-competition", "FaR − competition", "no competition term", training={"competition_weight": 0.0}),
    Arm("far-min-snr", "FaR + Min-SNR", "timesteps weighted as for SD 2.1, γ = 5", training={"min_snr_gamma": 5.0}),
    Arm(
        "far-costly-priors",
        "FaR, 200 class pictures",
        "as public scripts draw them: 200, in 50 steps of DDIM",
        class_pictures=200,
        class_drawing={"sampling_steps": 50},
    ),
    Arm(
        "far-cheap-priors",
        "FaR, 50 class pictures",
        "the product's default: 50, in 20 steps of DPM-Solver++, a tenth of the cost",
        class_pictures=50,
        class_drawing={"sampler": "dpm++", "sampling_steps": 20},
    ),
    Arm("far-no-priors", "FaR, no prior loss", "no class pictures in a step", training={"prior_batch_size": 0}),
    Arm("far-bf16", "FaR in bf16", "trained in bfloat16, as on GPUs", training={"precision": "bf16"}),
    Arm("far-one-photo", "FaR, one photo", "one photo of each subject instead of five", photos=1),
    Arm("far-degraded", "FaR, poor masks", "masks two pixels off, with a part missing", masks="degraded"),
    Arm("far-mended", "FaR, SAM-refined masks", "the poor masks as hints for the small SAM", masks="sam_refined"),
)
CONTROLS = (
    Arm(
        "words",
        "Prompt only",
        "the untrained base, prompted with all attributes of each: what it can draw of two such subjects",
        data="prompt_only",
    ),
    Arm("far-shuffled", "FaR, wrong masks", "each subject has another one's mask: must be worse", masks="shuffled"),
    Arm(
        "far-true-pairs",
        "FaR, true pairs",
        "true pictures of both instead of composites: its distance to the oracle is the cost of learning each alone",
        data="true_pairs",
    ),
    Arm("ceiling", "Oracle", "trained on true pictures of the subjects together", data="true_scenes"),
)
ALL = (*CORE, *FURTHER, *CONTROLS)


def find_arms(names: tuple[str, ...]) -> tuple[Arm, ...]:
    """Arms by name. Raises ConfigError."""
    known = {arm.name: arm for arm in ALL}
    for name in names:
        if name not in known:
            raise ConfigError(f"arms: unknown arm '{name}'; known: {', '.join(known)}")
    return tuple(known[name] for name in names)
