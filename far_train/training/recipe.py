"""The training recipe, to be read from top to bottom: set up, train, save, clean up.

``train`` is the one entry. What is stopped, killed or out of power goes on from its last checkpoint with
``resume=True`` and ends, on the CPU, in the same bits. Under ``torchrun`` several processes share each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.captions import default_prompts
from ..data.concepts import TrainingSet
from ..data.images import save_picture
from ..models.adapters import Trainables, put_trainables, set_learning_rates
from ..models.attention_maps import AttentionRecorder, layer_stride, supervised_layers
from ..models.base import BaseModel, set_checkpointing, set_compiled, uncompiled
from ..models.sampling import TextCache, check_size, draw_pictures, encode_prompts
from ..models.tokens import ModifierEmbedding, Vocabulary
from ..models.weights import FarWeights, Provenance
from ..utils.config import SampleConfig, TrainConfig
from ..utils.devices import choose_device
from ..utils.errors import BaseModelError, ConfigError, DatasetError, Interrupted
from ..utils.files import check_space
from ..utils.out_of_memory import skip_without_memory
from . import losses
from .callbacks import Callbacks
from .checkpoints import checkpoint_bytes, load_checkpoint, save_checkpoint
from .class_images import with_class_pictures
from .distributed import World
from .latent_cache import Batch, draw_batch, encode_pool, slice_batch
from .memory_plan import plan_memory
from .metrics import Readback, StepReports
from .oom_fallback import OomFallback
from .run_folder import METRICS_FILE, WEIGHTS_FILE, MetricsLog, cut_metrics, open_run, run_identity

PATIENCE = 3  # non-finite steps in a row that end a run
FP16_SCALE = 2.0**12  # of the loss at first; each overflow halves it, and is then no failure


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
    """Teach ``base`` the concepts of ``training_set``; the base comes back as it was.

    ``start``: weights of the same base to learn on from; new concepts may join them. ``keep_base``: False for a base
    that nobody needs afterwards: it stays on the training device in the training's precision, and no memory is spent
    on its original weights.
    ``run_folder`` gets run.json, metrics.jsonl, checkpoints, samples and ``weights.safetensors``. Raises Interrupted
    when ``should_stop`` says so (after saving), TrainingDiverged, OutOfMemory, or errors of dataset and disk.
    """
    with World.current().failing_together():
        run = TrainingRun(base, training_set, config, Path(run_folder), resume, callbacks, start, keep_base)
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
        keep_base: bool = True,
    ):
        if isinstance(base.text_encoder.get_input_embeddings(), ModifierEmbedding):
            raise BaseModelError(
                "base: FaR weights are applied to it; load it anew, or train outside of 'with weights.applied(base)'. "
                "To train on from weights, give them as start (continue_from)"
            )
        if not training_set.composite_count():
            raise DatasetError("dataset: it holds no composites; fuse at least one")
        check_size(base, training_set.size, training_set.size)
        if start is not None:
            start.check_fits(base)
        self.base, self.training_set, self.config = base, training_set, config
        self.folder, self.callbacks, self.start, self.keep_base = folder, callbacks, start, keep_base
        self.placed = ExitStack()  # undoes what set_up does to the base's weights
        self.steps = config.steps_for(len(training_set.names))
        self.vocabulary = Vocabulary(base.tokenizer, training_set.names, base.tokenizer_size, config.vectors_per_token)
        self.device, self.dtype = choose_device(config.device, config.precision)
        self.trainables: Trainables | None = None
        self.recorder: AttentionRecorder | None = None
        self.world = World.current()
        if config.batch_size < self.world.size:
            raise ConfigError(f"batch_size: {config.batch_size} composites are too few for {self.world.size} processes")
        if self.world.writes:
            open_run(folder, run_identity(base, training_set, config, start), resume)
        self.world.wait()

    # ---- set up

    def set_up(self) -> None:
        """Draw missing class pictures, encode the pool, put the learning parameters in, restore a checkpoint."""
        config, base = self.config, self.base
        if self.keep_base:
            self.placed.enter_context(base.placed(self.device, self.dtype))
        else:
            base.to(self.device, self.dtype)
        if config.prior_batch_size and not self.training_set.prior_count():
            folder, report = self.folder / "priors", self._reporter("class pictures")
            self.training_set = with_class_pictures(self.training_set, base, config, folder, report)
        side = self.training_set.size // base.downscale
        layers = supervised_layers(base.unet, side, side, config.attention_cells)
        stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
        seed, report = config.train_seed, self._reporter("encoding")
        self.pools = encode_pool(self.training_set, base, self.vocabulary, stride, seed=seed, on_progress=report)
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.text_cache = TextCache(base, [sample.prompt for pool in self.pools for sample in pool])
        self.trainables = put_trainables(base, self.vocabulary, config)
        if self.start is not None:
            self.start.initialize(self.vocabulary, self.trainables.rows)
            self.trainables.start_from(self.start)
        if config.refinement_weight > 0:
            self.recorder = AttentionRecorder(base.unet, layers)
        samples_per_step = config.batch_size + (config.prior_batch_size if self.pools[1] else 0)
        self.optimizer = self.trainables.optimizer(config, samples_per_step)
        # The scaler also skips a step that isn't finite, without asking the host; only fp16 needs a scale for that.
        self.first_scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        self.scaler = torch.amp.GradScaler(self.device.type, self.first_scale)
        self.readback = Readback(self.device)
        check_space(self.folder, checkpoint_bytes(self.trainables.named_parameters()))
        self.scaler_state = nn.Parameter(torch.tensor([self.first_scale, 0.0]), requires_grad=False)
        self.step = load_checkpoint(self.folder / "checkpoints", self._saved(), self.optimizer)
        if self.dtype == torch.float16:
            scale, growth = self.scaler_state.tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        if self.world.writes:
            cut_metrics(self.folder / METRICS_FILE, self.step)
        self.thrift = self._plan_memory(-(-samples_per_step // self.world.size))
        if config.compile:  # after the trial, whose one sample is a size of its own
            set_compiled(base.unet, True)

    def _plan_memory(self, samples: int) -> OomFallback:
        """Choose how many of this process's samples run at once, and whether the UNet is checkpointed."""

        def one_sample(checkpointing: bool) -> None:
            set_checkpointing(self.base.unet, checkpointing)
            self.backward(slice_batch(self._draw(), 0, 1).to(self.device))
            self.optimizer.zero_grad(set_to_none=True)

        plan = plan_memory(self.config, samples, self.device, one_sample)
        return OomFallback(self.base.unet, plan.micro_batch, plan.checkpointing)

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
        saved, patience = self.step, PATIENCE + int(math.log2(self.first_scale))
        with MetricsLog(self.folder / METRICS_FILE) if self.world.writes else nullcontext() as history:
            reports = StepReports(self.readback, history, self.callbacks.on_step, patience)
            while self.step < self.steps:
                if self.world.any(self.callbacks.should_stop()):
                    reports.pass_on(all=True)
                    if saved != self.step and self.world.writes:
                        self._save_checkpoint()
                    raise Interrupted(f"stopped at step {self.step} of {self.steps}, which is saved; resume to go on")
                self.take_step()
                save = self.step % self.config.save_every == 0 or self.step == self.steps
                sample = bool(self.config.sample_every) and self.step % self.config.sample_every == 0
                reports.pass_on(all=save or sample)
                if save and self.world.writes:
                    self._save_checkpoint()
                    saved = self.step
                if sample and self.world.writes:
                    with suppress(Interrupted), skip_without_memory("the sample pictures"):  # a stop is met above
                        self._sample()
                reports.start_clock()

    def train_step(self) -> dict[str, Any]:
        """Take one step and wait for its metrics."""
        self.take_step()
        return self.readback.take(all=True)[-1][1]

    def take_step(self) -> None:
        """Queue one optimizer step without waiting for it; a gradient that isn't finite leaves all as it is."""
        batch = slice_batch(self._draw(), self.world.rank, None, self.world.size)

        def gradient(size: int) -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            starts = range(0, len(batch.latents), size)
            parts = [self.backward(slice_batch(batch, i, i + size).to(self.device)) for i in starts]
            return torch.stack(parts).sum(0)

        shares = self.thrift.run(gradient, len(batch.latents))
        self.world.wait()  # where a process failed before its part of the sum, nobody shall wait for it
        self.world.sum([shares, *self.trainables.gradients()])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainables.named_parameters().values(), self.config.grad_clip)
        set_learning_rates(self.optimizer, self.step, self.steps, self.config.lr_decay)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.dtype == torch.float16 else self.first_scale)
        self.trainables.cap_norms()
        self.step += 1
        self.readback.put(self.step, torch.cat([shares, norm[None]]))

    def _draw(self) -> Batch:
        counts = (self.config.batch_size, self.config.prior_batch_size)
        return draw_batch(self.pools, counts, len(self.alphas_cumprod), seed=self.config.train_seed, step=self.step)

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of one part of the step's batch (docs/explanation/method.md, The loss).

        Returns the part's share [4] of the step's loss, denoising, refinement and prior terms: the shares of all
        parts add up to the whole, whatever the cut.
        """
        config = self.config
        alphas = self.alphas_cumprod[batch.timesteps]
        noisy, target = losses.add_noise(batch.latents, batch.noise, alphas, self.base.prediction_type)
        instance = batch.is_instance / config.batch_size
        prior = ~batch.is_instance / max(config.prior_batch_size, 1)
        select = torch.cat([batch.token_select, batch.noun_select], 1)
        context = encode_prompts(self.base, batch.prompts, self.text_cache)
        recording = self.recorder.recording(select) if self.recorder else nullcontext()
        with recording, self.trainables.projecting(context):
            prediction = self.base.unet(noisy.to(context.dtype), batch.timesteps, context).sample
            weight = losses.subject_weight(batch.cell_masks, config.background_weight, config.per_mention)
            weight = torch.where(batch.is_instance[:, None, None, None], weight, 1.0)
            snr = losses.min_snr_weight(alphas, self.base.prediction_type, config.min_snr_gamma)
            error = snr * losses.denoising_loss(prediction, target, weight)
            refinement = self._refinement(batch) if self.recorder else torch.zeros_like(error)
            schedule = losses.refinement_schedule(alphas, self.step, self.steps, config.refinement_ramp)
            denoising_share, prior_share = (instance * error).sum(), (prior * error).sum()
            loss = denoising_share + config.prior_weight * prior_share
            loss = loss + config.refinement_weight * (instance * schedule * refinement).sum()
            self.scaler.scale(loss).backward()
        return torch.stack([loss, denoising_share, (instance * refinement).sum(), prior_share]).detach()

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
            per_mention=self.config.per_mention,
        )

    # ---- save, clean up

    def _saved(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds beside the optimizer's moments; fp16 also has a loss scale, which changes."""
        scaler = {"scaler": self.scaler_state} if self.dtype == torch.float16 else {}
        return {**self.trainables.named_parameters(), **scaler}

    def _save_checkpoint(self) -> None:
        state = self.scaler.state_dict()
        if state:  # empty where the scaler is off, as where fp16 was asked for without a GPU to scale on
            self.scaler_state.copy_(torch.tensor([state["scale"], float(state["_growth_tracker"])]))
        folder, keep = self.folder / "checkpoints", self.config.keep_checkpoints
        save_checkpoint(folder, self.step, self._saved(), self.optimizer, keep)

    def _sample(self) -> None:
        prompts = self.config.sample_prompts or default_prompts(self.training_set.names)
        settings = SampleConfig(sampling_steps=self.config.sample_steps, sample_batch=1)
        size, check = (self.training_set.size,) * 2, lambda *_: self._check_stop("sample pictures")
        with uncompiled(self.base.unet):
            pictures = draw_pictures(self.base, self.vocabulary, prompts, settings, size=size, on_progress=check)
        for i, picture in enumerate(pictures):
            save_picture(self.folder / "samples" / f"step-{self.step:06d}-{i}.png", picture)
        self.callbacks.on_samples(self.step, prompts, pictures)

    def save_weights(self) -> FarWeights:
        """Write the weights file that a finished run is known by."""
        names, rows = self.training_set.names, self.trainables.rows.detach().cpu()
        deltas, products = self.trainables.learned()
        weights = FarWeights(
            embeddings={n.token: rows[list(self.vocabulary.rows(n.token))].clone() for n in names},
            deltas=deltas,
            products=products,
            provenance=Provenance(
                family=self.base.family,
                base_digest=self.base.digest,
                prediction_type=self.base.prediction_type,
                nouns={n.token: n.noun for n in names},
                steps=self.step,
                size=self.training_set.size,
                config=self.config.replace(prior_cache=None).to_dict(),  # files travel; this user's folders don't
            ),
        )
        if self.world.writes:
            weights.save(self.folder / WEIGHTS_FILE)
        return weights

    def clean_up(self) -> None:
        """Leave the base as it was found."""
        for installed in filter(None, (self.recorder, self.trainables)):
            installed.remove()
        set_checkpointing(self.base.unet, False)
        if self.config.compile:
            set_compiled(self.base.unet, False)
        self.placed.close()
