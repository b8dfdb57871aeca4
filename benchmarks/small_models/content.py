"""What stands where in a scene, cell by cell: an auxiliary target for the small base model's training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_train.mini.oracle import HEADS
from far_train.mini.scenery import BACKGROUNDS
from far_train.mini.world import MOST_SPRITES

from .oracle_training import shape_logit

# Logits per field: those of the oracle, and the place; "subject" tells the cells of sprites from the others.
FIELDS = {"subject": 2, **HEADS, "place": len(BACKGROUNDS)}
NONE = -1  # no sprite here, so nothing to say


def content_codes(scenes: Mapping[str, Tensor], cells: int) -> Tensor:
    """The right answer for every cell of n scenes: int8 [n, fields, cells, cells], in the order of ``FIELDS``.

    ``scenes``: the fields ``labels``, ``subjects`` and ``places`` of a pool's chunk (see :class:`ScenePool`). A cell
    belongs to the sprite that covers most of it, if any covers a quarter.
    """
    labels, subjects = scenes["labels"], scenes["subjects"].long()
    masks = torch.stack([labels == i + 1 for i in range(MOST_SPRITES)], 1).float()
    share, owner = F.adaptive_avg_pool2d(masks, cells).max(1)
    inside = share >= 0.25
    answers = torch.cat([subjects[..., :5], shape_logit(subjects)[..., None]], -1)  # [n, 3, 6]
    chosen = answers.gather(1, owner.flatten(1)[..., None].expand(-1, -1, answers.shape[-1]))
    chosen = chosen.transpose(1, 2).unflatten(-1, owner.shape[1:])
    chosen = torch.where(inside[:, None], chosen, NONE)
    place = scenes["places"][:, None, None, None].expand(-1, 1, cells, cells)
    return torch.cat([inside[:, None].long(), chosen, place.long()], 1).to(torch.int8)


class ContentReadout(nn.Module):
    """Logits of ``FIELDS`` in every latent cell, from the features that a UNet hands to its last up block."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        channels = unet.config.block_out_channels[1]
        self.head = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, sum(FIELDS.values()), 1))
        self._features: Tensor | None = None

    @contextmanager
    def reading(self, unet: nn.Module) -> Iterator[None]:
        """Within, the UNet's forward passes leave their features."""

        def keep(_module: nn.Module, _arguments: object, features: Tensor) -> None:
            self._features = features

        handle = unet.up_blocks[-2].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._features = None

    def forward(self) -> dict[str, Tensor]:
        """Logits [B, n, h, w] of each field for the last forward pass."""
        return dict(zip(FIELDS, self.head(self._features).float().split(list(FIELDS.values()), 1)))


def content_loss(found: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Mean over the fields of the cross-entropy of :class:`ContentReadout`'s logits against :func:`content_codes`."""
    wanted = codes.long()
    losses = [
        F.cross_entropy(logits, wanted[:, i], ignore_index=NONE, reduction="sum")
        / (wanted[:, i] != NONE).sum().clamp(min=1)
        for i, logits in enumerate(found.values())
    ]
    return torch.stack(losses).mean()
