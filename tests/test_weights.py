"""The FaR weights file: round trip, refusals, application, exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from far_train.mini.tiny import random_states, single_file_state, tiny_configs
from far_train.models.apply import apply_weights
from far_train.models.conditioning import TextConditioner
from far_train.models.export import export_embeddings, file_stem
from far_train.models.families import FAMILIES, SDXL, Family
from far_train.models.layers import attention_projections, kv_weights
from far_train.models.loading import load_base
from far_train.models.settings import SampleConfig
from far_train.models.weights import FarWeights, LowRankDelta, Provenance, describe
from far_train.utils.errors import ConfigError, WeightsError


def make_weights(base, scale: float = 0.05) -> FarWeights:
    generator = torch.Generator().manual_seed(3)
    deltas = {
        name: (scale * torch.randn(weight.shape, generator=generator)).half()
        for name, weight in kv_weights(base.unet).items()
    }
    widths = {e: len(t[0]) for e, t in zip(base.family.comfy_names, TextConditioner(base).tables)}
    rows = {
        token: {encoder: torch.randn(1, width, generator=generator) for encoder, width in widths.items()}
        for token in ("<red-ball>", "<blue-ball>")
    }
    nouns = dict.fromkeys(rows, "ball")
    return FarWeights(rows, deltas, Provenance(base.family.key, base.digest, base.prediction_type, nouns, 10, 128))


def make_low_rank(base, rank: int = 2) -> FarWeights:
    """The same concepts with low-rank deltas of all attention."""
    generator = torch.Generator().manual_seed(4)
    low_rank_deltas = {}
    for name, (owner, part) in attention_projections(base.unet).items():
        out, width = getattr(owner, part).weight.shape
        up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
        low_rank_deltas[name] = LowRankDelta((0.1 * up).half(), (0.1 * down).half())
    return replace(make_weights(base), deltas={}, low_rank_deltas=low_rank_deltas)


@pytest.fixture
def weights(base) -> FarWeights:
    return make_weights(base)


@pytest.fixture(scope="module")
def sdxl_weights() -> FarWeights:
    configs = tiny_configs(family=SDXL)
    state = single_file_state(configs, random_states(configs, family=SDXL), SDXL)
    return make_low_rank(load_base(state, config=configs))


@pytest.fixture
def lora(base) -> FarWeights:
    return make_low_rank(base)


def same_values(weights: FarWeights, again: FarWeights) -> None:
    pairs = [(weights.embeddings[t], again.embeddings[t]) for t in weights.embeddings]
    for mine, theirs in (*pairs, (weights.deltas, again.deltas)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_round_trip(weights: FarWeights, tmp_path: Path):
    weights.save(tmp_path / "w.safetensors")
    again = FarWeights.load(tmp_path / "w.safetensors")
    assert again.provenance == weights.provenance
    assert again.names == weights.names
    assert again.embeddings.keys() == weights.embeddings.keys()
    same_values(weights, again)
    about = describe(again)
    assert about["kv_deltas"] == 20 and about["concepts"]["<red-ball>"]["noun"] == "ball"


def test_round_trip_of_each_family(family: Family, family_base, tmp_path: Path):
    """Every text encoder has rows under its own name, and the two of SDXL can't be taken for each other."""
    weights = make_low_rank(family_base)
    weights.save(tmp_path / "w.safetensors")
    names = {k for k in load_file(tmp_path / "w.safetensors") if k.startswith("embedding.")}
    assert names == {f"embedding.{encoder}.{token}" for encoder in family.comfy_names for token in weights.embeddings}
    again = FarWeights.load(tmp_path / "w.safetensors")
    same_values(weights, again)
    again.check_fits(family_base)
    assert describe(again)["family"] == family.key and again.digest() == weights.digest()
    if len(family.text_encoders) == 2:
        first, second = family.comfy_names
        swapped = {t: {first: rows[second], second: rows[first]} for t, rows in weights.embeddings.items()}
        assert replace(weights, embeddings=swapped).digest() != weights.digest()
        with pytest.raises(WeightsError, match=r"embeddings of clip_l \(width 48, the base has 32\) and 1 others"):
            replace(weights, embeddings=swapped).check_fits(family_base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding.clip_g.<red-ball>": None}, "no proper tensor for <red-ball> of clip_g"),
        ({"embedding.clip_g.<red-ball>": torch.ones(2, 48)}, "differ in shape"),
        ({"embedding.clip_l.<red-ball>": torch.ones(1, 31)}, "differ in shape"),
        ({"embedding.clip_h.<red-ball>": torch.ones(1, 32)}, r"does not hold what .*\['embedding.clip_h.<red-ball>'\]"),
        ({"embedding.<red-ball>": torch.ones(1, 32)}, r"does not hold what .*\['embedding.<red-ball>'\]"),
    ],
)
def test_files_with_other_rows_than_their_encoders(
    sdxl_weights: FarWeights, tmp_path: Path, change: dict, message: str
):
    path = tmp_path / "w.safetensors"
    sdxl_weights.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: v for k, v in (load_file(path) | change).items() if v is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match=message):
        FarWeights.load(path)


def test_round_trip_of_low_rank_deltas(lora: FarWeights, tmp_path: Path):
    lora.save(tmp_path / "w.safetensors")
    again = FarWeights.load(tmp_path / "w.safetensors")
    assert again.low_rank_deltas.keys() == lora.low_rank_deltas.keys() and not again.deltas
    for name, delta in lora.low_rank_deltas.items():
        read = again.low_rank_deltas[name]
        assert torch.equal(read.up, delta.up) and torch.equal(read.down, delta.down)
    assert again.digest() == lora.digest() != replace(lora, low_rank_deltas={}).digest()
    about = describe(again)
    assert (about["low_rank_deltas"], about["rank"], about["kv_deltas"]) == (len(lora.low_rank_deltas), 2, 0)


def as_schema_2(weights: FarWeights, path: Path) -> Path:
    """The file of these weights as the last version wrote it, which knew one text encoder alone."""
    weights.save(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["far"])
    assert about["schema"] == 3
    tensors = {k.replace("embedding.clip_h.", "embedding."): v for k, v in load_file(path).items()}
    assert sum(k.startswith("embedding.<") for k in tensors) == len(weights.embeddings)
    save_file(tensors, path, {"far": json.dumps(about | {"schema": 2})})
    return path


def test_files_of_the_last_schema_are_read_and_written_anew(weights: FarWeights, tmp_path: Path):
    old = FarWeights.load(as_schema_2(weights, tmp_path / "old.safetensors"))
    assert old.provenance == weights.provenance and old.digest() == weights.digest()
    for token, rows in weights.embeddings.items():
        assert old.embeddings[token].keys() == {"clip_h"}
        assert torch.equal(old.embeddings[token]["clip_h"], rows["clip_h"])
    old.save(tmp_path / "new.safetensors")
    weights.save(tmp_path / "w.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_weights_are_compared_and_hashed_by_identity(lora: FarWeights):
    twin = replace(lora)
    first, second = (delta for delta, _ in zip(lora.low_rank_deltas.values(), range(2)))
    assert lora == lora and lora != twin and len({lora, twin, lora}) == 2
    assert first == first and first != second and len({first, second, first}) == 2
    assert lora.digest() == twin.digest()  # which compares by content


def test_factors_that_do_not_match_are_refused(lora: FarWeights, tmp_path: Path):
    name, delta = next(iter(lora.low_rank_deltas.items()))
    broken = lora.low_rank_deltas | {name: LowRankDelta(delta.up[:, :1], delta.down)}
    replace(lora, low_rank_deltas=broken).save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=f"up and down of {name} don't match"):
        FarWeights.load(tmp_path / "w.safetensors")


def test_both_kinds_of_deltas_in_one_file_are_refused(weights: FarWeights, lora: FarWeights, tmp_path: Path):
    replace(lora, deltas=weights.deltas).save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="holds both dense and low-rank changes"):
        FarWeights.load(tmp_path / "w.safetensors")


def test_low_rank_deltas_of_another_base_are_refused(base, lora: FarWeights):
    name = next(iter(lora.low_rank_deltas))
    for deltas in (
        {k: v for k, v in lora.low_rank_deltas.items() if k != name},
        lora.low_rank_deltas | {name: LowRankDelta(torch.zeros(3, 2), torch.zeros(2, 3))},
    ):
        with pytest.raises(WeightsError, match=f"it differs in {name}; use their base"):
            replace(lora, low_rank_deltas=deltas).check_fits(base)


def test_layer_names_are_the_original_ones(weights: FarWeights):
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_k" in weights.deltas
    assert "middle_block.1.transformer_blocks.0.attn2.to_v" in weights.deltas


def test_files_that_are_no_weights(tmp_path: Path, weights: FarWeights):
    with pytest.raises(WeightsError, match="can't read"):
        FarWeights.load(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match="no FaR file"):
        FarWeights.load(tmp_path / "lora.safetensors")
    weights.save(tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="can't read"):
        FarWeights.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "newer version"),
        ({"family": "sd99"}, "model family 'sd99'"),
        ({"nouns": {"../../evil": "dog"}}, "can't be read"),
        ({"nouns": {}}, "no concepts|does not hold"),
        ({"nouns": {"<green-ball>": "ball"}}, "no proper tensor|does not hold"),
        ({"nouns": 3}, "can't be read"),
    ],
)
def test_metadata_that_lies(weights: FarWeights, tmp_path: Path, change: dict, message: str):
    path = tmp_path / "w.safetensors"
    weights.save(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["far"])
    save_file(load_file(path), path, {"far": json.dumps({**metadata, **change})})
    with pytest.raises(WeightsError, match=message):
        FarWeights.load(path)


def test_values_that_are_not_finite(weights: FarWeights, tmp_path: Path):
    next(iter(weights.deltas.values()))[0, 0] = float("nan")
    weights.save(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        FarWeights.load(tmp_path / "w.safetensors")


def test_another_base(base, weights: FarWeights, caplog):
    other = replace(base, prediction_type="epsilon")
    with pytest.raises(WeightsError, match="trained on a base with v_prediction, this one has epsilon"):
        weights.check_fits(other)
    weights.check_fits(replace(base, digest="0" * 64))
    assert "another base of the same shape" in caplog.text
    name = next(iter(weights.deltas))
    with pytest.raises(WeightsError, match="don't fit"):
        replace(weights, deltas={**weights.deltas, name: torch.zeros(3, 3)}).check_fits(base)
    with pytest.raises(WeightsError, match="width 16"):
        replace(weights, embeddings={t: {"clip_h": torch.zeros(1, 16)} for t in weights.embeddings}).check_fits(base)


def test_apply_adds_the_deltas_by_strength(base, weights: FarWeights):
    before = {k: v.clone() for k, v in kv_weights(base.unet).items()}
    apply_weights(weights, base, SampleConfig(strength=0.5))
    for name, weight in kv_weights(base.unet).items():
        assert torch.allclose(weight, before[name] + 0.5 * weights.deltas[name].float())


def test_apply_leaves_the_source_of_the_base_untouched(weights: FarWeights):
    configs = tiny_configs()
    state = single_file_state(configs, random_states(configs))
    before = {k: v.clone() for k, v in state.items()}
    apply_weights(weights, load_base(state, config=configs))
    assert all(torch.equal(before[k], v) for k, v in state.items())


def test_concept_strength_moves_between_noun_and_concept(base, weights: FarWeights):
    table = base.text_encoders[0].get_input_embeddings().weight
    noun = table[base.tokenizer("ball", add_special_tokens=False)["input_ids"]].mean(0)
    vocabulary = apply_weights(weights, base, SampleConfig(concept_strength={"<red-ball>": 0.25}))
    rows = base.text_encoders[0].get_input_embeddings().rows
    expected = 0.75 * noun + 0.25 * weights.embeddings["<red-ball>"]["clip_h"][0]
    assert torch.allclose(rows[vocabulary.rows("<red-ball>")[0]], expected, atol=1e-6)
    assert torch.equal(rows[vocabulary.rows("<blue-ball>")[0]], weights.embeddings["<blue-ball>"]["clip_h"][0])


def test_unknown_concept_strength(base, weights: FarWeights):
    with pytest.raises(ConfigError, match="no <green-ball>; known: <red-ball>, <blue-ball>"):
        apply_weights(weights, base, SampleConfig(concept_strength={"<green-ball>": 1.0}))


def test_prompts_without_modifiers_are_encoded_as_before(base, weights: FarWeights):
    plain = base.tokenizer("a dog!", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        before = base.text_encoders[0](plain).last_hidden_state
        vocabulary = apply_weights(weights, base)
        conditioner = TextConditioner(base)
        after, other = (
            conditioner.encode([vocabulary.tokenize(t)], (64, 64)).context for t in ("a dog!", "a <red-ball> dog!")
        )
    assert torch.equal(before, after)
    assert not torch.allclose(after, other, atol=1e-3)


def test_embedding_export(weights: FarWeights, tmp_path: Path):
    paths = export_embeddings(weights, tmp_path)
    assert [p.name for p in paths] == ["red-ball.safetensors", "blue-ball.safetensors"]
    content = load_file(paths[0])
    assert content.keys() == {"clip_h"}
    assert torch.equal(content["clip_h"], weights.embeddings["<red-ball>"]["clip_h"])


def test_embedding_export_of_two_encoders(sdxl_weights: FarWeights, tmp_path: Path):
    content = load_file(export_embeddings(sdxl_weights, tmp_path)[1])
    assert {k: tuple(v.shape) for k, v in content.items()} == {"clip_l": (1, 32), "clip_g": (1, 48)}
    assert all(torch.equal(content[k], v) for k, v in sdxl_weights.embeddings["<blue-ball>"].items())


def test_weights_of_another_family_are_refused_by_name(base, sdxl_weights: FarWeights):
    message = "trained on Stable Diffusion XL, this base is Stable Diffusion 2.1; use a base of Stable Diffusion XL"
    with pytest.raises(WeightsError, match=message):
        sdxl_weights.check_fits(base)
    with pytest.raises(WeightsError, match=message):
        apply_weights(sdxl_weights, base)
    sdxl_weights.check_family(FAMILIES["sdxl"])


def test_file_stems_exist_on_every_system():
    assert file_stem("<corgi-dog>") == "corgi-dog"
    assert file_stem("<con>") == "con-token"
