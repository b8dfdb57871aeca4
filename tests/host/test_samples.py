"""The sample pictures of a training are what stock nodes draw with the files that are saved for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .comfy_server import ComfyServer
from .graphs import defaults, encoded, node, tiny_base
from .photos import pictures
from .test_training import run_folder, training

SIZE = 128  # pixels, of the test pack's dataset
STEPS = 5  # a divisor of 1000: else ddim_uniform takes one more
LEARNING = {"prior_batch_size": 1, "embedding_lr": 1e-2, "low_rank_lr": 1e-3, "sample_steps": STEPS, "sample_every": 3}
PROMPT = "a photo of a {} ball and a {} ball"


@pytest.mark.parametrize("base", [node("FaR_MiniCheckpoint"), tiny_base(family="sdxl")], ids=["mini", "sdxl"])
def test_samples_are_what_the_ksampler_draws(comfy: ComfyServer, base: dict, request: pytest.FixtureRequest):
    """v-prediction and ε, one text encoder and two, with the exported LoRA and embeddings."""
    name = f"samples-{request.node.callspec.id}"
    outputs = comfy.run(
        {
            "1": base,
            "2": node("FaRTest_Dataset", count=4, fusion_seed=0),
            "3": node("FaR_TrainOptions", **{**defaults(comfy, "FaR_TrainOptions"), **LEARNING}),
            "4": node("FaR_Train", model=["1", 0], clip=["1", 1], vae=["1", 2], dataset=["2", 0], options=["3", 0],
                      steps=3, batch_size=2, train_seed=0, name=name,
                      sample_prompt="a ball\n" + PROMPT.format("<red-ball>", "<blue-ball>")),
            "5": node("FaR_SaveWeights", weights=["4", 0], name=name, export_lora=True, export_embeddings=True,
                      lora_rank=0),
            "6": node("PreviewAny", source=["4", 3]),
        }
    )  # fmt: skip
    first, second = (
        np.asarray(Image.open(Path(outputs["6"]["text"][0]) / f"samples/step-000003-{i}.png")).astype(int)
        for i in range(2)
    )
    files = [Path(line) for line in outputs["5"]["text"][0].splitlines()]
    words = [f"embedding:{file.stem}" for file in files if file.parent.name == "embeddings"]
    text = PROMPT.format(*words)
    plain, learned, without = stock_pictures(
        comfy, base, f"{name}.safetensors", ("a ball", 0, 1.0), (text, 1, 1.0), (text, 1, 0.0)
    )
    for file in files:
        file.unlink()  # other tests of this host expect their own there
    for ours, theirs in ((first, plain), (second, learned)):
        assert np.abs(ours - theirs).max() <= 1  # of 255: sample pictures are rounded, SaveImage cuts off
    assert np.abs(second - without).max() > 20


def test_more_than_ten_samples_keep_the_order_of_their_prompts(comfy: ComfyServer):
    options = {"sample_every": 1, "sample_steps": 1}
    prompt = training(comfy, "eleven", steps=1, options=options, sample_prompt="\n".join("abcdefghijk"))
    shown = pictures(comfy, comfy.run(prompt)["6"])
    drawn = [Image.open(run_folder(comfy, "eleven") / f"samples/step-000001-{i}.png") for i in range(11)]
    assert [np.abs(a.astype(int) - np.asarray(b)).max() <= 1 for a, b in zip(shown, drawn, strict=True)] == [True] * 11


def stock_pictures(comfy: ComfyServer, base: dict, lora: str, *asked: tuple[str, int, float]) -> list[np.ndarray]:
    """What stock nodes draw: a picture [H, W, 3] for each text, seed and strength of the LoRA."""
    prompt = {"1": base, "2": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)}
    for i, (text, seed, strength) in enumerate(asked):
        model, positive, negative, sampled, decoded, saved = (f"{part}{i}" for part in range(1, 7))
        prompt |= {
            model: node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=lora, strength_model=strength,
                        strength_clip=1.0),
            positive: encoded(text, [model, 1]),
            negative: encoded("", [model, 1]),
            sampled: node("KSampler", model=[model, 0], positive=[positive, 0], negative=[negative, 0],
                          latent_image=["2", 0], seed=seed, steps=STEPS, cfg=7.0, sampler_name="ddim",
                          scheduler="ddim_uniform", denoise=1.0),
            decoded: node("VAEDecode", vae=["1", 2], samples=[sampled, 0]),
            saved: node("SaveImage", images=[decoded, 0], filename_prefix="stock"),
        }  # fmt: skip
    outputs = comfy.run(prompt)
    return [pictures(comfy, outputs[f"6{i}"])[0].astype(int) for i in range(len(asked))]
