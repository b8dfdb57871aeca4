"""Advanced options of the training: most fields of TrainConfig as widgets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..far_train.utils.config import TrainConfig
from . import sockets

# TrainConfig's fields that FaR_TrainOptions shows, in order; FaR_Train itself asks for the few that matter most.
COMMON = ("prior_batch_size", "micro_batch", "gradient_checkpointing", "precision", "sample_every", "save_every")
ADVANCED = (
    "embedding_lr",
    "kv_lr",
    "weight_decay",
    "grad_clip",
    "vectors_per_token",
    "prior_weight",
    "background_weight",
    "min_snr_gamma",
    "refinement_weight",
    "refinement_ramp",
    "noun_weight",
    "competition_weight",
    "localization",
    "attention_cells",
    "prior_pictures",
    "prior_steps",
    "sample_steps",
    "keep_checkpoints",
    "trainable",  # last, since saved graphs keep their widgets' values by position
    "low_rank",
    "low_rank_lr",
    "lr_decay",
)

# What the node calls them where the field's own name doesn't say it.
LABELS = {
    "prior_batch_size": "regularization batch size",
    "micro_batch": "micro-batch size",
    "gradient_checkpointing": "gradient checkpointing",
    "sample_every": "sample every N steps",
    "save_every": "save every N steps",
    "kv_lr": "K/V learning rate",
    "grad_clip": "max gradient norm",
    "prior_weight": "prior loss weight",
    "background_weight": "background loss weight",
    "min_snr_gamma": "Min-SNR gamma",
    "refinement_weight": "refinement loss weight",
    "refinement_ramp": "refinement warm-up",
    "noun_weight": "class noun weight",
    "localization": "localization loss",
    "attention_cells": "attention map size",
    "prior_pictures": "regularization images per class",
    "prior_steps": "regularization image steps",
    "trainable": "trained weights",
    "low_rank": "LoRA rank",
    "low_rank_lr": "LoRA learning rate",
    "lr_decay": "learning rate decay",
}
TOOLTIPS = {
    "prior_batch_size": "Regularization images per step (prior preservation). 0: off.",
    "micro_batch": "Samples per forward pass. The result is the same; fewer need less memory. 0: all at once.",
    "gradient_checkpointing": "Use less memory, at the cost of speed.",
    "precision": "Precision of the frozen base model.",
    "sample_every": "Steps between sample images. 0: no samples.",
    "embedding_lr": "Learning rate of the placeholder tokens' embeddings.",
    "kv_lr": "Learning rate of the cross-attention K/V weights, multiplied by the samples per step. Only if trained "
    "weights is kv.",
    "weight_decay": "AdamW weight decay. Embeddings are not decayed.",
    "grad_clip": "Gradients are clipped to this norm.",
    "vectors_per_token": "Embedding vectors per placeholder token.",
    "background_weight": "Weight of the denoising loss outside the subjects.",
    "min_snr_gamma": "Gamma of Min-SNR loss weighting. 0: off.",
    "refinement_weight": "Weight of the localized refinement loss (lambda). 0: off.",
    "refinement_ramp": "Fraction of the steps over which the refinement loss weight rises from 0.",
    "noun_weight": "Weight of the class nouns' attention maps in the localization loss.",
    "competition_weight": "Weight of the loss that keeps the attention of different subjects apart.",
    "localization": "Form of the localization loss.",
    "attention_cells": "Supervise the smallest attention maps of at least this many cells per side.",
    "prior_pictures": "Regularization images per class noun to generate if the dataset has none.",
    "prior_steps": "Sampling steps of these regularization images (DPM-Solver++).",
    "sample_steps": "Sampling steps of the sample images.",
    "keep_checkpoints": "Checkpoints to keep on disk.",
    "trainable": "What is trained besides the embeddings. attention: LoRA of all attention layers; kv: cross-attention "
    "K/V weights (Custom Diffusion).",
    "low_rank": "Rank of the LoRA. Only if trained weights is attention.",
    "low_rank_lr": "Learning rate of the LoRA, multiplied by the samples per step. Only if trained weights is "
    "attention.",
    "lr_decay": "Fraction of the steps, at the end, over which all learning rates decay linearly to 0. 0: constant.",
}


@dataclass(frozen=True)
class Options:
    """What FAR_OPTIONS carries: fields of TrainConfig, and after how many minutes a training stops (0: never)."""

    settings: dict[str, Any] = field(default_factory=dict)
    time_limit: float = 0.0


class TrainOptions(io.ComfyNode):
    """Advanced options of the training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
        limit = io.Float.Input(
            "time_limit",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=1.0,
            tooltip="Minutes after which the training saves a checkpoint and stops. Run the workflow again to resume. "
            "0: no limit.",
        )
        common = [_setting_input(fields[name], advanced=False) for name in COMMON]
        return sockets.schema(
            node_id="FaR_TrainOptions",
            display_name="FaR Train Options",
            description="Advanced options of FaR Train. The defaults are good for most trainings.",
            search_aliases=["fuse and refine", "training settings"],
            inputs=[limit, *common, *(_setting_input(fields[name], advanced=True) for name in ADVANCED)],
            outputs=[sockets.FarOptions.Output(display_name="options", tooltip="For FaR Train.")],
        )

    @classmethod
    def execute(cls, time_limit: float, **settings: Any) -> io.NodeOutput:
        optional = {f.name for f in dataclasses.fields(TrainConfig) if f.default is None or f.name == "min_snr_gamma"}
        settings = {k: None if k in optional and not v else v for k, v in settings.items()}
        TrainConfig(**settings)  # a bad combination is reported here, where it was made
        return io.NodeOutput(Options(settings, time_limit))


def _setting_input(setting: dataclasses.Field, advanced: bool) -> io.Input:
    """A widget for a field of TrainConfig, with the field's own help and range; 0 stands for "none"."""
    about, default = setting.metadata, setting.default
    tooltip = TOOLTIPS.get(setting.name) or about["help"][0].upper() + about["help"][1:] + "."
    shared = {"display_name": LABELS.get(setting.name), "tooltip": tooltip, "extra_dict": {"advanced": advanced}}
    if about["choices"]:
        return io.Combo.Input(setting.name, options=list(about["choices"]), default=default, **shared)
    if isinstance(default, bool):
        return io.Boolean.Input(setting.name, default=default, **shared)
    none_allowed = "None" in str(setting.type)
    if none_allowed:
        shared["tooltip"] += " 0: none."
    low = 0 if none_allowed else about["low"]
    if "float" in str(setting.type):
        step = 1e-6 if setting.name.endswith("_lr") else 0.001
        return io.Float.Input(
            setting.name, default=default or 0.0, min=low, max=about["high"], step=step, round=False, **shared
        )
    return io.Int.Input(setting.name, default=default or 0, min=low, max=about["high"], **shared)


NODES: list[type[io.ComfyNode]] = [TrainOptions]
