"""FaR weights beside what other nodes and packs do to a model: neither undoes nor hides the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from far_train.mini.shipped import small_base
from far_train.models.export import export_lora
from far_train.models.weights import FarWeights

from .comfy_server import ComfyServer
from .graphs import encoded, node, predicted
from .listener import NODE_TEXT, Listener
from .photos import pictures
from .test_mini import drawn, mini, random_weights
from .tiny_weights import TOLERANCE, difference

TEXT = "a photo of a <rex-dog> dog and a <max-dog> dog, on the beach"


@pytest.fixture(scope="module")
def weights(comfy: ComfyServer) -> FarWeights:
    """The same random weights as a FaR file and as a LoRA of half their change."""
    weights = random_weights(small_base())
    weights.save(comfy.folder("models/far") / "beside.safetensors")
    half = FarWeights(weights.embeddings, {k: d / 2 for k, d in weights.deltas.items()}, weights.provenance)
    export_lora(half, comfy.folder("models/loras") / "half.safetensors")
    return weights


def applied(model: list, clip: list, strength: float = 1.0) -> dict[str, Any]:
    return node("FaR_ApplyWeights", model=model, clip=clip, weights=["2", 0], strength=strength)


def start() -> dict[str, Any]:
    return {"1": mini(), "2": node("FaR_LoadWeights", file="beside.safetensors")}


def predictions(comfy: ComfyServer, prompt: dict[str, Any], *names: str) -> list[Tensor]:
    comfy.run(prompt)
    return [load_file(comfy.folder("output") / f"{name}.safetensors")["prediction"] for name in names]


def test_a_lora_before_and_after(comfy: ComfyServer, weights: FarWeights):
    """Both change K and V, and the changes add up in any order: half of Δ on Δ is Δ at a strength of 1.5."""
    lora = {"lora_name": "half.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    prompt = start() | {
        "10": node("LoraLoader", model=["1", 0], clip=["1", 1], **lora),
        "11": applied(["10", 0], ["10", 1]),
        "12": applied(["1", 0], ["1", 1]),
        "13": node("LoraLoader", model=["12", 0], clip=["12", 1], **lora),
        "14": applied(["1", 0], ["1", 1], strength=1.5),
    }
    for place, source in (("20", "11"), ("22", "13"), ("24", "14"), ("26", "12")):
        prompt |= {
            place: encoded(TEXT, [source, 1]),
            str(int(place) + 1): predicted(f"lora-{source}", [source, 0], [place, 0]),
        }
    before, after, strong, alone = predictions(comfy, prompt, "lora-11", "lora-13", "lora-14", "lora-12")
    assert difference(before, strong) < TOLERANCE and difference(after, strong) < TOLERANCE
    assert difference(alone, strong) > 10 * TOLERANCE


def test_model_merging(comfy: ComfyServer, weights: FarWeights):
    """A merge with the bare base halves the change; a merge of two equal bases leaves nothing to notice."""
    prompt = start() | {
        "10": applied(["1", 0], ["1", 1]),
        "11": node("ModelMergeSimple", model1=["10", 0], model2=["1", 0], ratio=0.5),
        "12": applied(["1", 0], ["1", 1], strength=0.5),
        "13": node("ModelMergeSimple", model1=["1", 0], model2=["1", 0], ratio=0.5),
        "14": applied(["13", 0], ["1", 1]),
        "20": encoded(TEXT, ["10", 1]),
    }
    for source in ("10", "11", "12", "14"):
        prompt[f"3{source}"] = predicted(f"merge-{source}", [source, 0], ["20", 0])
    whole, merged, half, on_merged = predictions(comfy, prompt, *(f"merge-{n}" for n in ("10", "11", "12", "14")))
    assert difference(merged, half) < TOLERANCE and difference(on_merged, whole) < TOLERANCE
    assert difference(half, whole) > 10 * TOLERANCE


def picture_of(comfy: ComfyServer, prompt: dict[str, Any], model: list, name: str, clip: list | None = None):
    (picture,) = pictures(comfy, comfy.run(prompt | drawn(50, model, clip or ["10", 1], TEXT, name))["55"])
    return picture.astype(int)


def test_an_image_prompt_patch_before_and_after(comfy: ComfyServer, weights: FarWeights):
    """Packs such as IPAdapter take the cross-attention's slots, also twice; FaR's weights stay out of these."""
    image = {"weight": 0.5}
    prompt = start() | {
        "10": applied(["1", 0], ["1", 1]),
        "11": node("FaRTest_ImagePrompt", model=["10", 0], **image),
        "12": node("FaRTest_ImagePrompt", model=["1", 0], **image),
        "13": applied(["12", 0], ["1", 1]),
    }
    after, before = (picture_of(comfy, prompt, [n, 0], f"patch-{n}", [c, 1]) for n, c in (("11", "10"), ("13", "13")))
    assert np.abs(after - before).max() <= 1
    for other in ("10", "12"):  # each of the two does something of its own
        assert np.abs(picture_of(comfy, prompt, [other, 0], f"patch-{other}") - after).mean() > 1


def test_a_controlnet(comfy: ComfyServer, weights: FarWeights):
    """A ControlNet acts on the conditioning: with it the picture is another, and FaR's weights still show."""
    prompt = start() | {
        "10": applied(["1", 0], ["1", 1]),
        "11": node("FaRTest_ControlNet", model=["1", 0]),
        "12": node("EmptyImage", width=128, height=128, batch_size=1, color=0xFF8000),
    }

    def controlled(model: list, strength: float, name: str) -> np.ndarray:
        graph = prompt | drawn(50, model, ["10", 1], TEXT, name)
        graph["60"] = node("ControlNetApplyAdvanced", positive=["50", 0], negative=["51", 0], control_net=["11", 0],
                           image=["12", 0], strength=strength, start_percent=0.0, end_percent=1.0)  # fmt: skip
        graph["53"]["inputs"] |= {"positive": ["60", 0], "negative": ["60", 1]}
        (picture,) = pictures(comfy, comfy.run(graph)["55"])
        return picture.astype(int)

    with_far = controlled(["10", 0], 1.0, "control-far")
    assert np.abs(with_far - controlled(["1", 0], 1.0, "control-base")).mean() > 1
    assert np.abs(with_far - controlled(["10", 0], 0.0, "control-off")).mean() > 1


def test_nodes_inside_a_subgraph(comfy: ComfyServer, weights: FarWeights):
    """The browser queues a subgraph's nodes under ids such as 12:3; messages must reach them there, too."""
    flat = start() | {"10": applied(["1", 0], ["1", 1]), "20": encoded(TEXT, ["10", 1])}
    flat["30"] = predicted("flat", ["10", 0], ["20", 0])
    nested: dict[str, Any] = {}
    for name, about in flat.items():
        inputs = {k: [f"12:{v[0]}", v[1]] if isinstance(v, list) else v for k, v in about["inputs"].items()}
        nested[f"12:{name}"] = {**about, "inputs": inputs}
    nested["12:30"]["inputs"]["name"] = "nested"
    nested["12:40"] = encoded(TEXT, ["12:1", 1])  # the wrong CLIP, which is told at this very node
    nested["12:41"] = predicted("wrong", ["12:10", 0], ["12:40", 0])
    comfy.run({"1": mini(), "2": node("PreviewAny", source=["1", 0])})  # the host forgets what earlier tests applied
    with Listener(comfy) as seen:
        (second,) = predictions(comfy, nested, "nested")
    (first,) = predictions(comfy, flat, "flat")
    assert torch.equal(first, second)
    told = [payload for kind, payload in seen.binaries if kind == NODE_TEXT and b"plain text here" in payload]
    # Four bytes give the length of the node's id, which stands before the text. The front end shows a text for 12:40
    # only while the subgraph is open; its frame, node 12, has it, too.
    named = {payload[4 : 4 + int.from_bytes(payload[:4], "big")] for payload in told}
    assert named == {b"12:40", b"12"}
