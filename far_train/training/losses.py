"""The loss of Fuse-and-Refine as pure functions: denoising and Localized Refinement.

A reconstruction (docs/explanation/method.md, The loss); each function names the published form that it follows. Shapes:
B samples, N mentions, h×w cells of an attention map or of the latents. Losses have one value per sample, so that
micro-batches and several processes add up to the same step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8
EMPTY_CELL = 0.02  # a mask's share of a cell, below which its subject isn't there


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noisy latents and the target of the prediction, both [B, C, h, w], for ᾱ_t [B].

    The target is the noise in ε-prediction (Ho et al. 2020, arXiv 2006.11239, eq. 14), √ᾱ ε − √(1−ᾱ) z in
    v-prediction (Salimans & Ho 2022, arXiv 2202.00512, section 2.4).
    """
    signal, spread = (x[:, None, None, None] for x in (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))
    noisy = signal * latents + spread * noise
    return noisy, (signal * noise - spread * latents if prediction_type == "v_prediction" else noise)


def min_snr_weight(alphas_cumprod: Tensor, prediction_type: str, gamma: float | None) -> Tensor:
    """Min-SNR weight of each sample [B] from its ᾱ_t [B] (Hang et al. 2023, arXiv 2303.09556, eq. 8).

    min(SNR, γ)/SNR for ε-prediction, min(SNR, γ)/(SNR + 1) for v-prediction; ones without ``gamma``.
    """
    if gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod).clamp(min=EPS)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr.clamp(min=EPS))


def subject_weight(masks: Tensor, background_weight: float, per_mention: bool = False) -> Tensor:
    """Weight [B, 1, h, w] of each latent cell: 1 on subjects grown by one cell, ``background_weight`` elsewhere.

    ``masks`` [B, N, h, w] are the mentions' masks averaged over each latent cell (after Break-a-Scene's masked loss).
    ``per_mention``: all subjects of a sample contribute equally to the sum, whose total stays the same.
    """
    if not masks.shape[1]:
        return torch.full_like(masks[:, :1].sum(1, keepdim=True), background_weight)
    grown = _grown(masks)
    if per_mention:
        areas = grown.sum((2, 3), keepdim=True)
        mean = areas.sum(1, keepdim=True) / (areas > 0).sum(1, keepdim=True).clamp(min=1)
        grown = grown * mean / areas.clamp(min=EPS)
    return background_weight + (1 - background_weight) * grown.amax(1, keepdim=True)


def _grown(masks: Tensor) -> Tensor:
    """Masks [B, N, h, w] grown by one cell."""
    return F.max_pool2d(masks, 3, stride=1, padding=1).clamp(0, 1)


def preserved_target(target: Tensor, base_prediction: Tensor, masks: Tensor) -> Tensor:
    """Target [B, C, h, w] of the denoising loss with output preservation.

    ``target`` on the subjects and one cell around them, elsewhere what the frozen base predicts for the caption
    without placeholder tokens. ``masks``: [B, N, h, w]; a sample without mentions gets ``base_prediction`` alone. After
    the differential output preservation of ai-toolkit (https://github.com/ostris/ai-toolkit), which does so for whole
    images; by region it is FaR's own.
    """
    if not masks.shape[1]:
        return base_prediction
    return torch.where(_grown(masks).amax(1, keepdim=True) > EMPTY_CELL, target, base_prediction)


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error [B] of a prediction [B, C, h, w], as a mean over cells weighted by ``weight`` [B, 1, h, w].

    The weights are normalised within each sample, however much of the image its subjects cover. Within a sample the
    error is a sum over cells: the larger of two subjects dominates it, unless ``weight`` compensates for that.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    if weight is None:
        return error.mean((1, 2, 3))
    return (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=EPS)


def localization_loss(attention: Tensor, masks: Tensor) -> Tensor:
    """Distance of each map from its mask: mean over cells of (M − A / max A)², [B, N].

    ``attention`` and ``masks`` are [B, N, h, w]. After Break-a-Scene (Avrahami et al. 2023, arXiv 2305.16311, eq. 3);
    here the maximum is detached, so that a map can't fit its mask by lowering its peak. Scale-free, because the
    start token takes most of the probability; and unlike a share inside the mask it rewards covering the subject.
    """
    peak = attention.amax((-2, -1), keepdim=True).detach().clamp(min=EPS)
    return (masks - attention / peak).square().mean((-2, -1))


def competition_loss(attention: Tensor, masks: Tensor, present: Tensor, per_mention: bool = False) -> Tensor:
    """Cross-entropy of the mentions' normalised attention inside their masks, [B]: each should own its cells.

    −Σ_p Σ_i M_i(p) log(A_i(p) / Σ_j A_j(p)) / Σ_p Σ_i M_i(p), or ``per_mention`` the mean over mentions of each one's
    own such quotient. ``attention`` and ``masks`` are [B, N, h, w], ``present`` [B, N] marks the rows that are mentions
    and not padding. 0 for a single mention.
    """
    here = present[..., None, None].to(attention.dtype)
    attention, masks = attention * here, masks * here
    share = attention / attention.sum(1, keepdim=True).clamp(min=EPS)
    owned, areas = -(masks * share.clamp(min=EPS).log()).sum((2, 3)), masks.sum((2, 3))
    if per_mention:
        return (owned / areas.clamp(min=EPS)).sum(1) / (areas > 0).sum(1).clamp(min=1)
    return owned.sum(1) / areas.sum(1).clamp(min=EPS)


def refinement_loss(
    token_maps: Tensor,
    noun_maps: Tensor,
    masks: Tensor,
    is_concept: Tensor,
    is_mention: Tensor,
    *,
    noun_weight: float,
    competition_weight: float,
    localization: str = "mse",
    per_mention: bool = False,
) -> Tensor:
    """Localized Refinement of each sample, [B].

    mean_i [L_loc(V_i) + ``noun_weight`` · L_loc(c_i)] + ``competition_weight`` · [L_cmp(nouns) + L_cmp(tokens)].
    ``token_maps``, ``noun_maps``, ``masks``: [B, N, h, w], the attention of each mention's placeholder token and
    class noun, and its region; ``is_concept``, ``is_mention``: bool [B, N]. A subject of the class alone has only a
    noun map; rows that are no mention are padding. Nouns compete with the nouns of all mentions, tokens with those of
    concepts.
    """
    total = torch.zeros(len(masks), dtype=token_maps.dtype, device=token_maps.device)
    if localization == "mse":
        each = is_concept * localization_loss(token_maps, masks)
        each = each + noun_weight * is_mention * localization_loss(noun_maps, masks)
        total = each.sum(1) / is_mention.sum(1).clamp(min=1)
    competition = competition_loss(noun_maps, masks, is_mention, per_mention)
    competition = competition + competition_loss(token_maps, masks, is_concept, per_mention)
    return total + competition_weight * competition


def refinement_ramp(step: int, steps: int, ramp: float) -> float:
    """Weight of the refinement loss in step number ``step`` (from 0) of ``steps``: it rises linearly to 1 over the
    first ``ramp`` × ``steps``."""
    ramp_steps = ramp * steps
    return min((step + 1) / ramp_steps, 1.0) if ramp_steps >= 1 else 1.0


def refinement_timestep_weight(alphas_cumprod: Tensor) -> Tensor:
    """Weight of the refinement loss for each sample, [B]: w(t) = √ᾱ_t.

    At high noise a subject's identity can't be read yet; full supervision there would teach layout shortcuts.
    """
    return alphas_cumprod.sqrt()
