"""The command that trains."""

from __future__ import annotations

import logging
from pathlib import Path

from ..training.settings import TrainConfig
from ..utils.errors import CheckpointError
from ..utils.terminal import progress_bars, stop_on_interrupt
from .parsing import SWITCH, Argument, Command, Inputs
from .shared import BASE, open_base

log = logging.getLogger(__name__)

DATASET_FILES = "dataset-files.json"  # in a run folder: what it learns from, to name what changed


def train(inputs: Inputs, config: TrainConfig) -> None:
    """Train in a run folder, or estimate what it would cost."""
    from ..data.dataset import DatasetFolder
    from ..evaluation.sheets import loss_curves, save_sheet
    from ..models.weights import FarWeights
    from ..training.callbacks import Callbacks
    from ..training.distributed import distributed_context
    from ..training.estimate import measure_cost
    from ..training.latent_cache import check_captions
    from ..training.recipe import train as train_recipe
    from ..training.run_folder import METRICS_FILE, read_metrics
    from ..utils.files import write_json

    out = Path(inputs["out"])
    dataset = DatasetFolder(Path(inputs["dataset"]))
    for note in dataset.notes:
        log.warning("%s", note)
    base = open_base(inputs)
    check_captions(dataset, base, config.vectors_per_token)
    start = FarWeights.load(Path(inputs["continue_from"])) if inputs.get("continue_from") else None
    steps, kept = config.steps_for(len(dataset.names)), out / DATASET_FILES
    config = config.replace(sample_every=min(config.sample_every, steps))  # so that a short run has samples, too
    if inputs.get("dry_run"):
        done = read_metrics(out / METRICS_FILE) if (out / METRICS_FILE).exists() else []
        print(measure_cost(base, dataset, config, start=start, steps_done=len(done)).words)
        return
    with distributed_context(config.device) as world, progress_bars() as bars, stop_on_interrupt() as should_stop:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bars("training", step, steps)
            bars.note(loss=f"{metrics['loss']:.4f}", refinement=f"{metrics['refinement']:.4f}")

        def on_phase(phase: str, done: int, total: int) -> None:
            if not kept.exists():  # the run is begun or found equal: these are its files
                write_json(kept, dataset.file_digests())
            bars(phase, done, total)

        callbacks = Callbacks(on_phase=on_phase, on_step=on_step, should_stop=should_stop)
        if not world.is_main_process:
            callbacks = Callbacks(should_stop=should_stop)
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


TRAIN = Command(
    "train",
    "learn the concepts of a dataset folder",
    (
        *BASE,
        Argument("dataset", "dataset folder made by fuse", required=True),
        Argument("out", "run folder: metrics, checkpoints, samples, weights.safetensors", required=True),
        Argument("resume", "resume the run in the run folder from its last checkpoint", options=SWITCH),
        Argument("continue_from", "FaR weights of the same base model to start from, in a new run folder"),
        Argument("dry_run", "only estimate the cost: steps, time, memory, disk", options=SWITCH),
    ),
    train,
    TrainConfig,
)
