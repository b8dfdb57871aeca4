"""Image encoders for comparing subjects: DINOv2, CLIP and others, loaded from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.images import to_pil
from ..utils.errors import EncoderError
from ..utils.geometry import bounding_box

# Of models with a text encoder only the vision encoder is loaded.
VISION_CLASSES = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
HOW_TO_GET_ONE = (
    "put DINOv2 or CLIP in transformers' layout (a folder with config.json, preprocessor_config.json and "
    "model.safetensors) there; nothing is downloaded"
)


class Encoder(Protocol):
    """Features of the subjects of a picture."""

    def features(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """[subjects, d] of a picture [H, W, 3] (0..1) and its subjects' masks, [H, W] each."""
        ...


class FolderEncoder:
    """A transformers image encoder loaded from a folder, without network access. Raises EncoderError."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        kind = _model_type(folder)
        import transformers

        try:
            model_class = getattr(transformers, VISION_CLASSES.get(kind, "AutoModel"))
            local = {"local_files_only": True, "trust_remote_code": False}
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
            model, about = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **local)
        except Exception as e:  # damaged and foreign folders raise almost anything
            reason = " ".join(str(e).split())[:300]
            raise EncoderError(f"encoder: {folder} can't be loaded ({reason}); {HOW_TO_GET_ONE}") from e
        # transformers initialises missing tensors with random numbers.
        missing = sorted(k for k in about["missing_keys"] if not k.endswith("position_ids"))
        if missing:
            raise EncoderError(
                f"encoder: {folder} lacks {len(missing)} tensors, such as {missing[0]}; fetch its weights again"
            )
        self.model: Any = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def features(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """See :class:`Encoder`. CLIP's projected embedding; for other models the mean of the last layer's tokens."""
        crops = [to_pil(crop_subject(image, mask)) for mask in masks]
        if not crops:
            return torch.zeros(0, 1)
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.model.device)
        out = self.model(pixel_values=pixels)
        embedded = getattr(out, "image_embeds", None)
        return (out.last_hidden_state.mean(1) if embedded is None else embedded).float().cpu()


def crop_subject(image: Tensor, mask: Tensor) -> Tensor:
    """The subject of a picture [H, W, 3] by its mask [H, W]: cut to its box, white around it, square [S, S, 3].

    MuDI's evaluation (arXiv 2404.04243) crops a detector's box and pads it with white to a square. Here the mask is
    known, so the rest of the box is white, too. Raises EncoderError for an empty mask.
    """
    inside = mask > 0.5
    if not bool(inside.any()):
        raise EncoderError("a subject's mask is empty; leave it out")
    left, top, right, bottom = bounding_box(inside.numpy())
    cut = (1 + mask[..., None] * (image - 1))[top:bottom, left:right]
    height, width = cut.shape[:2]
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    padding = (0, 0, before, side - width - before, above, side - height - above)
    return F.pad(cut, padding, value=1.0)


def _model_type(folder: Path) -> str:
    path = Path(folder) / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EncoderError(f"encoder: {folder} holds no image encoder ({path.name}: {e}); {HOW_TO_GET_ONE}") from e
