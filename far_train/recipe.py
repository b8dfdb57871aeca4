"""The training recipe, to be read from top to bottom: set up, train, save, clean up.

``train`` is the one entry. What is stopped, killed or out of power goes on from its last checkpoint with
``resume=True`` and ends, on the CPU, in the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import losses
from .attention import AttentionRecorder, layer_stride, supervised_layers
from .backbone import BaseModel
from .captions import default_prompts
from .concepts import TrainingSet
from .config import SampleConfig, TrainConfig
from .devices import choose_device
from .errors import DatasetError, Interrupted, TrainingDiverged
from .photos import save_picture
from .pool import Batch, draw_batch, encode_pool, slice_batch
from .priors import WithPriors, draw_class_pictures
from .runs import METRICS_FILE, WEIGHTS_FILE, cut_metrics, open_run, run_identity
from .sampling import TextCache, check_size, draw_pictures, encode_prompts
from .state import load_checkpoint, save_checkpoint
from .tokens import Vocabulary
from .trainable import Trainables
from .weights import FarWeights, Provenance

log = logging.getLogger(__name__)

PATIENCE = 3  # non-finite steps in a row that end a run


@dataclass(frozen=True)
class Callbacks:
    """How a training talks to its caller: all are optional, none may change what is learned.

    ``on_phase(name, done, total)`` reports progress before the first step, ``on_step(step, metrics)`` each step,
    ``on_samples(step, prompts, pictures [n, H, W, 3])`` sample pictures; ``should_stop()`` is asked between steps.
    """

    on_phase: Callable[[str, int, int], None] = lambda phase, done, total: None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    on_samples: Callable[[int, Sequence[str], Tensor], None] = lambda step, prompts, pictures: None
    should_stop: Callable[[], bool] = lambda: False


def train(
    base: BaseModel,
    training_set: TrainingSet,
    config: TrainConfig,
    run_folder: Path,
    *,
    start: FarWeights | None = None,
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
) -> FarWeights:
    """Teach ``base`` the concepts of ``training_set``; the base comes back as it was, on the training device.

    ``start``: weights of the same base to learn on from, instead of from nothing; new concepts may join them.
    ``run_folder`` gets run.json, metrics.jsonl, checkpoints, samples and ``weights.safetensors``. Raises Interrupted
    when ``should_stop`` says so (after saving), TrainingDiverged, DatasetError, CheckpointError, OutputError.
    """
    run = TrainingRun(base, training_set, config, Path(run_folder), resume, callbacks, start)
    try:
        run.set_up()
        run.fit()
        return run.save_weights()
    finally:
        run.clean_up()


class TrainingRun:
    """One training from beginning to end; see :func:`train`."""

    def __init__(
        self,
        base: BaseModel,
        training_set: TrainingSet,
        config: TrainConfig,
        folder: Path,
        resume: bool = False,
        callbacks: Callbacks = Callbacks(),
        start: FarWeights | None = None,
    ):
        if not training_set.composite_count():
            raise DatasetError("dataset: it holds no composites; fuse at least one")
        check_size(base, training_set.size, training_set.size)
        if start is not None:
            start.check_fits(base)
        self.base, self.training_set, self.config = base, training_set, config
        self.folder, self.callbacks, self.start = folder, callbacks, start
        self.steps = config.steps_for(len(training_set.names))
        self.vocabulary = Vocabulary(base.tokenizer, training_set.names, base.tokenizer_size, config.vectors_per_token)
        self.device, self.dtype = choose_device(config.device, config.precision)
        self.trainables: Trainables | None = None
        self.recorder: AttentionRecorder | None = None
        open_run(folder, run_identity(base, training_set, config, start), resume)

    # ---- set up

    def set_up(self) -> None:
        """Draw missing class pictures, encode the pool, put the learning parameters in, restore a checkpoint."""
        config, base = self.config, self.base.to(self.device, self.dtype)
        if config.prior_batch_size and not self.training_set.prior_count():
            self._draw_priors()
        side = self.training_set.size // base.downscale
        layers = supervised_layers(base.unet, side, side, config.attention_cells)
        stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
        self.pools = encode_pool(
            self.training_set,
            base,
            self.vocabulary,
            stride,
            seed=config.train_seed,
            on_progress=self._reporter("encoding"),
        )
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.text_cache = TextCache()
        self.trainables = Trainables(base, self.vocabulary)
        if self.start is not None:
            self.start.initialize(self.vocabulary, self.trainables.rows, self.trainables.deltas)
        if config.refinement_weight > 0:
            self.recorder = AttentionRecorder(base.unet, layers)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # diffusers checkpoints in training mode only; the UNet has no dropout
        samples_per_step = config.batch_size + (config.prior_batch_size if self.pools[1] else 0)
        self.optimizer = self.trainables.optimizer(config, samples_per_step)
        self.step = load_checkpoint(self.folder / "checkpoints", self.trainables.named_parameters(), self.optimizer)
        cut_metrics(self.folder / METRICS_FILE, self.step)

    def _draw_priors(self) -> None:
        pictures = draw_class_pictures(
            self.base,
            [n.noun for n in self.training_set.names],
            self.config.prior_pictures,
            self.folder / "priors",
            SampleConfig(sampling_steps=self.config.prior_steps, sample_seed=self.config.train_seed),
            size=self.training_set.size,
            on_progress=self._reporter("class pictures"),
            on_step=lambda *_: self._check_stop("class pictures"),
        )
        self.training_set = WithPriors(self.training_set, pictures)

    def _reporter(self, phase: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self.callbacks.on_phase(phase, done, total)
            self._check_stop(phase)

        return report

    def _check_stop(self, phase: str) -> None:
        if self.callbacks.should_stop():
            raise Interrupted(f"stopped in the phase '{phase}'; resume the run to go on")

    # ---- train

    def fit(self) -> None:
        """All remaining steps, with checkpoints and sample pictures."""
        failures, saved = 0, self.step
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as metrics_file:
            while self.step < self.steps:
                if self.callbacks.should_stop():
                    if saved != self.step:
                        metrics_file.flush()
                        self._save_checkpoint()
                    raise Interrupted(f"stopped at step {self.step} of {self.steps}, which is saved; resume to go on")
                started = time.perf_counter()
                metrics = self.train_step()
                failures = 0 if metrics["finite"] else failures + 1
                if failures == PATIENCE:
                    raise TrainingDiverged(
                        f"the loss was not finite for {PATIENCE} steps up to step {self.step}; the last checkpoint is "
                        "kept. Lower kv_lr or embedding_lr, or use precision fp32"
                    )
                metrics["seconds"] = round(time.perf_counter() - started, 4)
                metrics_file.write(json.dumps({"step": self.step, **metrics}) + "\n")
                self.callbacks.on_step(self.step, metrics)
                if self.step % self.config.save_every == 0 or self.step == self.steps:
                    metrics_file.flush()
                    self._save_checkpoint()
                    saved = self.step
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self._sample()

    def train_step(self) -> dict[str, float]:
        """One optimizer step on this step's batch; a gradient that isn't finite leaves every parameter as it is."""
        config = self.config
        batch = draw_batch(
            self.pools,
            (config.batch_size, config.prior_batch_size),
            len(self.alphas_cumprod),
            seed=config.train_seed,
            step=self.step,
        )
        self.optimizer.zero_grad(set_to_none=True)
        size = config.micro_batch or len(batch.latents)
        starts = range(0, len(batch.latents), size)
        parts = [self.backward(slice_batch(batch, start, start + size).to(self.device)) for start in starts]
        parameters = list(self.trainables.named_parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        values = torch.cat([torch.stack(parts).sum(0), norm[None]]).tolist()
        metrics = dict(zip(("loss", "denoising", "refinement", "prior", "grad_norm"), values))
        metrics["finite"] = math.isfinite(metrics["grad_norm"])
        if metrics["finite"]:
            self.optimizer.step()
            self.trainables.cap_norms()
        else:
            log.warning("Step %d: the gradient is not finite; the step is skipped.", self.step + 1)
        self.step += 1
        return metrics

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of one part of the step's batch (method.md, section 3).

        Returns the part's share [4] of the step's loss, denoising, refinement and prior terms: the shares of all
        parts add up to the whole, whatever the cut.
        """
        config = self.config
        alphas = self.alphas_cumprod[batch.timesteps]
        noisy, target = losses.add_noise(batch.latents, batch.noise, alphas, self.base.prediction_type)
        instance = batch.is_instance / config.batch_size
        prior = ~batch.is_instance / max(config.prior_batch_size, 1)
        select = torch.cat([batch.token_select, batch.noun_select], 1)
        with self.recorder.recording(select) if self.recorder else nullcontext():
            context = encode_prompts(self.base, batch.prompts, self.text_cache)
            prediction = self.base.unet(noisy.to(context.dtype), batch.timesteps, context).sample
            weight = losses.subject_weight(batch.cell_masks, config.background_weight)
            weight = torch.where(batch.is_instance[:, None, None, None], weight, 1.0)
            snr = losses.min_snr_weight(alphas, self.base.prediction_type, config.min_snr_gamma)
            error = snr * losses.denoising_loss(prediction, target, weight)
            refinement = self._refinement(batch) if self.recorder else torch.zeros_like(error)
            schedule = losses.refinement_schedule(alphas, self.step, self.steps, config.refinement_ramp)
            denoising_share, prior_share = (instance * error).sum(), (prior * error).sum()
            loss = denoising_share + config.prior_weight * prior_share
            loss = loss + config.refinement_weight * (instance * schedule * refinement).sum()
            loss.backward()
        refinement_share = (instance * refinement).sum()
        return torch.stack([loss, denoising_share, refinement_share, prior_share]).detach()

    def _refinement(self, batch: Batch) -> Tensor:
        """Localized Refinement [B] of the pass just recorded; 0 for samples without mentions."""
        token_maps, noun_maps = self.recorder.maps(*batch.latents.shape[-2:]).chunk(2, 1)
        return losses.refinement_loss(
            token_maps,
            noun_maps,
            batch.map_masks,
            batch.is_concept,
            batch.is_mention,
            noun_weight=self.config.noun_weight,
            competition_weight=self.config.competition_weight,
            localization=self.config.localization,
        )

    # ---- save, clean up

    def _save_checkpoint(self) -> None:
        folder, keep = self.folder / "checkpoints", self.config.keep_checkpoints
        save_checkpoint(folder, self.step, self.trainables.named_parameters(), self.optimizer, keep)

    def _sample(self) -> None:
        prompts = self.config.sample_prompts or default_prompts(self.training_set.names)
        settings = SampleConfig(sampling_steps=self.config.sample_steps, sample_batch=1)
        pictures = draw_pictures(self.base, self.vocabulary, prompts, settings, size=(self.training_set.size,) * 2)
        for i, picture in enumerate(pictures):
            save_picture(self.folder / "samples" / f"step-{self.step:06d}-{i}.png", picture)
        self.callbacks.on_samples(self.step, prompts, pictures)

    def save_weights(self) -> FarWeights:
        """Write the weights file that a finished run is known by."""
        names, rows = self.training_set.names, self.trainables.rows.detach().cpu()
        weights = FarWeights(
            embeddings={n.token: rows[list(self.vocabulary.rows(n.token))].clone() for n in names},
            deltas={k: d.detach().to("cpu", torch.float16) for k, d in self.trainables.deltas.items()},
            provenance=Provenance(
                family=self.base.family,
                base_digest=self.base.digest,
                prediction_type=self.base.prediction_type,
                nouns={n.token: n.noun for n in names},
                steps=self.step,
                size=self.training_set.size,
                config=self.config.to_dict(),
            ),
        )
        weights.save(self.folder / WEIGHTS_FILE)
        return weights

    def clean_up(self) -> None:
        """Leave the base as it was found."""
        if self.recorder:
            self.recorder.remove()
        if self.trainables:
            self.trainables.remove()
        if self.config.gradient_checkpointing:
            self.base.unet.disable_gradient_checkpointing()
            self.base.unet.eval()
