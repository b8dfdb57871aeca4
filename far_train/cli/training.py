"""The command that trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.settings import TrainConfig
from ..utils.errors import CheckpointError, ConfigError, FarError
from ..utils.terminal import progress_bars, stop_on_interrupt
from .parsing import SWITCH, Argument, Command, Inputs
from .shared import BASE, open_base

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.dataset import DatasetFolder
    from ..evaluation.image_encoders import FolderEncoder

log = logging.getLogger(__name__)

DATASET_FILES = "dataset-files.json"  # in a run folder: what it learns from, to name what changed


def train(inputs: Inputs, config: TrainConfig) -> None:
    """Train in a run folder, or estimate what it would cost."""
    from ..data.dataset import DatasetFolder
    from ..evaluation.sheets import loss_curves, save_sheet
    from ..models.weights import FarWeights
    from ..training.callbacks import Callbacks
    from ..training.checkpoints import newest_step
    from ..training.distributed import distributed_context
    from ..training.estimate import measure_cost
    from ..training.latent_cache import check_captions
    from ..training.recipe import train as train_recipe
    from ..training.run_folder import CHECKPOINTS, METRICS_FILE, read_metrics
    from ..utils.files import write_json

    out = Path(inputs["out"])
    dataset = DatasetFolder(Path(inputs["dataset"]))
    for note in dataset.notes:
        log.warning("%s", note)
    judges = _judges(inputs)
    to_check: list[tuple[Sequence[str], Tensor]] = []
    base = open_base(inputs)
    check_captions(dataset, base, config.vectors_per_token)
    start = FarWeights.load(Path(inputs["continue_from"])) if inputs.get("continue_from") else None
    steps, kept = config.steps_for(len(dataset.names)), out / DATASET_FILES
    config = config.replace(sample_every=min(config.sample_every, steps))  # so that a short run has samples, too
    if inputs.get("dry_run"):
        done = newest_step(out / CHECKPOINTS)
        print(measure_cost(base, dataset, config, start=start, steps_done=done, is_checked=bool(judges)).words)
        return
    with distributed_context(config.device) as world, progress_bars() as bars, stop_on_interrupt() as should_stop:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bars("training", step, steps)
            bars.note(loss=f"{metrics['loss']:.4f}", refinement=f"{metrics['refinement']:.4f}")

        def on_phase(phase: str, done: int, total: int) -> None:
            if not kept.exists():  # the run is begun or found equal: these are its files
                write_json(kept, dataset.file_digests())
            bars(phase, done, total)

        callbacks = Callbacks(
            on_phase=on_phase,
            on_step=on_step,
            on_check=(lambda *drawn: to_check.append(drawn)) if judges else None,
            should_stop=should_stop,
        )
        if not world.is_main_process:
            callbacks = Callbacks(on_note=lambda _: None, should_stop=should_stop)
        resume = bool(inputs.get("resume"))
        try:
            train_recipe(base, dataset, config, out, start=start, resume=resume, keep_base=False, callbacks=callbacks)
        except CheckpointError as e:
            changes = dataset.describe_changes(kept)
            raise CheckpointError(f"{e}. In {dataset.folder}: {changes}" if changes else str(e)) from e
    if not world.is_main_process:
        return
    save_sheet(out / "curves.png", loss_curves(read_metrics(out / METRICS_FILE)))
    samples = f" and {out / 'samples'}" if config.sample_every else ""
    print(f"{steps} steps → {out / 'weights.safetensors'}; look at {out / 'curves.png'}{samples}")
    for prompts, pictures in to_check:
        base.to("meta")  # makes room for what judges
        _check(dataset, prompts, pictures, judges, config.device, out)


def _check(
    dataset: DatasetFolder,
    prompts: Sequence[str],
    pictures: Tensor,
    judges: tuple[FolderEncoder, Any],
    device: str,
    out: Path,
) -> None:
    """Judge what a finished run has drawn. The weights are saved: what keeps it from being judged is only said."""
    from ..evaluation.trained import CHECK_SHEET, check_trained, check_words, save_check, subject_finder
    from ..utils.devices import choose_device
    from ..utils.out_of_memory import skip_without_memory

    encoder, sam = judges
    try:
        with skip_without_memory("the check's results"):
            encoder.model.to(choose_device(device)[0])
            sam.to(choose_device(device)[0])
            checks = check_trained(dataset, prompts, pictures, encoder, subject_finder(encoder, sam))
            save_check(out, checks, prompts, pictures)
            print(f"{check_words(checks)}\nlook at {out / CHECK_SHEET}")
    except FarError as e:
        log.warning("The weights are saved, but not checked: %s", e)


def _judges(inputs: Inputs) -> tuple[FolderEncoder, Any] | None:
    """The encoder and the SAM that judge the result, on the CPU; None if they aren't given.

    They are read before the training, so that a wrong path shows at once. Raises ConfigError, EncoderError,
    SubjectError.
    """
    from ..data.sam import load_sam
    from ..evaluation.image_encoders import FolderEncoder

    encoder, sam = inputs.get("check_encoder"), inputs.get("check_sam")
    if not encoder and not sam:
        return None
    if not encoder or not sam:
        missing = "check_sam" if encoder else "check_encoder"
        raise ConfigError(f"{missing}: a check needs check_encoder and check_sam; give both, or neither")
    return FolderEncoder(Path(encoder)), load_sam(Path(sam))


TRAIN = Command(
    "train",
    "learn the concepts of a dataset folder",
    (
        *BASE,
        Argument("dataset", "dataset folder made by fuse", required=True),
        Argument("out", "run folder: metrics, checkpoints, samples, weights.safetensors", required=True),
        Argument("resume", "resume the run in the run folder from its last checkpoint", options=SWITCH),
        Argument("continue_from", "FaR weights of the same base model to start from, in a new run folder"),
        Argument(
            "check_encoder",
            "folder of an image encoder in transformers' layout, such as DINOv2: after the training, each concept is "
            "drawn alone and all together, and compared with the dataset; needs check_sam",
        ),
        Argument("check_sam", "Segment Anything weights that find the subjects in these pictures"),
        Argument("dry_run", "only estimate the cost: steps, time, memory, disk", options=SWITCH),
    ),
    train,
    TrainConfig,
)
