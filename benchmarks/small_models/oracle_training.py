"""How the oracle learns: what it should say of a scene, and its losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_train.mini.oracle import FILE, HEADS, STRIDE, WIDTHS, Oracle, read_oracle
from far_train.mini.world import MOST_SPRITES
from far_train.utils.files import load_state

from .autoencoder import round_trip
from .learning import LearnConfig, OnStep, draw_rows, fit, seeded, step_generator, weights_digest, write_module
from .scene_pool import ScenePool

ROUND_TRIPS = 6000  # scenes that are decoded once for its training
CENTRE_SPREAD = 1.2  # cells: standard deviation of a centre's spot


def cell_targets(labels: Tensor) -> dict[str, Tensor]:
    """What :class:`Oracle` should say of label maps [B, S, S].

    ``inside`` [B, 3, h, w]: each sprite's share of each cell; ``centres`` [B, 3, 2]: x, y in cells; ``spot`` [B, h, w]:
    a bump at each centre; ``present`` bool [B, 3].
    """
    masks = torch.stack([labels == i + 1 for i in range(MOST_SPRITES)], 1).float()
    inside = F.avg_pool2d(masks, STRIDE)
    y, x = torch.meshgrid(*(torch.arange(n, device=labels.device).float() for n in inside.shape[-2:]), indexing="ij")
    area = inside.sum((-2, -1))
    centres = torch.stack([(inside * axis).sum((-2, -1)) / area.clamp(min=1e-6) for axis in (x, y)], -1)
    distance = (x - centres[..., :1, None]).square() + (y - centres[..., 1:, None]).square()
    present = area > 0
    bumps = (-distance / (2 * CENTRE_SPREAD**2)).exp() * present[..., None, None]
    return {"inside": inside, "centres": centres, "spot": bumps.amax(1), "present": present}


def shape_logit(codes: Tensor) -> Tensor:
    """Index of the shape's logit: codes [..., 6] → [...]."""
    return 2 * codes[..., 0] + codes[..., 5]


def oracle_losses(found: dict[str, Tensor], labels: Tensor, subjects: Tensor, places: Tensor) -> dict[str, Tensor]:
    """Losses of :class:`Oracle`'s maps against a pool's fields of the same scenes, each a mean over the batch.

    The logits of a field are averaged over each sprite's cells before they are compared, as they are when read.
    """
    target = cell_targets(labels)
    inside, present = target["inside"], target["present"]
    ground = inside.sum(1).clamp(max=1)
    subject = F.binary_cross_entropy_with_logits(found["subject"], ground)
    spot = found["centre"].sigmoid() - target["spot"]
    centre = (spot.square() * (1 + 20 * target["spot"])).mean()
    y, x = torch.meshgrid(*(torch.arange(n, device=labels.device).float() for n in ground.shape[-2:]), indexing="ij")
    here = torch.stack([x, y])
    wanted = target["centres"][..., None, None] - here  # [B, 3, 2, h, w]
    gap = (found["offset"][:, None] - wanted).abs().sum(2) / 4
    offset = (gap * inside).sum() / inside.sum().clamp(min=1)
    losses = {"subject": subject, "centre": centre, "offset": offset}
    losses["place"] = F.cross_entropy(found["place"], places.long())
    codes = subjects.long()
    for i, field in enumerate(HEADS):
        votes = torch.einsum("bkhw,bnhw->bkn", inside, found[field])
        votes = votes / inside.sum((-2, -1)).clamp(min=1e-6)[..., None]
        answers = shape_logit(codes) if field == "shape" else codes[..., i]
        known = present & (codes[..., 0] >= 0)
        if known.any():
            losses[field] = F.cross_entropy(votes[known], answers[known])
    return losses


def learn_oracle(
    pool: ScenePool,
    folder: Path,
    config: LearnConfig,
    *,
    autoencoder: Any = None,
    round_trips: int = ROUND_TRIPS,
    widths: Sequence[int] = WIDTHS,
    start: Path | None = None,
    on_step: OnStep = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Oracle:
    """Train on a pool of all identities, or go on with it; writes ``folder``/oracle.safetensors when done.

    ``autoencoder``: the pool's first ``round_trips`` scenes go through it once, every other one with a little noise on
    its latents, and make three quarters of each batch: what the oracle will judge are decoded pictures.
    """
    oracle = seeded(config.learn_seed, lambda: Oracle(widths))
    if start:
        load_state(oracle, read_oracle(start)[1], start)
    decoded: list[Tensor] = []

    def step_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = oracle.place.weight.device
        rows = draw_rows(config.learn_seed, step, config.batch_size, len(pool))
        tripped = 3 * len(rows) // 4 if autoencoder is not None else 0
        if tripped:
            if not decoded:
                decoded.append(decode_scenes(autoencoder.to(device), pool.hold(device), round_trips))
            rows[:tripped] %= len(decoded[0])
        pictures = pool.hold(device).pictures(rows)
        if tripped:
            pictures[:tripped] = decoded[0][rows[:tripped].to(device)].float() / 127.5 - 1
        labels, subjects, places = (pool.take(name, rows) for name in ("labels", "subjects", "places"))
        if int(draw_rows(config.learn_seed + 1, step, 1, 2)):
            pictures, labels = pictures.flip(-1), labels.flip(-1)
        losses = oracle_losses(oracle(pictures), labels, subjects, places)
        return sum(losses.values()), losses

    about = {"model": "oracle", "widths": list(widths), "round_trips": autoencoder is not None}
    about |= {"pool_seed": pool.config.pool_seed, "start": weights_digest(start)}
    oracle = fit(oracle, step_loss, config, folder, about, on_step=on_step, should_stop=should_stop)
    write_oracle(folder / FILE, oracle)
    return oracle


@torch.no_grad()
def decode_scenes(autoencoder: nn.Module, pool: ScenePool, count: int, batch: int = 16) -> Tensor:
    """A pool's first scenes after a round trip, uint8 [n, 3, S, S]; on every other one its latents had noise of up to a
    fifth of their spread."""
    device, parts = next(autoencoder.parameters()).device, []
    with torch.autocast(device.type, enabled=False):
        for start in range(0, min(count, len(pool)), batch):
            pictures = pool.pictures(torch.arange(start, min(start + batch, count, len(pool))))
            cells = (len(pictures), 4, pictures.shape[-2] // 8, pictures.shape[-1] // 8)
            generator = step_generator(pool.config.pool_seed, start, device)
            strength = 0.2 * torch.rand(len(pictures), 1, 1, 1, generator=generator, device=device)
            strength[::2] = 0
            noise = strength * torch.randn(cells, generator=generator, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                drawn = round_trip(autoencoder, pictures, noise)
            parts.append(((drawn + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def write_oracle(path: Path, oracle: Oracle, *, half: bool = False) -> None:
    """Write an oracle as :func:`load_oracle` reads it."""
    write_module(path, oracle, {"far_oracle": json.dumps({"widths": oracle.widths})}, half=half)
