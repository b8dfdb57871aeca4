"""The training recipe: set up, take steps, save, clean up. Read ``train`` first, then ``TrainingRun.fit``.

What one step does is in :mod:`step`, what a run needs before it in :mod:`build`. A run that was stopped or killed
resumes from its last checkpoint with ``resume=True``; on the CPU its result is the same to the bit. Under ``torchrun``
several processes share each step.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..data.captions import default_prompts
from ..data.concepts import TrainingSet
from ..data.images import save_picture
from ..models.base import BaseModel
from ..models.layers import uncompiled
from ..models.sampling import draw_pictures
from ..models.settings import SampleConfig
from ..models.weights import FarWeights, Provenance
from ..utils.errors import Interrupted, TrainingDiverged
from ..utils.out_of_memory import skip_without_memory
from .build import build_run
from .callbacks import Callbacks
from .checkpoints import newest_step, save_checkpoint
from .distributed import World
from .metrics import Readback, StepReports
from .run_folder import ENCODINGS, METRICS_FILE, WEIGHTS_FILE, MetricsLog
from .settings import TrainConfig
from .step import take_step
from .watch import DivergenceWatch, PaceWatch

log = logging.getLogger(__name__)

SAMPLE_BATCH = 4  # sample images drawn at once on a GPU
CHECK_PICTURES = 4  # of each prompt
MAX_NON_FINITE_STEPS = 3  # in a row, after which a run ends


def train(
    base: BaseModel,
    training_set: TrainingSet,
    config: TrainConfig,
    run_folder: Path,
    *,
    start: FarWeights | None = None,
    resume: bool = False,
    keep_base: bool = True,
    callbacks: Callbacks = Callbacks(),
) -> FarWeights:
    """Teach ``base`` the concepts of ``training_set``; afterwards the base is as it was.

    ``start``: weights of the same base to continue from; new concepts may join them. ``keep_base``: False for a base
    that is not needed afterwards. It then stays on the training device in the precision of the training, and no memory
    is spent on its original weights.
    ``run_folder`` gets run.json, metrics.jsonl, checkpoints, samples and ``weights.safetensors``. Raises Interrupted
    when ``should_stop`` says so (after saving), TrainingDiverged, OutOfMemory, or errors of dataset and disk.
    """
    with (
        World.current().failing_together(),
        TrainingRun(
            base,
            training_set,
            config,
            Path(run_folder),
            start=start,
            resume=resume,
            keep_base=keep_base,
            keep_encodings=True,
            callbacks=callbacks,
        ) as run,
    ):
        run.fit()
        weights = run.save_weights()
        run.draw_check()
        return weights


class TrainingRun:
    """A training that is set up and can be taken step by step, as estimates, benchmarks and tests do.

    The arguments are those of :func:`train`, and ``keep_encodings``: whether encoded images are looked up and kept for
    later runs, as :func:`train` does. ``state`` is what the run holds, ``readback`` the metrics of its steps.
    Use it as a context manager or close it: until then its adapter is installed in the base.
    """

    def __init__(
        self,
        base: BaseModel,
        training_set: TrainingSet,
        config: TrainConfig,
        folder: Path,
        *,
        start: FarWeights | None = None,
        resume: bool = False,
        keep_base: bool = True,
        keep_encodings: bool = False,
        callbacks: Callbacks = Callbacks(),
    ):
        self.callbacks = callbacks
        with ExitStack() as undo:
            self.state = build_run(
                undo,
                base,
                training_set,
                config,
                folder,
                start=start,
                resume=resume,
                keep_base=keep_base,
                keep_encodings=keep_encodings,
                callbacks=callbacks,
            )
            self._undo = undo.pop_all()
        self.readback = Readback(self.state.device)

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the base as it was found."""
        self._undo.close()

    # ---- steps

    def take_step(self) -> None:
        """Queue one optimizer step and the copy of its metrics into ``readback``, without waiting for either."""
        metrics = take_step(self.state)
        self.readback.put(self.state.step, metrics)

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step and wait for its metrics."""
        self.take_step()
        return self.readback.drain()[-1][1]

    def fit(self) -> None:
        """Take all remaining steps, with checkpoints and sample pictures.

        Raises TrainingDiverged when :class:`DivergenceWatch` calls the run broken, or suspect where it ends or stops.
        """
        try:
            self._take_all_steps(DivergenceWatch(with_base=self.state.config.output_preservation))
        except TrainingDiverged as e:
            raise TrainingDiverged(f"the training diverged: {e}. {self._after_divergence()}") from None

    def _after_divergence(self) -> str:
        """What is left of a run that diverged, and which setting to change."""
        config, kept = self.state.config, newest_step(self.state.checkpoints)
        checkpoint = f"; the checkpoint of step {kept} is kept" if kept else ""
        rate = "kv_lr" if config.trainable == "kv" else "lora_lr"
        precise = "" if self.state.dtype == torch.float32 else ", or use precision fp32"
        return (
            f"No weights are saved{checkpoint}. Lower {rate} (now {config.change_lr:g}) or embedding_lr (now "
            f"{config.embedding_lr:g}){precise}"
        )

    def _take_all_steps(self, divergence: DivergenceWatch) -> None:
        state, config, is_main = self.state, self.state.config, self.state.world.is_main_process
        saved_step = state.step
        max_non_finite = MAX_NON_FINITE_STEPS + int(math.log2(state.scaler.initial_scale))  # fp16 first finds its scale
        with MetricsLog(state.folder / METRICS_FILE) if is_main else nullcontext() as history:
            reports = StepReports(
                self.readback,
                history,
                self.callbacks,
                max_non_finite=max_non_finite,
                divergence=divergence,
                pace=PaceWatch(on_gpu=state.device.type == "cuda"),
            )
            while state.step < state.steps:
                if state.world.any_process(self.callbacks.should_stop()):
                    reports.flush()
                    _refuse_suspect(divergence)  # rather than save what a resumed run would go on from
                    if saved_step != state.step and is_main:
                        self.save_checkpoint()
                    raise Interrupted(f"stopped at step {state.step} of {state.steps}, which is saved; resume to go on")
                self.take_step()
                is_last = state.step == state.steps
                save = state.step % config.save_every == 0 or is_last
                sample = bool(config.sample_every) and state.step % config.sample_every == 0
                if save or sample:
                    reports.flush()
                else:
                    reports.report()
                if is_last:
                    _refuse_suspect(divergence)
                if save and divergence.suspect:
                    log.warning("Step %d isn't saved: the loss is %s.", state.step, divergence.words())
                elif save and is_main:
                    self.save_checkpoint()
                    saved_step = state.step
                if sample and is_main:
                    # An interruption only ends the drawing here; the loop sees it at the next step.
                    with suppress(Interrupted), skip_without_memory("the sample pictures"):
                        self._draw_samples()
                reports.start_clock()

    def _draw_samples(self) -> None:
        state = self.state
        prompts = state.config.sample_prompts or default_prompts(state.training_set.names)
        pictures = self._draw(prompts, "sample pictures")
        for i, picture in enumerate(pictures):
            save_picture(state.folder / "samples" / f"step-{state.step:06d}-{i}.png", picture)
        self.callbacks.on_samples(state.step, prompts, pictures)

    def draw_check(self) -> None:
        """Draw what ``on_check`` wants, if it is given. An interruption or a lack of memory only leaves it out."""
        on_check, state = self.callbacks.on_check, self.state
        if on_check is None or not state.world.is_main_process:
            return
        prompts = [p for p in default_prompts(state.training_set.names) for _ in range(CHECK_PICTURES)]
        self.callbacks.on_phase("check", 0, len(prompts))
        with suppress(Interrupted), skip_without_memory("the pictures of the check"):
            on_check(prompts, self._draw(prompts, "check"))

    def _draw(self, prompts: Sequence[str], phase: str) -> Tensor:
        """Pictures [n, H, W, 3] of the prompts by what has been learned so far. Raises Interrupted."""
        state = self.state
        settings = SampleConfig(
            sampling_steps=state.config.sample_steps, sample_batch=SAMPLE_BATCH if state.device.type == "cuda" else 1
        )
        state.release_graphs()
        with uncompiled(state.base.unet):
            return draw_pictures(
                state.base,
                state.vocabulary,
                prompts,
                settings,
                size=state.size,
                like_ksampler=True,
                on_progress=lambda *_: self.callbacks.check_stop(phase),
            )

    # ---- files

    def save_checkpoint(self) -> None:
        """Write a checkpoint, and delete those beyond ``keep_checkpoints``. Raises OutputError."""
        state, keep = self.state, self.state.config.keep_checkpoints
        save_checkpoint(state.checkpoints, state.step, state.saved(), state.optimizer, keep, state.dtype)

    def save_weights(self) -> FarWeights:
        """The weights learned so far; the main process writes their file, by which a finished run is known."""
        state = self.state
        names, embeddings = state.training_set.names, {}
        encoders = state.base.family.comfy_names
        for name in names:
            own = list(state.vocabulary.rows(name.token))
            embeddings[name.token] = {e: rows.detach().cpu()[own] for e, rows in zip(encoders, state.adapter.rows)}
        deltas, low_rank_deltas = state.adapter.export_state()
        weights = FarWeights(
            embeddings=embeddings,
            deltas=deltas,
            low_rank_deltas=low_rank_deltas,
            provenance=Provenance(
                family=state.base.family.key,
                base_digest=state.base.digest,
                prediction_type=state.base.prediction_type,
                nouns={n.token: n.noun for n in names},
                steps=state.step,
                size=state.training_set.size,
                config=state.config.replace(  # files travel; this user's folders don't
                    class_image_cache=None, encoding_cache=None
                ).to_dict(),
            ),
        )
        if state.world.is_main_process:
            weights.save(state.folder / WEIGHTS_FILE)
            shutil.rmtree(state.folder / ENCODINGS, ignore_errors=True)  # nothing resumes a finished run
        return weights


def _refuse_suspect(divergence: DivergenceWatch) -> None:
    if divergence.suspect:
        raise TrainingDiverged(f"the loss of the last steps is {divergence.words()}")
