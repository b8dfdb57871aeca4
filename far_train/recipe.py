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
from typing import Any

import torch
from torch import Tensor

from . import losses
from .attention import AttentionRecorder, layer_stride, supervised_layers
from .backbone import BaseModel
from .concepts import TrainingSet
from .config import SampleConfig, TrainConfig
from .devices import choose_device
from .errors import ConfigError, DatasetError, Interrupted, TrainingDiverged
from .photos import save_picture
from .pool import Batch, draw_batch, encode_pool, slice_batch
from .priors import draw_class_pictures, with_drawn_priors
from .runs import cut_metrics, open_run
from .sampling import TextCache, draw_pictures, encode_prompts
from .state import load_checkpoint, save_checkpoint
from .tokens import Vocabulary
from .trainable import Trainables
from .weights import FarWeights, Provenance

log = logging.getLogger(__name__)

PATIENCE = 3  # non-finite steps in a row that end a run


@dataclass(frozen=True)
class Callbacks:
    """How a training talks to its caller: all are optional, none may change what is learned.

    ``on_phase(name, done, total)`` reports progress, ``on_step(step, metrics)`` each step, ``on_samples(step, prompts,
    pictures [n, H, W, 3])`` sample pictures; ``should_stop()`` is asked between steps.
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
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
) -> FarWeights:
    """Teach ``base`` the concepts of ``training_set``; the base comes back as it was.

    ``run_folder`` gets run.json, metrics.jsonl, checkpoints, samples and ``weights.safetensors``. Raises Interrupted
    when ``should_stop`` says so (after saving), TrainingDiverged, DatasetError, CheckpointError, OutputError.
    """
    run = _Run(base, training_set, config, Path(run_folder), resume, callbacks)
    try:
        run.prepare()
        run.fit()
        return run.finish()
    finally:
        run.clean_up()


class _Run:
    """One training from beginning to end."""

    def __init__(
        self,
        base: BaseModel,
        training_set: TrainingSet,
        config: TrainConfig,
        folder: Path,
        resume: bool,
        callbacks: Callbacks,
    ):
        self.config, self.callbacks, self.folder = config, callbacks, folder
        self.names = training_set.names
        self.steps = config.steps_for(len(self.names))
        if not training_set.composite_count():
            raise DatasetError("dataset: it holds no composites; fuse at least one")
        cell = base.downscale * 2 ** (len(base.unet.config.block_out_channels) - 1)
        if training_set.size % cell:
            raise ConfigError(f"size: {training_set.size} px does not fit this base; use a multiple of {cell}")
        self.training_set = training_set
        self.device, dtype = choose_device(config.device, config.precision)
        self.base = base.to(self.device, dtype)
        table = base.text_encoder.get_input_embeddings()
        self.vocabulary = Vocabulary(base.tokenizer, self.names, table.num_embeddings, config.vectors_per_token)
        self.trainables: Trainables | None = None
        self.recorder: AttentionRecorder | None = None
        open_run(folder, self._identity(), resume)

    # ---- set up

    def _identity(self) -> dict[str, Any]:
        """What decides the result of a run."""
        return {
            "config": self.config.result_shaping(),
            "base": {"digest": self.base.digest, "prediction_type": self.base.prediction_type},
            "dataset": self.training_set.digest(),
            "concepts": [{"token": n.token, "noun": n.noun} for n in self.names],
        }

    def prepare(self) -> None:
        """Draw missing class pictures, encode the pool, put the learning parameters in, restore a checkpoint."""
        config, base = self.config, self.base
        if config.prior_batch_size and not self.training_set.prior_count():
            pictures = draw_class_pictures(
                base,
                [n.noun for n in self.names],
                config.prior_pictures,
                self.folder / "priors",
                SampleConfig(sampling_steps=config.prior_steps, sample_seed=config.train_seed % 2**31),
                size=self.training_set.size,
                on_progress=self._reporter("class pictures"),
            )
            self.training_set = with_drawn_priors(self.training_set, pictures)
        latent_side = self.training_set.size // base.downscale
        layers = supervised_layers(base.unet, latent_side, latent_side, config.attention_cells)
        stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
        self.pools = encode_pool(
            self.training_set,
            base,
            self.vocabulary,
            stride,
            seed=config.train_seed,
            on_progress=self._reporter("encoding"),
        )
        base.vae.to("cpu")
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.text_cache = TextCache()
        self.trainables = Trainables(base, self.vocabulary)
        if config.refinement_weight > 0:
            self.recorder = AttentionRecorder(base.unet, layers)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # diffusers checkpoints in training mode only; the UNet has no dropout
        deltas = list(self.trainables.deltas.values())
        self.samples_per_step = config.batch_size + (config.prior_batch_size if self.pools[1] else 0)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.trainables.rows], "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": deltas, "lr": config.kv_lr * self.samples_per_step, "weight_decay": config.weight_decay},
            ]
        )
        self.step = load_checkpoint(self.folder / "checkpoints", self.trainables.named_parameters(), self.optimizer)
        cut_metrics(self.folder / "metrics.jsonl", self.step)

    def _reporter(self, phase: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self.callbacks.on_phase(phase, done, total)
            if self.callbacks.should_stop():
                raise Interrupted(f"stopped while {phase}; resume the run to go on")

        return report

    # ---- train

    def fit(self) -> None:
        """All remaining steps, with checkpoints and sample pictures."""
        failures = 0
        saved = self.step
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as metrics_file:
            while self.step < self.steps:
                if self.callbacks.should_stop():
                    if saved != self.step:
                        self._save()
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.steps}; the run is saved, resume it to go on"
                    )
                started = time.perf_counter()
                metrics = self._train_step()
                self.step += 1
                failures = 0 if metrics["finite"] else failures + 1
                if failures >= PATIENCE:
                    raise TrainingDiverged(
                        f"the loss was not finite for {PATIENCE} steps up to step {self.step}; the last checkpoint is "
                        "kept. Lower kv_lr or embedding_lr, or use precision fp32"
                    )
                metrics["seconds"] = round(time.perf_counter() - started, 4)
                metrics_file.write(json.dumps({"step": self.step, **metrics}) + "\n")
                self.callbacks.on_step(self.step, metrics)
                if self.step % self.config.save_every == 0 or self.step == self.steps:
                    metrics_file.flush()
                    self._save()
                    saved = self.step
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self._sample()

    def _train_step(self) -> dict[str, float]:
        """One optimizer step on the batch of this step; a non-finite gradient leaves everything as it is."""
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
        sums = [
            self.backward(slice_batch(batch, start, start + size).to(self.device))
            for start in range(0, len(batch.latents), size)
        ]
        parameters = list(self.trainables.named_parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        loss, denoising, refinement, prior, norm = torch.stack([*torch.stack(sums).sum(0), norm]).tolist()
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.trainables.cap_norms()
        else:
            log.warning("Step %d: the gradient is not finite; the step is skipped.", self.step + 1)
        return {
            "loss": loss,
            "denoising": denoising,
            "refinement": refinement,
            "prior": prior,
            "grad_norm": norm,
            "finite": finite,
        }

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of a part of the step's batch; returns its share of loss, denoising, refinement, prior."""
        config, alphas = self.config, self.alphas_cumprod[batch.timesteps]
        context = encode_prompts(self.base, batch.prompts, self.text_cache)
        noisy, target = add_noise(batch.latents, batch.noise, alphas, self.base.prediction_type)
        refinement = torch.zeros(len(alphas), device=self.device)
        select = torch.cat([batch.token_select, batch.noun_select], 1)
        with self.recorder.recording(select) if self.recorder else nullcontext():
            prediction = self.base.unet(noisy.to(context.dtype), batch.timesteps, context).sample
            if self.recorder and batch.token_select.shape[1]:
                token_maps, noun_maps = self.recorder.maps(*noisy.shape[-2:]).chunk(2, 1)
                refinement = losses.refinement_loss(
                    token_maps,
                    noun_maps,
                    batch.map_masks,
                    batch.is_concept,
                    batch.is_mention,
                    noun_weight=config.noun_weight,
                    competition_weight=config.competition_weight,
                    localization=config.localization,
                )
            weight = losses.subject_weight(batch.cell_masks, config.background_weight)
            weight = torch.where(batch.is_instance[:, None, None, None], weight, 1.0)
            snr = losses.min_snr_weight(alphas, self.base.prediction_type, config.min_snr_gamma)
            error = snr * losses.denoising_loss(prediction, target, weight)
            schedule = losses.refinement_schedule(alphas, self.step, self.steps, config.refinement_ramp)
            instance = batch.is_instance / config.batch_size
            prior = (~batch.is_instance) / max(config.prior_batch_size, 1)
            shares = torch.stack([(instance * error).sum(), (instance * refinement).sum(), (prior * error).sum()])
            loss = shares[0] + config.refinement_weight * (instance * schedule * refinement).sum()
            loss = loss + config.prior_weight * shares[2]
            loss.backward()
        return torch.cat([loss.detach()[None], shares.detach()])

    # ---- save

    def _save(self) -> None:
        save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            self.trainables.named_parameters(),
            self.optimizer,
            self.config.keep_checkpoints,
        )

    def _sample(self) -> None:
        """Sample pictures; what goes wrong here must not end a training."""
        prompts = self.config.sample_prompts or default_prompts([n.phrase for n in self.names])
        settings = SampleConfig(sampling_steps=self.config.sample_steps, sample_batch=1)
        size = self.training_set.size
        self.base.vae.to(self.device)
        pictures = draw_pictures(self.base, self.vocabulary, prompts, settings, size=(size, size))
        self.base.vae.to("cpu")
        for i, picture in enumerate(pictures):
            save_picture(self.folder / "samples" / f"step-{self.step:06d}-{i}.png", picture)
        self.callbacks.on_samples(self.step, prompts, pictures)

    def finish(self) -> FarWeights:
        """Write the weights file."""
        provenance = Provenance(
            family=self.base.family,
            base_digest=self.base.digest,
            prediction_type=self.base.prediction_type,
            nouns={n.token: n.noun for n in self.names},
            steps=self.step,
            size=self.training_set.size,
            config=self.config.to_dict(),
        )
        rows = self.trainables.rows.detach().cpu()
        weights = FarWeights(
            embeddings={n.token: rows[list(self.vocabulary.rows(n.token))].clone() for n in self.names},
            deltas={k: d.detach().to("cpu", torch.float16) for k, d in self.trainables.deltas.items()},
            provenance=provenance,
        )
        weights.save(self.folder / "weights.safetensors")
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


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noisy latents and the target of the prediction, both [B, C, h, w], for ᾱ_t [B].

    ε-prediction: the noise (Ho et al. 2020); v-prediction: √ᾱ ε − √(1−ᾱ) z (Salimans & Ho 2022).
    """
    signal, spread = (x[:, None, None, None] for x in (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))
    noisy = signal * latents + spread * noise
    return noisy, (signal * noise - spread * latents if prediction_type == "v_prediction" else noise)


def default_prompts(phrases: Sequence[str]) -> tuple[str, ...]:
    """One sample prompt per concept, and one with all of them."""
    together = [f"a photo of {' and '.join(f'a {p}' for p in phrases)}"] if len(phrases) > 1 else []
    return (*together, *(f"a photo of a {p}" for p in phrases))
