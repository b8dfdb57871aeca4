"""Training in the graph."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import TrainingSet
from ..far_train.data.images import from_pil, load_photo
from ..far_train.evaluation.sheets import loss_curves
from ..far_train.evaluation.trained import check_words, load_check
from ..far_train.models.tokens import unknown_tokens
from ..far_train.models.weights import FarWeights
from ..far_train.training.build import check_trainable
from ..far_train.training.checkpoints import newest_step
from ..far_train.training.estimate import measure_cost
from ..far_train.training.latent_cache import check_captions
from ..far_train.training.recipe import Callbacks, train
from ..far_train.training.run_folder import CHECKPOINTS, WEIGHTS_FILE, find_run, run_identity, what_changed
from ..far_train.training.settings import TrainConfig
from ..far_train.utils.errors import ConfigError, Interrupted
from . import host_folders, host_memory, host_models, host_ui, sockets
from .check import check_run, is_checked
from .host_attention import applied_tokens
from .known_files import files_generation, remember_files
from .live_view import LiveView, metrics_of
from .naming import file_name
from .train_options import Options


class Train(io.ComfyNode):
    """Learns the concepts of a dataset on the graph's own base, and leaves the base as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            node_id="FaR_Train",
            display_name="FaR Train",
            description=(
                "Fine-tune Stable Diffusion 1.5, 2.1 or XL on the concepts of a dataset (Fuse-and-Refine). The run is "
                "saved in output/far/NAME: a finished run is loaded instead of trained again, and a canceled run "
                "resumes."
            ),
            search_aliases=[
                "lora",
                "lora training",
                "train",
                "dreambooth",
                "personalization",
                "character",
                "multi concept",
                "fuse and refine",
                "custom diffusion",
                "textual inversion",
                "finetune",
            ],
            inputs=[
                *sockets.base_inputs(
                    model="The base model: Stable Diffusion 1.5, 2.1 or XL, with any LoRA applied. It is not changed.",
                    clip="The CLIP of the same checkpoint. It is not changed.",
                    vae="The VAE of the same checkpoint. It is not changed.",
                ),
                sockets.FarDataset.Input("dataset", tooltip="From FaR Concept Fusion or FaR Load Dataset."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Optimizer steps. 0: 500 per concept, at most 2500.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=TrainConfig.batch_size,
                    min=1,
                    max=4096,
                    tooltip="Composites per step. Regularization images are added to them (see FaR Train Options).",
                ),
                io.Int.Input(
                    "train_seed",
                    display_name="seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Seed of noise, timesteps and batch order. Another seed starts another run.",
                ),
                io.String.Input(
                    "name",
                    display_name="run name",
                    default="my-concepts",
                    tooltip="Folder of the run in output/far. A number is added if another run has that name.",
                ),
                io.String.Input(
                    "sample_prompt",
                    display_name="sample prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts of the sample images, one per line, with placeholder tokens: a photo of a "
                    "<corgi-dog> dog on a beach. Empty: each concept, and all together.",
                ),
                sockets.FarOptions.Input(
                    "options",
                    display_name="advanced options",
                    optional=True,
                    tooltip="Advanced options, from FaR Train Options.",
                ),
                sockets.FarWeightsSocket.Input(
                    "continue_from",
                    optional=True,
                    tooltip="FaR weights of the same base model to continue from, with more steps or another concept. "
                    "This starts a new run.",
                ),
                io.Boolean.Input(
                    "dry_run",
                    default=False,
                    optional=True,
                    tooltip="Only estimate the cost of the training: steps, time, memory, disk. Runs a few throw-away "
                    "steps. Nodes after this one don't run, unless the run is finished already.",
                ),
            ],
            outputs=[
                sockets.FarWeightsSocket.Output(
                    display_name="weights", tooltip="For FaR Apply Weights and Save Weights."
                ),
                io.Image.Output(display_name="curve", tooltip="The loss curves."),
                io.Image.Output(display_name="samples", tooltip="The latest sample images."),
                io.String.Output(display_name="run_folder", tooltip="The folder of the run: log, samples, weights."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return files_generation(cls.hidden.unique_id)

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
                "device": str(host_memory.compute_device()),
                "class_image_cache": str(host_folders.output_folder() / "far" / "priors"),
                "encoding_cache": str(host_folders.output_folder() / "far" / "encodings"),
                "sample_prompts": [line.strip() for line in sample_prompt.splitlines() if line.strip()],
            }
        )
        check_sample_prompts(config.sample_prompts, [name.token for name in dataset.names])
        total = config.steps_for(len(dataset.names))
        config = config.replace(sample_every=min(config.sample_every, total))  # so that a short run has samples, too
        with host_memory.no_inference_mode():
            if continue_from is not None:
                sockets.check_sockets(continue_from=(continue_from, FarWeights, "FAR_WEIGHTS"))
            check_trainable(host_models.check_family(model, clip), config)
            on_top = on_top_of(applied_tokens(clip), continue_from)
            identity = run_identity(host_models.identify_base(model, clip, vae), dataset, config, continue_from)
            name = file_name(name, "run")
            folder, finished = find_run(host_folders.output_folder() / "far", name, identity)
            if finished:
                text = f"{folder.name} is trained already: loaded from {folder}\n{check_words(load_check(folder))}"
                host_ui.log_and_show(f"{on_top}\n{text}".strip(), cls.hidden.unique_id)
            elif dry_run:
                with host_models.freed_base(model, clip, vae) as base:
                    check_captions(dataset, base, config.vectors_per_token)
                    try:
                        cost = measure_cost(
                            base,
                            dataset,
                            config,
                            start=continue_from,
                            steps_done=newest_step(folder / CHECKPOINTS),
                            is_checked=is_checked(options.check_with),
                            should_stop=host_ui.interrupted,
                        )
                    except Interrupted:
                        host_ui.raise_interrupted()
                text = f"{on_top}\ndry run of {folder.name}\n{cost.words}"
                host_ui.log_and_show(text.strip(), cls.hidden.unique_id)
                return io.NodeOutput(*[host_ui.blocked_output()] * 4, ui={"text": (cost.words,)})
            else:
                live = LiveView(cls.hidden.unique_id, folder, total, new_run_note(folder, name, identity))
                if on_top:
                    live.on_note(on_top)
                _train(model, clip, vae, dataset, config, folder, continue_from, options, live)
            weights = FarWeights.load(folder / WEIGHTS_FILE)
            remember_files(cls.hidden.unique_id, [folder / WEIGHTS_FILE])
            curve = from_pil(loss_curves(metrics_of(folder)))[None]
            return io.NodeOutput(sockets.CarriedWeights.of(weights), curve, _last_samples(folder), str(folder))


def check_sample_prompts(prompts: Sequence[str], tokens: Sequence[str]) -> None:
    """Refuse sample prompts that hold a token which isn't learned: a slip that would show after hours.

    Raises ConfigError.
    """
    for prompt in prompts:
        for token in unknown_tokens(prompt, tokens):
            raise ConfigError(f"sample_prompt: there is no {token} in the dataset; it has: {', '.join(tokens)}")


def on_top_of(tokens: Sequence[str], continue_from: FarWeights | None) -> str:
    """What to say of a training on MODEL and CLIP in which FaR Apply Weights has put ``tokens``; "" if there are none.

    Raises ConfigError with weights to continue from: they are in MODEL already, or others are.
    """
    if not tokens:
        return ""
    applied = f"MODEL and CLIP come through FaR Apply Weights ({', '.join(tokens)})"
    if continue_from is not None:
        raise ConfigError(
            f"continue_from: {applied}, so that weights would be applied twice; connect the checkpoint's MODEL and CLIP"
        )
    return f"{applied}: the result only works on top of those weights. Else connect the checkpoint's MODEL and CLIP."


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
    options: Options,
    live: LiveView,
) -> None:
    """Train in ``folder``, going on where an earlier session stopped, and check the result; gives the memory back
    however it ends."""
    time_limit = options.time_limit
    deadline = time.monotonic() + 60 * time_limit if time_limit else float("inf")
    to_check: list[tuple[Sequence[str], Tensor]] = []
    callbacks = Callbacks(
        on_phase=live.on_phase,
        on_step=live.on_step,
        on_samples=live.on_samples,
        on_note=live.on_note,
        on_check=(lambda *drawn: to_check.append(drawn)) if is_checked(options.check_with) else None,
        should_stop=lambda: host_ui.interrupted() or time.monotonic() > deadline,
    )
    stopped = None
    with host_models.freed_base(model, clip, vae) as base:
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
    for prompts, pictures in to_check:  # now that the base is gone, there is room for an encoder
        check_run(folder, dataset, options.check_with, prompts, pictures, live.node_id)


def _last_samples(folder: Path) -> Tensor:
    """The newest sample pictures of a run, [n, H, W, 3]; one black picture if it made none."""
    names = ((re.fullmatch(r"step-(\d+)-(\d+)", p.stem), p) for p in (folder / "samples").glob("step-*.png"))
    found = {(int(name[1]), int(name[2])): p for name, p in names if name}  # people put other files there
    pictures = [load_photo(found[place]).image for place in sorted(found) if place[0] == max(found)[0]]
    same = [picture for picture in pictures if picture.shape == pictures[0].shape]
    return torch.stack(same) if same else torch.zeros(1, 64, 64, 3)


NODES: list[type[io.ComfyNode]] = [Train]
