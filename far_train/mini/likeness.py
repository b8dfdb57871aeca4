"""The oracle as the detector and image encoder of the small world, for Detect-and-Compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .oracle import HEADS, STRIDE, Oracle, read_pictures

SIZE = 128  # pixels; the side of the pictures that the oracle was trained on


class OracleEncoder:
    """Features are the oracle's probabilities of each value of class and attributes.

    The similarity of two subjects is therefore about the share of these fields in which they agree.
    """

    def __init__(self, oracle: Oracle):
        self.oracle = oracle

    @torch.no_grad()
    def features(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """See :class:`far_train.evaluation.image_encoders.Encoder`."""
        if not len(masks):
            return torch.zeros(0, sum(HEADS.values()))
        found = {k: v[0] for k, v in self.oracle(_to_size(image) * 2 - 1).items()}
        cells = (SIZE // STRIDE, SIZE // STRIDE)
        rows = []
        for mask in masks:
            share = F.adaptive_avg_pool2d(mask[None].float(), cells)[0]
            votes = [(found[field] * share).sum((1, 2)) / share.sum() for field in HEADS]
            rows.append(torch.cat([vote.softmax(0) for vote in votes]))
        return torch.stack(rows)

    def detect(self, image: Tensor) -> list[Tensor]:
        """Masks of the subjects of a picture [H, W, 3], float [H, W] each, from left to right."""
        (reading,) = read_pictures(self.oracle, _to_size(image).permute(0, 2, 3, 1))
        masks = [subject.mask[None, None].float() for subject in reading.subjects]
        return [F.interpolate(mask, tuple(image.shape[:2]))[0, 0] for mask in masks]


def _to_size(image: Tensor) -> Tensor:
    picture = image.permute(2, 0, 1)[None].float()
    if tuple(picture.shape[-2:]) == (SIZE, SIZE):
        return picture
    return F.interpolate(picture, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
