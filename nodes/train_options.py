"""Advanced options of the training: most fields of TrainConfig as widgets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..far_train.training.settings import TrainConfig
from ..far_train.utils.config import first_name
from . import sockets
from .check import AUTOMATIC, check_choices

# TrainConfig's fields that FaR_TrainOptions shows, in order; FaR_Train itself asks for the few that matter most.
COMMON = ("prior_batch_size", "micro_batch", "gradient_checkpointing", "precision", "sample_every", "save_every")
ADVANCED = (
    "embedding_lr",
    "kv_lr",
    "weight_decay",
    "max_grad_norm",
    "vectors_per_token",
    "prior_loss_weight",
    "background_weight",
    "min_snr_gamma",
    "refinement_weight",
    "refinement_ramp",
    "noun_weight",
    "competition_weight",
    "localization",
    "attention_cells",
    "num_class_images",
    "class_image_steps",
    "sample_steps",
    "keep_checkpoints",
    "trainable",  # last, since saved graphs keep their widgets' values by position
    "lora_rank",
    "lora_lr",
    "lr_decay",
    "fp8_base",
    "output_preservation",
)

# What the node calls them where the field's own name doesn't say it.
LABELS = {
    "prior_batch_size": "regularization batch size",
    "micro_batch": "micro-batch size",
    "gradient_checkpointing": "gradient checkpointing",
    "sample_every": "sample every N steps",
    "save_every": "save every N steps",
    "kv_lr": "K/V learning rate",
    "max_grad_norm": "max gradient norm",
    "prior_loss_weight": "prior loss weight",
    "background_weight": "background loss weight",
    "min_snr_gamma": "Min-SNR gamma",
    "refinement_weight": "refinement loss weight",
    "refinement_ramp": "refinement warm-up",
    "noun_weight": "class noun weight",
    "localization": "localization loss",
    "attention_cells": "attention map size",
    "num_class_images": "regularization images per class",
    "class_image_steps": "regularization image steps",
    "trainable": "trained weights",
    "lora_rank": "LoRA rank",
    "lora_lr": "LoRA learning rate",
    "lr_decay": "learning rate decay",
    "fp8_base": "fp8 base",
    "output_preservation": "output preservation",
}
TOOLTIPS = {
    "prior_batch_size": "Regularization images per step (prior preservation). 0: off.",
    "micro_batch": "Samples per forward pass. The result is the same; fewer need less memory. 0: automatic.",
    "gradient_checkpointing": "Use less memory, at the cost of speed.",
    "precision": "Precision of the frozen base model.",
    "sample_every": "Steps between sample images. 0: no samples.",
    "embedding_lr": "Learning rate of the placeholder tokens' embeddings.",
    "kv_lr": "Learning rate of the cross-attention K/V weights, multiplied by the samples per step. Only if trained "
    "weights is kv.",
    "weight_decay": "AdamW weight decay. Embeddings are not decayed.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "vectors_per_token": "Embedding vectors per placeholder token.",
    "background_weight": "Weight of the denoising loss outside the subjects.",
    "min_snr_gamma": "Gamma of Min-SNR loss weighting. 0: off.",
    "refinement_weight": "Weight of the localized refinement loss (lambda). 0: off.",
    "refinement_ramp": "Fraction of the steps over which the refinement loss weight rises from 0.",
    "noun_weight": "Weight of the class nouns' attention maps in the localization loss.",
    "competition_weight": "Weight of the loss that keeps the attention of different subjects apart.",
    "localization": "Form of the localization loss.",
    "attention_cells": "Supervise the smallest attention maps of at least this many cells per side.",
    "num_class_images": "Regularization images per class noun to generate if the dataset has none.",
    "class_image_steps": "Sampling steps of these regularization images (DPM-Solver++).",
    "sample_steps": "Sampling steps of the sample images.",
    "keep_checkpoints": "Checkpoints to keep on disk.",
    "trainable": "What is trained besides the embeddings. lora: LoRA of all attention layers; kv: cross-attention "
    "K/V weights (Custom Diffusion), too many in Stable Diffusion XL.",
    "lora_rank": "Rank of the LoRA. Only if trained weights is lora.",
    "lora_lr": "Learning rate of the LoRA, multiplied by the samples per step. Only if trained weights is lora.",
    "lr_decay": "Fraction of the steps, at the end, over which all learning rates decay linearly to 0. 0: constant.",
    "output_preservation": "Around the subjects and in regularization images, learn what the base model predicts "
    "instead of the image (differential output preservation). Keeps the base's style, for about 40 % more computation.",
    "fp8_base": "Hold the UNet's frozen weights in 8 bits: half of their memory, slightly less exact. Only if trained "
    "weights is lora.",
}


@dataclass(frozen=True)
class Options:
    """What FAR_OPTIONS carries: fields of TrainConfig, after how many minutes a training stops (0: never), and the
    encoder that judges its result."""

    settings: dict[str, Any] = field(default_factory=dict)
    time_limit: float = 0.0
    check_with: str = AUTOMATIC


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
        check_with = io.Combo.Input(
            "check_with",
            options=check_choices(),
            default=AUTOMATIC,
            display_name="check with",
            optional=True,
            tooltip="The image encoder that judges the result: after the training, each concept is drawn alone and all "
            "together, and compared with the dataset. automatic: the first folder in models/clip_vision, if there is "
            "one and a SAM in models/sams. off: no check. The mini oracle only knows the drawn subjects of FaR Mini "
            "Photos.",
        )
        common = [_setting_input(fields[name], advanced=False) for name in COMMON]
        return sockets.schema(
            node_id="FaR_TrainOptions",
            display_name="FaR Train Options",
            description="Advanced options of FaR Train. The defaults are good for most trainings.",
            search_aliases=["fuse and refine", "training settings"],
            inputs=[
                limit,
                *common,
                *(_setting_input(fields[name], advanced=True) for name in ADVANCED),
                check_with,  # last, since saved graphs keep their widgets' values by position
            ],
            outputs=[sockets.FarOptions.Output(display_name="options", tooltip="For FaR Train.")],
        )

    @classmethod
    def execute(cls, time_limit: float, check_with: str = AUTOMATIC, **settings: Any) -> io.NodeOutput:
        kinds = TrainConfig.kinds()
        settings = TrainConfig.current_names(settings)
        settings = {k: None if kinds[k].optional and not v else v for k, v in settings.items()}
        TrainConfig(**settings)  # a bad combination is reported here, where it was made
        return io.NodeOutput(Options(settings, time_limit, check_with))


def _setting_input(setting: dataclasses.Field, advanced: bool) -> io.Input:
    """A widget for a field of TrainConfig, with the field's own help and range; 0 stands for "none".

    Its id is the setting's first name, and former choices stay behind those of today: saved graphs hold them.
    """
    about, default, name = setting.metadata, setting.default, first_name(setting)
    kind = TrainConfig.kinds()[setting.name]
    tooltip = TOOLTIPS.get(setting.name) or about["help"][0].upper() + about["help"][1:] + "."
    for old, new in about["was_values"].items():
        tooltip += f" {old} is the former name of {new}."
    if kind.optional and "0:" not in tooltip:
        tooltip += " 0: none."
    shared = {"display_name": LABELS.get(setting.name), "tooltip": tooltip, "extra_dict": {"advanced": advanced}}
    shared["optional"] = about["before"] is not ...  # graphs in API format that were saved before it lack it
    if about["choices"]:
        return io.Combo.Input(name, options=[*about["choices"], *about["was_values"]], default=default, **shared)
    if kind.type is bool:
        return io.Boolean.Input(name, default=default, **shared)
    bounds = {"min": 0 if kind.optional else about["low"], "max": about["high"], **shared}
    if kind.type is float:
        step = 1e-6 if name.endswith("_lr") else 0.001
        return io.Float.Input(name, default=default or 0.0, step=step, round=False, **bounds)
    return io.Int.Input(name, default=default or 0, **bounds)


NODES: list[type[io.ComfyNode]] = [TrainOptions]
