"""A tiny base with the architecture of Stable Diffusion 2.1 and random weights, for tests.

Its pictures are noise, but the full pipeline runs on it in seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.families import SD21
from ..models.keys import diffusers_to_ldm
from ..models.loading import build_parts, packaged_configs

WIDTH = 32


def tiny_configs(prediction_type: str = "v_prediction", size: int = 128) -> dict[str, Any]:
    """Component configs of SD 2.1 with everything made small; ``size`` is the native side in pixels."""
    configs = packaged_configs(SD21, prediction_type)
    blocks = (32, 64, 64, 64)
    configs["unet"] |= {
        "block_out_channels": blocks,
        "layers_per_block": 1,
        "attention_head_dim": [2, 4, 4, 4],
        "cross_attention_dim": WIDTH,
        "sample_size": size // 8,
    }
    configs["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "sample_size": size}
    configs["text_encoder"] |= {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
    return configs


def random_states(configs: dict[str, Any], seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of UNet, VAE and text encoder, drawn as the libraries initialise them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        states = {}
        for part, module in build_parts(SD21, configs, device="cpu").items():
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


def single_file_state(configs: dict[str, Any], states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same base as one state dict in the original (LDM) layout."""
    return diffusers_to_ldm(states, configs, SD21)


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python -m far_train.mini.tiny FOLDER   (writes a tiny random base there)")
    own = tiny_configs()
    print(write_folder(Path(sys.argv[1]), own, random_states(own)))
