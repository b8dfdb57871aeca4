"""Image encoders with few, random weights, in transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def write_encoder(folder: Path, kind: str) -> Path:
    """A tiny encoder with random weights, as transformers itself saves one."""
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    if kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**size))
    else:
        vision = transformers.CLIPVisionConfig(**size, intermediate_size=32, projection_dim=8)
        text = transformers.CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        sizes = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "projection_dim": 8}
        model = transformers.CLIPModel(transformers.CLIPConfig(**sizes))
    model.save_pretrained(folder)
    side = {"height": 28, "width": 28}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": side, "crop_size": side, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
