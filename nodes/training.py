"""Training in the graph: the rare knobs, and the trainer itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import TrainingSet
from ..far_train.data.images import from_pil, load_photo
from ..far_train.evaluation.sheets import loss_curves
from ..far_train.models.base import BaseModel
from ..far_train.models.tokens import unknown_tokens
from ..far_train.models.weights import FarWeights
from ..far_train.training.estimate import measure_cost
from ..far_train.training.latent_cache import check_captions
from ..far_train.training.recipe import Callbacks, train
from ..far_train.training.run_folder import WEIGHTS_FILE, find_run, run_identity, what_changed
from ..far_train.training.settings import TrainConfig
from ..far_train.utils.config import first_name
from ..far_train.utils.errors import ConfigError, Interrupted
from . import host, host_ui, sockets
from .live_view import LiveView, metrics_of
from .naming import file_name

# TrainConfig's fields that FaR_TrainOptions shows, in order; FaR_Train itself asks for the few that matter most.
COMMON = ("prior_batch_size", "micro_batch", "gradient_checkpointing", "precision", "sample_every", "save_every")
RARE = (
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
)


@dataclass(frozen=True)
class Options:
    """What FAR_OPTIONS carries: fields of TrainConfig, and after how many minutes a training rests (0: never)."""

    settings: dict[str, Any] = field(default_factory=dict)
    time_limit: float = 0.0


class TrainOptions(io.ComfyNode):
    """The settings of the recipe that are seldom changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
        limit = io.Float.Input(
            "time_limit",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=1.0,
            tooltip="Minutes after which the training saves and rests; queue the graph again to go on. 0: no limit.",
        )
        common = [_setting_input(fields[name], advanced=False) for name in COMMON]
        return sockets.schema(
            node_id="FaR_TrainOptions",
            display_name="FaR Train Options",
            description="Settings of the FaR training that are seldom changed. The defaults are the method's.",
            search_aliases=["fuse and refine", "training settings"],
            inputs=[limit, *common, *(_setting_input(fields[name], advanced=True) for name in RARE)],
            outputs=[sockets.FarOptions.Output(display_name="options", tooltip="For FaR Train.")],
        )

    @classmethod
    def execute(cls, time_limit: float, **settings: Any) -> io.NodeOutput:
        kinds = TrainConfig.kinds()
        settings = TrainConfig.current_names(settings)
        settings = {k: None if kinds[k].optional and not v else v for k, v in settings.items()}
        TrainConfig(**settings)  # a bad combination is reported here, where it was made
        return io.NodeOutput(Options(settings, time_limit))


def _setting_input(setting: dataclasses.Field, advanced: bool) -> io.Input:
    """A widget for a field of TrainConfig, with the field's own help and range; 0 stands for "none".

    Its id is the setting's first name, and former choices stay behind those of today: saved graphs hold them.
    """
    about, default, name = setting.metadata, setting.default, first_name(setting)
    kind = TrainConfig.kinds()[setting.name]
    tooltip = about["help"][0].upper() + about["help"][1:] + "."
    for old, new in about["was_values"].items():
        tooltip += f" {old} is the former name of {new}."
    if kind.optional:
        tooltip += " 0 stands for none."
    shared = {"tooltip": tooltip, "extra_dict": {"advanced": advanced}}
    if about["choices"]:
        return io.Combo.Input(name, options=[*about["choices"], *about["was_values"]], default=default, **shared)
    if kind.type is bool:
        return io.Boolean.Input(name, default=default, **shared)
    low = 0 if kind.optional else about["low"]
    bounds = {"min": low, "max": about["high"], **shared}
    if kind.type is float:
        step = 1e-6 if name.endswith("_lr") else 0.001
        return io.Float.Input(name, default=default or 0.0, step=step, round=False, **bounds)
    return io.Int.Input(name, default=default or 0, **bounds)


class Train(io.ComfyNode):
    """Learns the concepts of a dataset on the graph's own base, and leaves the base as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            node_id="FaR_Train",
            display_name="FaR Train",
            description=(
                "Teaches Stable Diffusion 2.1 the concepts of a dataset (Fuse-and-Refine). The run is kept in "
                "output/far/NAME: an unchanged graph never trains twice, a cancelled run goes on when queued again."
            ),
            search_aliases=["fuse and refine", "dreambooth", "custom diffusion", "textual inversion", "finetune"],
            inputs=[
                sockets.Model.Input(
                    "model", tooltip="The base: Stable Diffusion 2.1, with any LoRA you like. Not changed."
                ),
                sockets.Clip.Input("clip", tooltip="The CLIP that belongs to MODEL. Not changed."),
                sockets.Vae.Input("vae", tooltip="The VAE that belongs to MODEL. Not changed."),
                sockets.FarDataset.Input("dataset", tooltip="From FaR Concept Fusion or FaR Load Dataset."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Training steps. 0: 500 per concept, at most 2500.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=2,
                    min=1,
                    max=4096,
                    tooltip="Composites per step; as many class pictures come on top (see FaR Train Options).",
                ),
                io.Int.Input(
                    "train_seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Seed of noise, timesteps and order. Another seed is another run.",
                ),
                io.String.Input(
                    "name",
                    default="my-concepts",
                    tooltip="Folder below output/far. Where another run has that name, a number is added.",
                ),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts of the sample pictures, one a line, with your tokens: a photo of a <corgi-dog> "
                    "dog on a beach. Empty: each concept, and all together.",
                ),
                sockets.FarOptions.Input(
                    "options", optional=True, tooltip="From FaR Train Options: the rare settings."
                ),
                sockets.FarWeightsSocket.Input(
                    "continue_from",
                    optional=True,
                    tooltip="Weights of the same base to learn on from, for more steps or with one more concept. They "
                    "make it another run.",
                ),
                io.Boolean.Input(
                    "dry_run",
                    default=False,
                    optional=True,
                    tooltip="Only say what the training will cost: steps, time, memory, disk. Takes a few steps aside "
                    "to measure it and keeps nothing; what is behind this node doesn't run.",
                ),
            ],
            outputs=[
                sockets.FarWeightsSocket.Output(
                    display_name="weights", tooltip="For FaR Apply Weights and Save Weights."
                ),
                io.Image.Output(display_name="curve", tooltip="The losses over the steps."),
                io.Image.Output(display_name="samples", tooltip="The last sample pictures of the run."),
                io.String.Output(display_name="run_folder", tooltip="Where the run is kept: log, samples, weights."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        dataset: TrainingSet,
        steps: int,
        batch_size: int,
        train_seed: int,
        name: str,
        sample_prompt: str = "",
        options: Options | None = None,
        continue_from: FarWeights | None = None,
        dry_run: bool = False,
    ) -> io.NodeOutput:
        options = Options() if options is None else options
        sockets.check_sockets(dataset=(dataset, TrainingSet, "FAR_DATASET"), options=(options, Options, "FAR_OPTIONS"))
        config = TrainConfig(
            **options.settings
            | {
                "steps": steps or None,
                "batch_size": batch_size,
                "train_seed": train_seed,
                "device": str(host.compute_device()),
                "class_image_cache": str(host.output_folder() / "far" / "priors"),
                "sample_prompts": [line.strip() for line in sample_prompt.splitlines() if line.strip()],
            }
        )
        check_sample_prompts(config.sample_prompts, [name.token for name in dataset.names])
        total = config.steps_for(len(dataset.names))
        config = config.replace(sample_every=min(config.sample_every, total))  # so that a short run has samples, too
        with host.no_inference_mode():
            if continue_from is not None:
                sockets.check_sockets(continue_from=(continue_from, FarWeights, "FAR_WEIGHTS"))
            identity = run_identity(host.identify_base(model, clip, vae), dataset, config, continue_from)
            name = file_name(name, "run")
            folder, finished = find_run(host.output_folder() / "far", name, identity)
            if finished:
                host_ui.tell(f"{folder.name} is trained already: loaded from {folder}", cls.hidden.unique_id)
            elif dry_run:
                with _freed_base(model, clip, vae) as base:
                    cost = measure_cost(
                        base,
                        dataset,
                        config,
                        start=continue_from,
                        steps_done=len(metrics_of(folder)),
                        should_stop=host_ui.interrupted,
                    )
                host_ui.tell(f"dry run of {folder.name}\n{cost.words}", cls.hidden.unique_id)
                return io.NodeOutput(*[host_ui.nothing()] * 4, ui={"text": (cost.words,)})
            else:
                live = LiveView(cls.hidden.unique_id, folder, total, new_run_note(folder, name, identity))
                _train(model, clip, vae, dataset, config, folder, continue_from, options.time_limit, live)
            weights = FarWeights.load(folder / WEIGHTS_FILE)
            curve = from_pil(loss_curves(metrics_of(folder)))[None]
            return io.NodeOutput(sockets.CarriedWeights.of(weights), curve, _last_samples(folder), str(folder))


def check_sample_prompts(prompts: Sequence[str], tokens: Sequence[str]) -> None:
    """Refuse sample prompts that hold a token which isn't learned: a slip that would show after hours.

    Raises ConfigError.
    """
    for prompt in prompts:
        for token in unknown_tokens(prompt, tokens):
            raise ConfigError(f"sample_prompt: there is no {token} in the dataset; it has: {', '.join(tokens)}")


def new_run_note(folder: Path, name: str, identity: dict[str, Any]) -> str:
    """What to say of a run that is to begin in ``folder`` though another has its ``name``: why that doesn't go on."""
    found = None if folder.exists() else what_changed(folder.parent, name, identity)
    if found is None:
        return ""
    previous, changes = found
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return (
        f"changed: {', '.join(changes[:3])}{more}; this starts a new run, {folder.name}, at step 1; {previous} is kept"
    )


def _train(
    model: Any,
    clip: Any,
    vae: Any,
    dataset: TrainingSet,
    config: TrainConfig,
    folder: Path,
    start: FarWeights | None,
    time_limit: float,
    live: LiveView,
) -> None:
    """Train in ``folder``, going on where an earlier session stopped; gives the memory back however it ends."""
    deadline = time.monotonic() + 60 * time_limit if time_limit else float("inf")
    callbacks = Callbacks(
        on_phase=live.on_phase,
        on_step=live.on_step,
        on_samples=live.on_samples,
        should_stop=lambda: host_ui.interrupted() or time.monotonic() > deadline,
    )
    stopped = None
    with _freed_base(model, clip, vae) as base:
        check_captions(dataset, base, config.vectors_per_token)
        try:
            train(base, dataset, config, folder, start=start, resume=True, keep_base=False, callbacks=callbacks)
        except Interrupted as e:
            stopped = str(e)
    if stopped and host_ui.interrupted():
        live.on_cancel()
        host_ui.raise_interrupted()
    if stopped:
        raise Interrupted(
            f"the time limit of {time_limit:g} minutes is over; queue the graph again to go on. ({stopped})"
        )


@contextmanager
def _freed_base(model: Any, clip: Any, vae: Any) -> Iterator[BaseModel]:
    """The graph's base for a while, with the device to itself; gives the memory back however it ends."""
    base = host.read_base(model, clip, vae)
    try:
        host.free_everything()
        yield base
    finally:
        base.to("meta")  # frees the weights even where a traceback still holds the modules
        del base
        host.give_back()


def _last_samples(folder: Path) -> Tensor:
    """The newest sample pictures of a run, [n, H, W, 3]; one black picture if it made none."""
    paths = sorted((folder / "samples").glob("step-*.png"))
    newest = [p for p in paths if p.name.split("-")[1] == paths[-1].name.split("-")[1]]
    return torch.stack([load_photo(p).image for p in newest]) if newest else torch.zeros(1, 64, 64, 3)


NODES: list[type[io.ComfyNode]] = [TrainOptions, Train]
