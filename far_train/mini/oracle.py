"""The oracle: who is in a picture, and where. For measurement only; nothing that users run depends on it.

A small U-Net without queries or anchors, after Panoptic-DeepLab (Cheng et al. 2020, arXiv 1911.10194): for every cell,
is it a subject, where is that subject's centre, and the class and attributes of the subject. Cells that point to one
centre are one subject, and vote: the mean of their logits decides each attribute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BaseModelError
from .autoencoder import round_trip
from .identity import ACCESSORIES, COLOURS, NOUNS, PATTERNS, Identity
from .learning import (
    LearnConfig,
    OnStep,
    draw_rows,
    fit,
    load_first_weights,
    seeded,
    step_generator,
    weights_digest,
    write_module,
)
from .scene_pool import MOST_SPRITES, ScenePool, identity_from_codes
from .scenery import BACKGROUNDS

WIDTHS = (48, 80, 112, 112)
STRIDE = 4
FILE = "oracle.safetensors"
CONFUSION_FILE = "confusion.json"
ROUND_TRIPS = 6000  # scenes that are decoded once for its training
# Logits for each field of an identity, in the order of its codes. Shapes are named by class, two to each: their logits
# are per class, so that "round" of a cup and "round" of a car need not look alike.
HEADS = {
    "noun": len(NOUNS),
    "body": len(COLOURS),
    "second": len(COLOURS),
    "pattern": len(PATTERNS),
    "accessory": len(ACCESSORIES),
    "shape": 2 * len(NOUNS),
}
CENTRE_SPREAD = 1.2  # cells: standard deviation of a centre's spot
LEAST_CELLS = 8  # a smaller patch is a speck and no subject
LEAST_CENTRE = 0.3


@dataclass(frozen=True)
class Detection:
    """One subject found. ``confidence`` 0..1; ``probabilities``: of each field's chosen value; ``mask`` bool [S, S]."""

    identity: Identity
    confidence: float
    probabilities: dict[str, float]
    mask: Tensor


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in a picture: subjects from left to right, the place and how sure of it."""

    subjects: tuple[Detection, ...]
    background: str
    background_probability: float


class Residual(nn.Module):
    """Two 3×3 convolutions with norms beside a shortcut."""

    def __init__(self, inward: int, outward: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, inward),
            nn.SiLU(),
            nn.Conv2d(inward, outward, 3, padding=1),
            nn.GroupNorm(8, outward),
            nn.SiLU(),
            nn.Conv2d(outward, outward, 3, padding=1),
        )
        self.shortcut = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Oracle(nn.Module):
    """Pictures [B, 3, S, S] (-1..1) → cell maps at stride 4 and logits of the place."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0] // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(widths[0] // 2, widths[0], 4, stride=2, padding=1),
        )
        inward = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(Residual(a, b) for a, b in zip(inward, widths))
        self.middle = nn.Sequential(Residual(widths[-1], widths[-1]), Residual(widths[-1], widths[-1]))
        pairs = list(zip(widths[:-1], widths[1:]))[::-1]
        self.up = nn.ModuleList(Residual(low + high, low) for low, high in pairs)
        self.cells = nn.Sequential(
            nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 4 + sum(HEADS.values()), 1)
        )
        self.place = nn.Linear(widths[-1], len(BACKGROUNDS))

    def _coarse(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, kept = self.stem(pictures), []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if i else x)
            kept.append(x)
        return self.middle(x), kept

    def features(self, pictures: Tensor) -> Tensor:
        """What the place is read from: one vector for each picture, [B, d]."""
        return F.silu(self._coarse(pictures)[0]).mean((2, 3))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """``subject`` and ``centre`` logits [B, h, w], ``offset`` [B, 2, h, w] to the centre in cells (x, y), the
        logits of each field [B, n, h, w] under its name, ``place`` [B, 10]."""
        x, kept = self._coarse(pictures)
        place = self.place(F.silu(x).mean((2, 3)))
        for block, skip in zip(self.up, kept[-2::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1))
        subject, centre, offset, fields = self.cells(x).float().split([1, 1, 2, sum(HEADS.values())], 1)
        named = dict(zip(HEADS, fields.split(list(HEADS.values()), 1)))
        # Offsets are learned in units of four cells, where they are about 1.
        return {"subject": subject[:, 0], "centre": centre[:, 0], "offset": 4 * offset, "place": place.float(), **named}


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
        load_first_weights(oracle, _read(start)[1], start)
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


def load_oracle(path: Path, device: torch.device | str = "cpu") -> Oracle:
    """The oracle in a file, frozen. Raises BaseModelError."""
    about, state = _read(path)
    oracle = Oracle(about["widths"])
    load_first_weights(oracle, state, path)
    return oracle.eval().requires_grad_(False).to(device)


def read_confusion(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """An exported oracle's own mistakes: field → true value → value read → count. Raises BaseModelError."""
    path = folder / CONFUSION_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{path}: can't be read ({e}); measure the oracle and export it again") from e


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["far_oracle"])
            return about, {k: file.get_tensor(k) for k in file.keys()}
    except Exception as e:  # damaged or foreign files raise almost anything
        raise BaseModelError(f"{path}: is no oracle ({e}); train or fetch it again") from e


@torch.no_grad()
def read_pictures(oracle: Oracle, pictures: Tensor, batch: int = 64) -> list[Reading]:
    """What is in pictures [n, S, S, 3] (float 0..1, as this project's other parts hand them on)."""
    device, readings = oracle.place.weight.device, []
    for part in pictures.split(batch):
        found = oracle(part.permute(0, 3, 1, 2).to(device) * 2 - 1)
        found = {k: v.cpu() for k, v in found.items()}
        readings += [_read_one({k: v[i] for k, v in found.items()}) for i in range(len(part))]
    return readings


@torch.no_grad()
def picture_features(oracle: Oracle, pictures: Tensor, batch: int = 64) -> Tensor:
    """Features [n, d] on the CPU of pictures [n, S, S, 3] (float 0..1), by which sets of them can be compared."""
    device = oracle.place.weight.device
    parts = [oracle.features(p.permute(0, 3, 1, 2).to(device) * 2 - 1).cpu() for p in pictures.split(batch)]
    return torch.cat(parts)


def _read_one(found: dict[str, Tensor]) -> Reading:
    ground, spot = found["subject"] > 0, found["centre"].sigmoid()
    peaks = (spot == F.max_pool2d(spot[None], 5, 1, 2)[0]) & (spot > LEAST_CENTRE)
    centres = peaks.nonzero().flip(1).float()  # (x, y)
    place = found["place"].softmax(0)
    subjects = []
    if len(centres) and ground.any():
        cells = ground.nonzero().flip(1)
        aims = cells.float() + found["offset"][:, cells[:, 1], cells[:, 0]].T
        owner = torch.cdist(aims, centres).argmin(1)
        for k, (x, y) in enumerate(centres.long().tolist()):
            own = cells[owner == k]
            if len(own) >= LEAST_CELLS:
                subjects.append(_identify(found, own, float(spot[y, x])))
    subjects.sort(key=lambda s: float(s.mask.nonzero()[:, 1].float().mean()))
    return Reading(tuple(subjects), BACKGROUNDS[int(place.argmax())], float(place.max()))


def _identify(found: dict[str, Tensor], cells: Tensor, centre: float) -> Detection:
    """Let a subject's cells [n, 2] (x, y) vote on who it is."""
    votes = {field: found[field][:, cells[:, 1], cells[:, 0]].mean(1) for field in HEADS}
    noun = int(votes["noun"].argmax())
    votes["shape"] = votes["shape"][2 * noun : 2 * noun + 2]
    votes["second"][int(votes["body"].argmax())] = -torch.inf  # two colours never are the same
    odds = {field: vote.softmax(0) for field, vote in votes.items()}
    identity = identity_from_codes([int(o.argmax()) for o in odds.values()])
    mask = torch.zeros(found["subject"].shape, dtype=torch.bool)
    mask[cells[:, 1], cells[:, 0]] = True
    mask = mask.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    probabilities = {field: round(float(o.max()), 4) for field, o in odds.items()}
    return Detection(identity, centre * probabilities["noun"], probabilities, mask)
