"""The same weights in two worlds: what ComfyUI predicts with the pack's nodes, diffusers must predict as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from far_train.models.apply import apply_weights
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner
from far_train.models.export import export_lora
from far_train.models.loading import load_base
from far_train.models.settings import SampleConfig
from far_train.models.tokens import noun_embedding
from far_train.models.weights import FarWeights, Provenance

from .comfy_server import ComfyServer, ExecutionFailed, PromptRejected
from .graphs import encoded, node, predicted, tiny_base
from .listener import NODE_TEXT, Listener
from .tiny_weights import (
    PROMPT,
    TOLERANCE,
    applied,
    difference,
    diffusers_configs,
    make_low_rank,
    make_weights,
    our_result,
    result,
)

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(scope="module")
def base_file(comfy: ComfyServer) -> Path:
    """The tiny checkpoint as ComfyUI itself saves it."""
    comfy.run(
        {"1": tiny_base(), "2": node("FaRTest_SaveBase", model=["1", 0], clip=["1", 1], vae=["1", 2], name="base")}
    )
    return comfy.folder("output") / "base.safetensors"


@pytest.fixture
def base(base_file: Path) -> BaseModel:
    return load_base(base_file, config=diffusers_configs(), prediction_type="v_prediction")


@pytest.fixture
def weights(base: BaseModel) -> FarWeights:
    return make_weights(base)


def test_prediction_and_conditioning_equal_those_of_diffusers(comfy, base, weights, saved):
    theirs = result(comfy, applied(saved(weights)))
    ours, prediction = our_result(base, weights, theirs)
    assert difference(ours.context, theirs["context"]) < TOLERANCE
    assert difference(prediction, theirs["prediction"]) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_low_rank_deltas_equal_those_of_diffusers(comfy, base, saved, strength):
    weights = make_low_rank(base)
    theirs = result(comfy, applied(saved(weights), strength=strength))
    plain = result(comfy, applied(saved(weights), strength=0.0, name="without"), "without")
    assert difference(plain["prediction"], theirs["prediction"]) > 0.1
    _, prediction = our_result(base, weights, theirs, config=SampleConfig(strength=strength))
    assert difference(prediction, theirs["prediction"]) < TOLERANCE


def test_the_comparison_can_fail(comfy, base, weights, saved, base_file):
    """Deltas and embeddings matter, and each delta belongs to its own layer."""
    theirs = result(comfy, applied(saved(weights)))
    plain = result(comfy, applied(saved(weights), strength=0.0, name="without"), "without")
    assert difference(plain["prediction"], theirs["prediction"]) > 0.1
    same_shape = [k for k in weights.deltas if k.endswith(".to_k") and weights.deltas[k].shape[0] == 64][:2]
    swapped = dict(weights.deltas)
    swapped[same_shape[0]], swapped[same_shape[1]] = swapped[same_shape[1]], swapped[same_shape[0]]
    ours, prediction = our_result(base, FarWeights(weights.embeddings, swapped, weights.provenance), theirs)
    assert difference(prediction, theirs["prediction"]) > 10 * TOLERANCE
    exchanged = dict(zip(weights.embeddings, reversed(weights.embeddings.values())))
    other = load_base(base_file, config=diffusers_configs(), prediction_type="v_prediction")
    ours, _ = our_result(other, FarWeights(exchanged, weights.deltas, weights.provenance), theirs)
    assert difference(ours.context, theirs["context"]) > 0.1


def test_strengths_mean_the_same(comfy, base, weights, saved):
    prompt = applied(saved(weights), strength=0.6, concept_strength="<red-ball>=0.3\n<Blue-Ball> : 0.9")
    theirs = result(comfy, prompt)
    config = SampleConfig(strength=0.6, concept_strength={"<red-ball>": 0.3, "<blue-ball>": 0.9})
    ours, prediction = our_result(base, weights, theirs, config=config)
    assert difference(ours.context, theirs["context"]) < TOLERANCE
    assert difference(prediction, theirs["prediction"]) < TOLERANCE


def test_strength_zero_is_the_untouched_base_bit_for_bit(comfy, weights, saved):
    prompt = applied(saved(weights), text="a ball", strength=0.0, name="zero")
    prompt |= {"6": encoded("a ball", ["1", 1]), "7": predicted("untouched", ["1", 0], ["6", 0])}
    zero = result(comfy, prompt, "zero")
    untouched = load_file(comfy.folder("output") / "untouched.safetensors")
    assert torch.equal(zero["context"], untouched["context"])
    assert torch.equal(zero["prediction"], untouched["prediction"])


def test_model_and_clip_stay_untouched_beside_the_applied_ones(comfy, weights, saved):
    alone = {"1": tiny_base(), "2": encoded(PROMPT, ["1", 1]), "3": predicted("before", ["1", 0], ["2", 0])}
    before = result(comfy, alone, "before")
    prompt = applied(saved(weights))
    # After the applied ones have been used: the order of a graph's branches is not ours to choose, so a second run.
    result(comfy, prompt)
    prompt |= {"6": encoded(PROMPT, ["1", 1]), "7": predicted("after", ["1", 0], ["6", 0])}
    after = result(comfy, prompt, "after")
    assert torch.equal(before["context"], after["context"])
    assert torch.equal(before["prediction"], after["prediction"])


@pytest.mark.parametrize(("make", "name"), [(make_weights, "stock"), (make_low_rank, "low-rank")])
def test_stock_loaders_read_the_exports(comfy, base, saved, make, name):
    weights = make(base)
    save = {
        "1": node("FaR_LoadWeights", file=saved(weights)),
        "2": node(
            "FaR_SaveWeights", weights=["1", 0], name=name, export_lora=True, export_embeddings=True, lora_rank=0
        ),
    }
    files = [Path(line) for line in comfy.run(save)["2"]["text"][0].splitlines()]
    stem = f"{name}.safetensors"
    assert [f.name for f in files] == [stem, stem, "red-ball.safetensors", "blue-ball.safetensors"]
    assert {f.parent.name for f in files} == {"far", "loras", "embeddings"}
    logged = len(comfy.log())
    prompt = {
        "1": tiny_base(),
        "2": node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=stem,
                  strength_model=1.0, strength_clip=1.0),
        "3": encoded("a photo of a embedding:red-ball ball, and a embedding:blue-ball ball on a beach", ["2", 1]),
        "4": predicted("stock", ["2", 0], ["3", 0]),
    }  # fmt: skip
    theirs = result(comfy, prompt, "stock")
    assert "not loaded" not in comfy.log()[logged:]
    ours, prediction = our_result(base, weights, theirs)
    assert difference(ours.context, theirs["context"]) < TOLERANCE
    assert difference(prediction, theirs["prediction"]) < TOLERANCE


def test_saving_twice_keeps_one_file_and_other_weights_get_a_number(comfy, base, weights, saved):
    def save(file: str) -> list[str]:
        prompt = {
            "1": node("FaR_LoadWeights", file=file),
            "2": node("FaR_SaveWeights", weights=["1", 0], name="../kept:once", export_lora=False,
                      export_embeddings=False, lora_rank=0),
        }  # fmt: skip
        return [Path(line).name for line in comfy.run(prompt)["2"]["text"][0].splitlines()]

    first, second = saved(weights, "-a"), saved(make_weights(base, steps=2), "-b")
    assert save(first) == ["kept-once.safetensors"]
    assert save(second) == ["kept-once-2.safetensors"]
    assert save(first) == ["kept-once.safetensors"]


def test_how_to_write_an_embedding_is_told(comfy, weights, saved):
    """The file of another training's token of that name stays, and the name means that one."""
    again = {f"<again-{token[1:]}": rows for token, rows in weights.embeddings.items()}
    other = {token: {name: row + 1 for name, row in rows.items()} for token, rows in again.items()}
    about = Provenance(**vars(weights.provenance) | {"nouns": dict.fromkeys(again, "ball")})
    told = []
    for suffix, rows in (("-a", again), ("-b", other)):
        save = node("FaR_SaveWeights", weights=["1", 0], name="told", export_lora=False, export_embeddings=True,
                    lora_rank=0)  # fmt: skip
        file = saved(FarWeights(rows, weights.deltas, about), suffix)
        with Listener(comfy) as listener:
            outputs = comfy.run({"1": node("FaR_LoadWeights", file=file), "2": save})
            listener.catch_up()
        ((_, text),) = [shown for shown in listener.texts if shown[0] == "2"]
        assert text.endswith("saved:\n" + outputs["2"]["text"][0])
        told += text.splitlines()[:2]
    assert told == [
        "write embedding:again-red-ball",
        "write embedding:again-blue-ball",
        "write embedding:again-red-ball-2 (embedding:again-red-ball is of another training)",
        "write embedding:again-blue-ball-2 (embedding:again-blue-ball is of another training)",
    ]


def test_warnings_stand_on_the_node_that_applies(comfy, weights, saved):
    """Of another base, and of a token that is applied twice; gone when there is no more reason."""
    prompt = applied(saved(weights))
    plain = {name: dict(entry) for name, entry in prompt.items()}
    prompt["1"] = tiny_base(weights_seed=1)
    prompt["8"] = node("FaR_ApplyWeights", model=["3", 0], clip=["3", 1], weights=["2", 0], strength=1.0)
    prompt |= {"9": encoded("a <red-ball> ball", ["8", 1]), "10": predicted("twice", ["8", 0], ["9", 0])}
    with Listener(comfy) as listener:
        comfy.run(prompt)
        comfy.run(plain)
        listener.catch_up()
    first, last = [text for node_id, text in listener.texts if node_id == "3"]
    assert first.startswith("These FaR weights were trained on another base")
    assert last == "applied: <red-ball>, <blue-ball>"
    (second,) = [text for node_id, text in listener.texts if node_id == "8"]
    assert "\n<red-ball>, <blue-ball>: applied before by another FaR Apply Weights" in second


def test_weighted_and_stacked_prompts(comfy, base, weights, saved):
    """Emphasis reaches the embedding, and two nodes in a row know each other's tokens."""
    renamed = FarWeights(
        {"<green-ball>": weights.embeddings["<red-ball>"]},
        {k: torch.zeros_like(v) for k, v in weights.deltas.items()},
        Provenance(**vars(weights.provenance) | {"nouns": {"<green-ball>": "ball"}}),
    )
    prompt = applied(saved(weights, "-first"), text="a <green-ball> ball and a <blue-ball> ball")
    prompt |= {
        "6": node("FaR_LoadWeights", file=saved(renamed, "-second")),
        "7": node("FaR_ApplyWeights", model=["3", 0], clip=["3", 1], weights=["6", 0], strength=1.0),
        "8": encoded("a <green-ball> ball and a <blue-ball> ball", ["7", 1]),
        "9": predicted("stacked", ["7", 0], ["8", 0]),
        "10": encoded("a (<green-ball>:1.5) ball and a (<blue-ball>) ball", ["7", 1]),
        "11": predicted("weighted", ["7", 0], ["10", 0]),
    }
    logged = len(comfy.log())
    stacked = result(comfy, prompt, "stacked")
    log = comfy.log()[logged:]
    assert "trained on another base" not in log  # the first weights are no other base
    assert log.count("<green-ball>, which none of the applied concepts has") == 1  # behind the first node alone
    ours, prediction = our_result(base, weights, stacked, "a <red-ball> ball and a <blue-ball> ball")
    assert difference(ours.context, stacked["context"]) < TOLERANCE
    assert difference(prediction, stacked["prediction"]) < TOLERANCE
    weighted = load_file(comfy.folder("output") / "weighted.safetensors")
    assert 0.001 < difference(weighted["context"], stacked["context"]) < 1


def test_unknown_tokens_are_warned_of_once(comfy, weights, saved):
    logged = len(comfy.log())
    prompt = applied(saved(weights), text="a <corgi-dog> dog")
    prompt |= {"6": encoded("a <corgi-dog> dog and a <red-ball> ball", ["3", 1])}
    prompt |= {"7": predicted("other", ["3", 0], ["6", 0])}
    comfy.run(prompt)
    assert comfy.log()[logged:].count("The prompt holds <corgi-dog>") == 1


def test_prompts_with_an_unpatched_clip_are_told_so(comfy, weights, saved):
    """The stock prompt node can't know; the node that has the tokens looks over the graph and says it there."""
    prompt = applied(saved(weights), text="a <red-ball> ball")
    prompt |= {"6": encoded("a <red-ball> ball", ["1", 1]), "7": predicted("unpatched", ["3", 0], ["6", 0])}
    with Listener(comfy) as listener:
        comfy.run(prompt)
    told = [payload for kind, payload in listener.binaries if kind == NODE_TEXT]
    assert any(b"&lt;red-ball&gt; will be read as plain text here" in payload for payload in told)
    assert all(payload[4:5] == b"6" for payload in told if b"plain text" in payload)


def test_a_prompt_rewired_after_a_good_run_is_told_so(comfy, weights, saved):
    """FaR Apply Weights comes from the cache then, and the text from a node that only holds it."""
    prompt = applied(saved(weights))
    prompt["6"] = node("PrimitiveStringMultiline", value="a <red-ball> ball")
    prompt["4"]["inputs"]["text"] = ["6", 0]
    with Listener(comfy) as listener:
        comfy.run(prompt)
        prompt["4"]["inputs"]["clip"] = ["1", 1]
        assert "3" in comfy.cached(comfy.wait(comfy.queue(prompt)))
        prompt["4"]["inputs"]["clip"] = ["3", 1]
        comfy.run(prompt)
        listener.catch_up()
    note = "<red-ball> will be read as plain text here: connect the CLIP of FaR Apply Weights"
    assert [text for node_id, text in listener.texts if node_id == "4"] == [
        note,
        "fixed: placeholder tokens are read as such here",
    ]


def test_concept_strength_zero_is_the_noun(comfy, base, weights, saved):
    file = saved(weights)
    theirs = result(comfy, applied(file, text="<red-ball>", concept_strength='{"<red-ball>": 0}'))
    table = base.text_encoders[0].get_input_embeddings().weight
    vocabulary = apply_weights(weights, base, SampleConfig(concept_strength={"<red-ball>": 0.0}))
    rows = base.text_encoders[0].get_input_embeddings().rows[:2]
    assert torch.allclose(rows, noun_embedding(table, vocabulary, "ball").expand(2, -1))
    with torch.no_grad():
        ours = TextConditioner(base).encode([vocabulary.tokenize("<red-ball>")], (64, 64)).context
    assert difference(ours, theirs["context"][:1]) < TOLERANCE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<green-ball>=1", "there is no <green-ball>; known: <red-ball>, <blue-ball>"),
        ("<red-ball> strong", "can't be read; write one token a line"),
        ('{"<red-ball>": ', "can't be read"),
        ("<red-ball>=9", "out of range"),
    ],
)
def test_concept_strengths_that_cannot_be_read(comfy, weights, saved, text, message):
    with pytest.raises(ExecutionFailed, match="node 3 .FaR_ApplyWeights.: .*concept_strength: ") as failed:
        comfy.run(applied(saved(weights), concept_strength=text))
    assert message in str(failed.value)


def test_weights_of_another_base_are_refused_or_warned_of(comfy, base, weights, saved):
    def refused(file: str, **loader) -> str:
        prompt = applied(file)
        prompt["1"] = tiny_base(**loader)
        with pytest.raises(ExecutionFailed, match="node 3 .FaR_ApplyWeights.") as failed:
            comfy.run(prompt)
        return str(failed.value)

    file = saved(weights)
    assert "trained on a base with v_prediction, MODEL has epsilon" in refused(file, prediction="epsilon")
    assert "use the base that they belong to" in refused(file, res_blocks=1)
    narrow = FarWeights(
        {t: {"clip_h": e["clip_h"][:, :32]} for t, e in weights.embeddings.items()}, weights.deltas, weights.provenance
    )
    assert "this CLIP needs 64" in refused(saved(narrow, "-narrow"))

    logged = len(comfy.log())
    prompt = applied(file)
    prompt["1"] = tiny_base(weights_seed=1)
    comfy.run(prompt)
    assert "trained on another base of the same shape" in comfy.log()[logged:]


def test_a_missing_and_a_foreign_file_are_named(comfy, weights, saved):
    saved(weights)
    with pytest.raises(PromptRejected, match="models/far holds no file 'gone.safetensors'"):
        comfy.queue(applied("gone.safetensors"))
    (comfy.folder("models/far") / "lora.safetensors").write_bytes(lora_file(weights, comfy.folder("temp")))
    with pytest.raises(ExecutionFailed, match="node 2 .FaR_LoadWeights.*is no FaR file"):
        comfy.run(applied("lora.safetensors"))


def lora_file(weights: FarWeights, folder: Path) -> bytes:
    export_lora(weights, folder / "lora.safetensors")
    return (folder / "lora.safetensors").read_bytes()


def test_the_loader_tells_what_a_file_holds(comfy, weights, saved):
    prompt = {"1": node("FaR_LoadWeights", file=saved(weights)), "2": node("PreviewAny", source=["1", 1])}
    about = json.loads(comfy.run(prompt)["2"]["text"][0])
    assert about["concepts"]["<red-ball>"] == {"noun": "ball", "vectors": 2}
    assert about["kv_deltas"] == 32
