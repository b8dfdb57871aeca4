"""Random FaR weights for the test pack's tiny bases, and what our own side makes of them: one side of comparisons."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from far_train.models.apply import apply_weights
from far_train.models.base import BaseModel
from far_train.models.conditioning import Conditioning, TextConditioner
from far_train.models.families import SD21, Family
from far_train.models.layers import attention_projections, kv_weights
from far_train.models.loading import packaged_configs
from far_train.models.settings import SampleConfig
from far_train.models.weights import FarWeights, LowRankDelta, Provenance

from .comfy_server import ComfyServer
from .graphs import encoded, node, predicted, tiny_base

PROMPT = "a photo of a <red-ball> ball, and a <Blue-Ball> ball on a beach"
TOKENS = ("<red-ball>", "<blue-ball>")
TOLERANCE = 1e-3
SIZE = 128  # pixels of the latents that FaRTest_Predict takes
TEXT_WIDTH = 64  # of every text encoder

# The tiny checkpoints in diffusers' words, written down by hand and not by what is tested.
UNETS = {
    "sd15": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64},
    "sd21": {
        "block_out_channels": [32, 64, 128, 128],
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": 64,
    },
    "sdxl": {
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 128,
        "transformer_layers_per_block": [1, 1, 3],
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
}
TEXT_LAYERS = {"sd15": 2, "sd21": 2, "sdxl": 3}


def diffusers_configs(family: Family = SD21) -> dict:
    """Component configs of a family's tiny checkpoint."""
    configs = packaged_configs(family, family.default_prediction)
    configs["unet"] |= UNETS[family.key] | {"sample_size": SIZE // 8}
    configs["vae"] |= {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": SIZE}
    for spec in family.text_encoders:
        configs[spec.part] |= {
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "num_hidden_layers": TEXT_LAYERS[family.key],
            "num_attention_heads": 4,
            "projection_dim": TEXT_WIDTH,
        }
    return configs


def make_weights(base: BaseModel, **changes: object) -> FarWeights:
    """Random weights for two balls, with deltas half as large as the matrices that they change."""
    generator = torch.Generator().manual_seed(5)
    about = {
        "family": base.family.key,
        "base_digest": base.digest,
        "prediction_type": base.prediction_type,
        "nouns": {"<red-ball>": "ball", "<blue-ball>": "ball"},
        "steps": 1,
        "size": SIZE,
    }
    return FarWeights(
        embeddings={
            token: {e: 0.5 * torch.randn(2, TEXT_WIDTH, generator=generator) for e in base.family.comfy_names}
            for token in TOKENS
        },
        deltas={
            k: (0.5 * w.std() * torch.randn(w.shape, generator=generator)).half()
            for k, w in kv_weights(base.unet).items()
        },
        provenance=Provenance(**about | changes),
    )


def make_low_rank(base: BaseModel) -> FarWeights:
    """The same concepts with a low-rank change of all attention, half as large as the matrices."""
    generator = torch.Generator().manual_seed(6)
    low_rank_deltas = {}
    for name, (owner, part) in attention_projections(base.unet).items():
        weight, rank = getattr(owner, part).weight, 4
        up, down = (torch.randn(shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.shape[1])))
        low_rank_deltas[name] = LowRankDelta((0.5 * weight.std() * up).half(), (down / rank**0.5).half())
    return replace(make_weights(base), deltas={}, low_rank_deltas=low_rank_deltas)


def applied(
    file: str, text: str = PROMPT, name: str = "applied", strength: float = 1.0, family: str = "sd21", **more: object
) -> dict:
    """Base → FaR_ApplyWeights → CLIPTextEncode → prediction, written to output/NAME."""
    return {
        "1": tiny_base(family=family),
        "2": node("FaR_LoadWeights", file=file),
        "3": node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["2", 0], strength=strength, **more),
        "4": encoded(text, ["3", 1]),
        "5": predicted(name, ["3", 0], ["4", 0]),
    }


def result(comfy: ComfyServer, prompt: dict, name: str = "applied") -> dict[str, Tensor]:
    comfy.run(prompt)
    return load_file(comfy.folder("output") / f"{name}.safetensors")


def our_result(
    base: BaseModel,
    weights: FarWeights,
    theirs: dict[str, Tensor],
    text: str = PROMPT,
    config: SampleConfig = SampleConfig(),
) -> tuple[Conditioning, Tensor]:
    """Conditioning and noise prediction for the latents and timesteps that the host was given."""
    vocabulary = apply_weights(weights, base, config)
    with torch.no_grad():
        prompts = [vocabulary.tokenize(text)] * len(theirs["latents"])
        conditioning = TextConditioner(base).encode(prompts, (SIZE, SIZE))
        more = conditioning.unet_kwargs()
        return conditioning, base.unet(theirs["latents"], theirs["timesteps"], conditioning.context, **more).sample


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the size of ``theirs``."""
    return float((ours - theirs).norm() / theirs.norm())
