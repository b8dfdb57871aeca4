"""One optimizer step: sample a batch, run it forward and backward in micro-batches, all-reduce, clip, update.

Nothing in here waits for the device. What differs from step to step reaches :func:`forward_backward` through its
arguments, and its result stays on the device, so that a GPU can run ahead of the host.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..models.adapters import set_learning_rates
from ..models.conditioning import Conditioning
from . import losses
from .latent_cache import Batch
from .state import RunState
from .step_graph import Capture, GraphedPasses, Inputs, capture_cuda_graph


def take_step(state: RunState) -> Tensor:
    """Take one step; returns its metrics [6] on the device, in the order of ``metrics.NAMES``.

    A gradient that isn't finite changes no parameter. Raises OutOfMemory, ProcessFailed.
    """
    world = state.world
    batch = sample_batch(state)[world.rank :: world.size]
    terms = state.oom_fallback.run(lambda micro_batch: accumulate_gradients(state, batch, micro_batch), len(batch))
    world.barrier()  # raises if another process failed; the sum would wait for it forever
    world.all_reduce_sum([terms, *state.adapter.gradients()])
    norm = update(state)
    state.step += 1
    return torch.cat([terms, norm[None]])


def sample_batch(state: RunState) -> Batch:
    """The batch of the next step on the CPU, the same in every process."""
    config = state.config
    counts = (config.batch_size, config.prior_batch_size)
    return state.latent_cache.sample_batch(
        counts,
        len(state.alphas_cumprod),
        seed=config.train_seed,
        step=state.step,
        mentions=state.latent_cache.max_mentions if state.graphed_passes else None,  # a graph's shapes are fixed
    )


def accumulate_gradients(state: RunState, batch: Batch, micro_batch: int) -> Tensor:
    """Put the gradient of ``batch`` into the parameters, ``micro_batch`` samples at a time; returns its loss terms [5].

    It begins by clearing the gradients, so that a call that ran out of memory can be repeated.
    """
    graphed = state.graphed_passes
    state.optimizer.zero_grad(set_to_none=graphed is None)  # a graph adds to gradients at fixed addresses
    ramp = losses.refinement_ramp(state.step, state.steps, state.config.refinement_ramp)
    parts = [batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)]
    if graphed is None:
        terms = [run_eagerly(state, part, ramp) for part in parts]
    else:
        terms = [graphed(graph_inputs(state, part, ramp)) for part in parts]
    return torch.stack(terms).sum(0)


def run_eagerly(state: RunState, batch: Batch, ramp: float) -> Tensor:
    """:func:`forward_backward` of a batch on the CPU; equal prompts are encoded once."""
    conditioning = state.conditioner.encode(batch.prompts, state.size)
    return forward_backward(state, batch.to(state.device), conditioning, base_conditioning(state, batch), ramp)


def base_conditioning(state: RunState, batch: Batch) -> Conditioning | None:
    """Conditioning of the batch's prompts without placeholder tokens, if the run preserves the base's output."""
    if not state.config.output_preservation:
        return None
    return state.conditioner.encode([state.conditioner.without_placeholders(p) for p in batch.prompts], state.size)


def graph_passes(state: RunState, capture: Capture = capture_cuda_graph) -> GraphedPasses:
    """:func:`forward_backward` behind a CUDA graph, called with :func:`graph_inputs`."""

    def compute(inputs: Inputs) -> Tensor:
        tensors = dict(inputs)
        ramp, ids = tensors.pop("ramp"), [tensors.pop(name) for name in _ids_names(state)]
        conditioning = state.conditioner.encode_ids(ids, state.size)
        base = {name: tensors.pop(f"base.{name}") for name in _CONDITIONING if f"base.{name}" in tensors}
        return forward_backward(
            state, Batch(**tensors, prompts=()), conditioning, Conditioning(**base) if base else None, ramp
        )

    return GraphedPasses(compute, list(state.adapter.named_parameters().values()), state.device, capture)


def graph_inputs(state: RunState, batch: Batch, ramp: float) -> dict[str, Tensor]:
    """Everything that changes from step to step, as tensors."""
    inputs = {**batch.tensors(), "ramp": torch.tensor(ramp)}
    inputs |= zip(_ids_names(state), state.conditioner.ids(batch.prompts))
    if base := base_conditioning(state, batch):
        inputs |= {f"base.{name}": value for name in _CONDITIONING if (value := getattr(base, name)) is not None}
    return inputs


_CONDITIONING = tuple(field.name for field in fields(Conditioning))


def _ids_names(state: RunState) -> list[str]:
    return [f"ids.{spec.part}" for spec in state.base.family.text_encoders]


def forward_backward(
    state: RunState, batch: Batch, conditioning: Conditioning, base: Conditioning | None, ramp: float | Tensor
) -> Tensor:
    """Add the gradient of a part of the step's batch (docs/explanation/method.md, The loss) to the parameters.

    ``batch`` is on the device; ``base`` is the :func:`base_conditioning`; ``ramp`` is the refinement loss's weight in
    this step. Returns the loss, its denoising, refinement and prior-preservation terms without their weights in it, and
    the untouched base's denoising loss against the images (0 if ``base`` is None), [5] on the device. All are scaled
    for the whole step's batch: those of its parts add up to those of the step, however it is divided. It reads nothing
    back to the host.
    """
    config, prediction_type = state.config, state.base.prediction_type
    alphas = state.alphas_cumprod[batch.timesteps]
    noisy, target = losses.add_noise(batch.latents, batch.noise, alphas, prediction_type)
    # Of each sample in the means over composites and over regularization images.
    composite_share = batch.is_instance / config.batch_size
    prior_share = ~batch.is_instance / max(config.prior_batch_size, 1)
    select = torch.cat([batch.token_select, batch.noun_select], 1)
    snr_weight = losses.min_snr_weight(alphas, prediction_type, config.min_snr_gamma)
    cell_weight = losses.subject_weight(batch.cell_masks, config.background_weight, config.per_mention)
    cell_weight = torch.where(batch.is_instance[:, None, None, None], cell_weight, 1.0)
    base_error = torch.zeros_like(alphas)
    if base is not None:
        with torch.no_grad(), state.adapter.disabled():
            base_prediction = _predict(state, noisy, batch.timesteps, base).float()
        base_error = snr_weight * losses.denoising_loss(base_prediction, target, cell_weight)
        learned = batch.cell_masks * batch.is_instance[:, None, None, None]
        target = losses.preserved_target(target, base_prediction, learned)
    context = conditioning.context
    recording = state.recorder.recording(select) if state.recorder else nullcontext()
    with recording, state.adapter.prepared_for(context):
        prediction = _predict(state, noisy, batch.timesteps, conditioning)
        error = snr_weight * losses.denoising_loss(prediction, target, cell_weight)
        refinement = refinement_loss(state, batch) if state.recorder else torch.zeros_like(error)
        schedule = ramp * losses.refinement_timestep_weight(alphas)
        denoising, prior = (composite_share * error).sum(), (prior_share * error).sum()
        loss = denoising + config.prior_loss_weight * prior
        loss = loss + config.refinement_weight * (composite_share * schedule * refinement).sum()
        state.scaler.scale(loss).backward()  # in this context, since checkpointed layers run forward again
    terms = [loss, denoising, (composite_share * refinement).sum(), prior, (composite_share * base_error).sum()]
    return torch.stack(terms).detach()


def _predict(state: RunState, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet's prediction [B, C, h, w] for noisy latents [B, C, h, w]."""
    context = conditioning.context
    return state.base.unet(noisy.to(context.dtype), timesteps, context, **conditioning.unet_kwargs()).sample


def refinement_loss(state: RunState, batch: Batch) -> Tensor:
    """Localized Refinement [B] of the forward pass just recorded; 0 for samples without mentions."""
    config = state.config
    token_maps, noun_maps = state.recorder.maps(*batch.latents.shape[-2:]).chunk(2, 1)
    return losses.refinement_loss(
        token_maps,
        noun_maps,
        batch.map_masks,
        batch.is_concept,
        batch.is_mention,
        noun_weight=config.noun_weight,
        competition_weight=config.competition_weight,
        localization=config.localization,
        per_mention=config.per_mention,
    )


def update(state: RunState) -> Tensor:
    """Clip the gradient and apply it; returns its norm before clipping, on the device."""
    config, optimizer, scaler = state.config, state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(state.adapter.named_parameters().values(), config.max_grad_norm)
    set_learning_rates(optimizer, state.step, state.steps, config.lr_decay)
    scaler.step(optimizer)
    scaler.update_scale()
    state.adapter.cap_norms()
    return norm
