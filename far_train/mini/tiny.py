"""Tiny bases with the architecture of each model family and random weights, for tests.

Their pictures are noise, but the full pipeline runs on them in seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.families import FAMILIES, SD21, Family
from ..models.keys import diffusers_to_ldm
from ..models.loading import build_parts, packaged_configs

WIDTH = 32  # of the text, in families with one encoder
WIDTH_2 = 48  # of the second encoder's

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 2},
    "sd21": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [2, 4, 4, 4]},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 4],
        # Deep enough for a block on which the family is supervised.
        "transformer_layers_per_block": [1, 1, 3],
        # The sizes' sinusoids stay as wide as they are, because ComfyUI has no other.
        "projection_class_embeddings_input_dim": 6 * 256 + WIDTH_2,
    },
}


def tiny_configs(prediction_type: str | None = None, size: int = 128, family: Family = SD21) -> dict[str, Any]:
    """Component configs of a family with everything made small; ``size`` is the native side in pixels.

    ``prediction_type``: default the family's.
    """
    configs = packaged_configs(family, prediction_type or family.default_prediction)
    widths = dict(zip((spec.part for spec in family.text_encoders), (WIDTH, WIDTH_2)))
    configs["unet"] |= {
        **UNETS[family.key],
        "layers_per_block": 1,
        "cross_attention_dim": sum(widths.values()),
        "sample_size": size // 8,
    }
    configs["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "sample_size": size}
    for part, width in widths.items():
        configs[part] |= {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": width,
        }
    return configs


def random_states(configs: dict[str, Any], seed: int = 0, family: Family = SD21) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of UNet, VAE and text encoders, drawn as the libraries initialise them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        states = {}
        for part, module in build_parts(family, configs, device="cpu").items():
            states[part] = {k: v.clone() for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    return states


def write_folder(folder: Path, configs: dict[str, Any], states: dict[str, dict[str, torch.Tensor]]) -> Path:
    """Write a base in diffusers' folder layout."""
    for part, state in states.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part], indent=2))
        name = "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
        save_file(state, folder / part / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"], indent=2))
    shutil.copytree(configs["tokenizer"], folder / "tokenizer", dirs_exist_ok=True)
    return folder


def single_file_state(
    configs: dict[str, Any], states: dict[str, dict[str, torch.Tensor]], family: Family = SD21
) -> dict[str, torch.Tensor]:
    """The same base as one state dict in the original (LDM) layout."""
    return diffusers_to_ldm(states, configs, family)


if __name__ == "__main__":
    import sys

    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m far_train.mini.tiny FOLDER [FAMILY]   (writes a tiny random base there)")
    kind = FAMILIES[sys.argv[2]] if len(sys.argv) == 3 else SD21
    own = tiny_configs(family=kind)
    print(write_folder(Path(sys.argv[1]), own, random_states(own, family=kind)))
