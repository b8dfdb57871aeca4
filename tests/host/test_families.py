"""SD 1.5, 2.1 and SDXL in the graph: the host's MODEL and CLIP compute what our own side computes, for each family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from far_train.models.apply import apply_weights
from far_train.models.base import BaseModel
from far_train.models.conditioning import Conditioning, TextConditioner
from far_train.models.families import FAMILIES, SDXL, Family
from far_train.models.loading import load_base
from far_train.models.settings import SampleConfig
from far_train.models.weights import FarWeights

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import encoded, node, predicted, tiny_base
from .tiny_weights import (
    PROMPT,
    SIZE,
    TOLERANCE,
    applied,
    difference,
    diffusers_configs,
    make_low_rank,
    make_weights,
    our_result,
    result,
)

Saved = Callable[..., str]
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def family() -> Family:
    """SDXL where a test isn't parametrized: the family with two text encoders."""
    return SDXL


@pytest.fixture
def load(comfy: ComfyServer, family: Family) -> Callable[[], BaseModel]:
    """Loads the family's tiny checkpoint from a file that ComfyUI itself has saved."""
    path = comfy.folder("output") / f"base-{family.key}.safetensors"
    if not path.exists():
        everything = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
        saving = node("FaRTest_SaveBase", **everything, name=path.stem)
        comfy.run({"1": tiny_base(family=family.key), "2": saving})
    return lambda: load_base(path, config=diffusers_configs(family), prediction_type=family.default_prediction)


def assert_same(ours: tuple[Conditioning, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    conditioning, prediction = ours
    assert difference(conditioning.context, theirs["context"]) < TOLERANCE
    assert difference(prediction, theirs["prediction"]) < TOLERANCE
    if conditioning.pooled is not None:
        assert difference(conditioning.pooled[:1], theirs["pooled"]) < TOLERANCE


# ---- parity


@EACH
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_conditioning_and_prediction_are_our_own(comfy, load, saved: Saved, family: Family, strength: float):
    weights = make_low_rank(load())
    theirs = result(comfy, applied(saved(weights), family=family.key, strength=strength))
    assert_same(our_result(load(), weights, theirs, config=SampleConfig(strength=strength)), theirs)
    plain = result(comfy, applied(saved(weights), family=family.key, strength=0.0, name="without"), "without")
    assert difference(plain["prediction"], theirs["prediction"]) > 0.1


@EACH
def test_exchanged_layers_and_embeddings_are_noticed(comfy, load, saved: Saved, family: Family):
    weights = make_low_rank(load())
    theirs = result(comfy, applied(saved(weights), family=family.key))
    deltas = weights.low_rank_deltas
    first, second = [name for name in deltas if name.endswith("attn2.to_k") and deltas[name].shape[0] == 64][:2]
    exchanged = replace(weights, low_rank_deltas=deltas | {first: deltas[second], second: deltas[first]})
    _, prediction = our_result(load(), exchanged, theirs)
    assert difference(prediction, theirs["prediction"]) > 10 * TOLERANCE
    tokens = dict(zip(weights.embeddings, reversed(weights.embeddings.values())))
    ours, _ = our_result(load(), replace(weights, embeddings=tokens), theirs)
    assert difference(ours.context, theirs["context"]) > 0.1


def test_exchanged_text_encoders_are_noticed(comfy, load, saved: Saved):
    weights = make_low_rank(load())
    theirs = result(comfy, applied(saved(weights), family="sdxl"))
    other = {t: {"clip_l": e["clip_g"], "clip_g": e["clip_l"]} for t, e in weights.embeddings.items()}
    ours, prediction = our_result(load(), replace(weights, embeddings=other), theirs)
    for mine, host in zip(ours.context.chunk(2, -1), theirs["context"].chunk(2, -1)):
        assert difference(mine, host) > 0.1
    assert difference(ours.pooled[:1], theirs["pooled"]) > 0.1
    assert difference(prediction, theirs["prediction"]) > 10 * TOLERANCE


@EACH
def test_strength_zero_is_the_untouched_model_bit_for_bit(comfy, load, saved: Saved, family: Family):
    weights = make_low_rank(load())
    prompt = applied(saved(weights), "a ball", "zero", strength=0.0, family=family.key)
    prompt |= {"6": encoded("a ball", ["1", 1]), "7": predicted("untouched", ["1", 0], ["6", 0])}
    zero = result(comfy, prompt, "zero")
    untouched = result(comfy, prompt, "untouched")
    assert zero.keys() == untouched.keys()
    assert all(torch.equal(zero[name], untouched[name]) for name in zero)


@EACH
def test_concept_strength_leads_from_the_noun_to_the_concept(comfy, load, saved: Saved, family: Family):
    weights = make_low_rank(load())
    strengths = {"<red-ball>": 0.3, "<blue-ball>": 0.0}
    text = "\n".join(f"{token}={value}" for token, value in strengths.items())
    theirs = result(comfy, applied(saved(weights), family=family.key, concept_strength=text))
    assert_same(our_result(load(), weights, theirs, config=SampleConfig(concept_strength=strengths)), theirs)


# ---- prompts


@EACH
@pytest.mark.parametrize("text", ["<red-ball>", "a photo of a <red-ball>", "a <red-ball> and a <blue-ball>"])
def test_a_token_at_the_end_leaves_the_end_where_it_is(comfy, load, saved: Saved, family: Family, text: str):
    """A token has two vectors, and its ids lie above that of the end, which the pooled output is read at."""
    weights = make_low_rank(load())
    theirs = result(comfy, applied(saved(weights), text, family=family.key))
    assert_same(our_result(load(), weights, theirs, text), theirs)


@EACH
def test_a_weighted_token_is_weighted_in_every_encoder(comfy, load, saved: Saved, family: Family):
    """The host moves a token's state away from the empty prompt's; the pooled output has no weights."""
    weights = make_low_rank(load())
    theirs = result(comfy, applied(saved(weights), "a (<red-ball>:1.5) ball", family=family.key))
    plain, _ = our_result(load(), weights, theirs, "a <red-ball> ball")
    empty, _ = our_result(load(), weights, theirs, "")
    expected = plain.context.clone()
    expected[:, 2:4] = empty.context[:, 2:4] + 1.5 * (plain.context - empty.context)[:, 2:4]
    assert difference(expected, theirs["context"]) < TOLERANCE < difference(plain.context, theirs["context"])
    if plain.pooled is not None:
        assert difference(plain.pooled[:1], theirs["pooled"]) < TOLERANCE


@EACH
def test_tokens_of_two_nodes_stand_side_by_side(comfy, load, saved: Saved, family: Family):
    weights = make_low_rank(load())
    renamed = replace(
        make_weights(load(), nouns={"<green-ball>": "ball"}),
        embeddings={"<green-ball>": weights.embeddings["<red-ball>"]},
        deltas={name: torch.zeros(delta.shape) for name, delta in make_weights(load()).deltas.items()},
    )
    text = "a <green-ball> ball and a <blue-ball> ball, <no-ball>"
    prompt = applied(saved(weights, "-first"), text, family=family.key)
    prompt |= {
        "6": node("FaR_LoadWeights", file=saved(renamed, "-second")),
        "7": node("FaR_ApplyWeights", model=["3", 0], clip=["3", 1], weights=["6", 0], strength=1.0),
        "8": encoded(text, ["7", 1]),
        "9": predicted("side-by-side", ["7", 0], ["8", 0]),
    }
    del prompt["4"], prompt["5"]
    logged = len(comfy.log())
    theirs = result(comfy, prompt, "side-by-side")
    log = comfy.log()[logged:]
    assert log.count("The prompt holds <no-ball>") == 1  # once, and not for each text encoder
    assert "trained on another base" not in log
    ours = our_result(load(), weights, theirs, text.replace("green", "red"))
    assert_same(ours, theirs)


def test_each_encoder_of_sdxl_has_a_prompt_of_its_own(comfy, load, saved: Saved):
    """CLIPTextEncodeSDXL: text_l and text_g, and the sizes that the UNet is told."""
    weights = make_low_rank(load())
    prompt = applied(saved(weights), family="sdxl")
    texts = {"text_g": "a <red-ball>", "text_l": "(<blue-ball>:1.0) on a beach"}
    prompt["4"] = node("CLIPTextEncodeSDXL", clip=["3", 1], **texts, width=256, height=192, crop_w=16, crop_h=8,
                       target_width=SIZE, target_height=96)  # fmt: skip
    theirs = result(comfy, prompt)
    base = load()
    vocabulary, conditioner = apply_weights(weights, base), TextConditioner(base)
    with torch.no_grad():
        left, right = (vocabulary.tokenize(t) for t in ("<blue-ball> on a beach", "a <red-ball>"))
        ids = (conditioner.ids([left])[0], conditioner.ids([right])[1])
        conditioning = conditioner.encode_ids(ids, (SIZE, SIZE))
        # Original height and width, the crop's top and left edge, target height and width.
        told = replace(conditioning, time_ids=torch.tensor([[192.0, 256, 8, 16, 96, SIZE]]))
        two = Conditioning(*(value.expand(2, *value.shape[1:]) for value in vars(told).values()))
        more = two.unet_kwargs()
        prediction = base.unet(theirs["latents"], theirs["timesteps"], two.context, **more).sample
    assert_same((two, prediction), theirs)


def test_a_prompt_of_sdxl_with_an_unpatched_clip_is_told_so(comfy, load, saved: Saved):
    prompt = applied(saved(make_low_rank(load())), family="sdxl")
    sizes = {"width": SIZE, "height": SIZE, "crop_w": 0, "crop_h": 0, "target_width": SIZE, "target_height": SIZE}
    prompt["6"] = node("CLIPTextEncodeSDXL", clip=["1", 1], text_g="a ball", text_l="a <red-ball>", **sizes)
    prompt["7"] = predicted("unpatched", ["3", 0], ["6", 0])
    logged = len(comfy.log())
    comfy.run(prompt)
    assert "<red-ball> will be read as plain text here" in comfy.log()[logged:]


# ---- files for stock nodes


@EACH
def test_stock_loaders_read_the_exports_without_a_complaint(comfy, load, saved: Saved, family: Family):
    weights, name = make_low_rank(load()), f"stock-{family.key}"
    own = {f"<{family.key}-{token.strip('<>')}>": rows for token, rows in weights.embeddings.items()}
    nouns = dict.fromkeys(own, "ball")
    file = saved(replace(weights, embeddings=own, provenance=replace(weights.provenance, nouns=nouns)))
    exports = {"export_lora": True, "export_embeddings": True, "lora_rank": 0}
    save = {
        "1": node("FaR_LoadWeights", file=file),
        "2": node("FaR_SaveWeights", weights=["1", 0], name=name, **exports),
    }
    files = [Path(line) for line in comfy.run(save)["2"]["text"][0].splitlines()]
    assert [f.parent.name for f in files] == ["far", "loras", "embeddings", "embeddings"]
    text = PROMPT.lower()
    for token in weights.embeddings:
        text = text.replace(token, f"embedding:{family.key}-{token.strip('<>')}")
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    prompt = {
        "1": tiny_base(family=family.key),
        "2": node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=files[1].name, **strengths),
        "3": encoded(text, ["2", 1]),
        "4": predicted("stock", ["2", 0], ["3", 0]),
    }
    logged = len(comfy.log())
    theirs = result(comfy, prompt, "stock")
    log = comfy.log()[logged:].lower()
    assert not any(word in log for word in ("not loaded", "does not exist", "mismatch", "warning", "error"))
    assert_same(our_result(load(), weights, theirs), theirs)


# ---- what doesn't belong together


def refusal(comfy: ComfyServer, prompt: dict) -> str:
    with pytest.raises(ExecutionFailed, match="FaR_ApplyWeights") as failed:
        comfy.run(prompt)
    return str(failed.value)


def test_weights_of_another_family_are_refused(comfy, load, saved: Saved):
    prompt = applied(saved(make_low_rank(load())), family="sd15")
    assert "trained on Stable Diffusion XL, this base is Stable Diffusion 1.5" in refusal(comfy, prompt)


def test_a_clip_of_another_family_is_refused(comfy, load, saved: Saved):
    prompt = applied(saved(make_low_rank(load())), family="sdxl")
    prompt["9"] = tiny_base(family="sd15")
    for name, part in (("model", 0), ("clip", 1)):
        mixed = {**prompt, "3": {**prompt["3"], "inputs": prompt["3"]["inputs"] | {name: ["9", part]}}}
        assert "connect both of one" in refusal(comfy, mixed)


def test_embeddings_of_another_width_are_refused(comfy, load, saved: Saved):
    weights = make_low_rank(load())
    narrow = {t: e | {"clip_g": e["clip_g"][:, :32]} for t, e in weights.embeddings.items()}
    prompt = applied(saved(replace(weights, embeddings=narrow)), family="sdxl")
    assert "has 32 numbers per vector, clip_g of this CLIP needs 64" in refusal(comfy, prompt)


def test_weights_of_another_base_of_the_family_are_warned_of(comfy, load, saved: Saved):
    weights: FarWeights = make_low_rank(load())
    prompt = applied(saved(weights), family="sdxl")
    prompt["1"] = tiny_base(weights_seed=1, family="sdxl")
    logged = len(comfy.log())
    comfy.run(prompt)
    assert "trained on another base of the same shape" in comfy.log()[logged:]
