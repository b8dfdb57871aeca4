"""The oracle: a classifier that reads which subjects a picture of the small world shows, and where.

It is used for measurement only. No training or sampling depends on it.

A small U-Net after Panoptic-DeepLab (Cheng et al. 2020, arXiv 1911.10194), without queries or anchors. For every cell
it predicts whether it belongs to a subject, the offset to the subject's centre, and the subject's class and attributes.
Cells that point to the same centre are one subject; the mean of their logits decides each attribute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import BaseModelError
from ..utils.files import load_state
from .identity import ACCESSORIES, COLOURS, NOUNS, PATTERNS, Identity, identity_from_codes
from .scenery import BACKGROUNDS

WIDTHS = (48, 80, 112, 112)
STRIDE = 4
FILE = "oracle.safetensors"
CONFUSION_FILE = "confusion.json"
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
LEAST_CELLS = 8  # smaller patches are not counted as subjects
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
    """What the oracle reads in a picture: subjects from left to right, and the place with its probability."""

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


def load_oracle(path: Path, device: torch.device | str = "cpu") -> Oracle:
    """The oracle in a file, frozen. Raises BaseModelError."""
    about, state = read_oracle(path)
    oracle = Oracle(about["widths"])
    load_state(oracle, state, path)
    return oracle.eval().requires_grad_(False).to(device)


def read_confusion(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """An exported oracle's confusion matrices: field → true value → value read → count. Raises BaseModelError."""
    path = folder / CONFUSION_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{path}: can't be read ({e}); measure the oracle and export it again") from e


def read_oracle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and weights of an oracle's file. Raises BaseModelError."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["far_oracle"])
            return about, {k: file.get_tensor(k) for k in file.keys()}
    except Exception as e:  # damaged or foreign files raise almost anything
        raise BaseModelError(f"{path}: is not an oracle file ({e}); train or fetch it again") from e


@torch.no_grad()
def read_pictures(oracle: Oracle, pictures: Tensor, batch: int = 64) -> list[Reading]:
    """Read pictures [n, S, S, 3], float 0..1."""
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
    """Identify a subject by the votes of its cells [n, 2] (x, y)."""
    votes = {field: found[field][:, cells[:, 1], cells[:, 0]].mean(1) for field in HEADS}
    noun = int(votes["noun"].argmax())
    votes["shape"] = votes["shape"][2 * noun : 2 * noun + 2]
    votes["second"][int(votes["body"].argmax())] = -torch.inf  # the two colours always differ
    odds = {field: vote.softmax(0) for field, vote in votes.items()}
    identity = identity_from_codes([int(o.argmax()) for o in odds.values()])
    mask = torch.zeros(found["subject"].shape, dtype=torch.bool)
    mask[cells[:, 1], cells[:, 0]] = True
    mask = mask.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    probabilities = {field: round(float(o.max()), 4) for field, o in odds.items()}
    return Detection(identity, centre * probabilities["noun"], probabilities, mask)
