"""The host's CLIP_VISION, which may be CLIP, SigLIP or DINOv2, as an image encoder of far_train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.image_encoders.dino2 import Dinov2Model
from torch import Tensor

from ..far_train.evaluation.image_encoders import crop_subject


class ClipVisionEncoder:
    """Features by the model that Load CLIP Vision has loaded; the host moves it to the device and away again."""

    def __init__(self, clip_vision: Any):
        self.clip_vision = clip_vision

    def features(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """See :class:`far_train.evaluation.image_encoders.Encoder`.

        DINOv2: the mean of its tokens; others: the projected embedding.
        """
        rows = []
        for mask in masks:
            out = self.clip_vision.encode_image(crop_subject(image, mask)[None], crop=False)
            tokens = isinstance(self.clip_vision.model, Dinov2Model)
            rows.append((out["last_hidden_state"].mean(1) if tokens else out["image_embeds"])[0].float().cpu())
        return torch.stack(rows) if rows else torch.zeros(0, 1)
