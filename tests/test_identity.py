"""What a run is known by: every weight of its base, its dataset, its settings, and how composites are made."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from far_train.data import fusion as fusion_module
from far_train.models.apply import applied_weights, apply_weights
from far_train.models.base import BaseModel
from far_train.models.families import SD21
from far_train.models.fingerprint import base_fingerprint, fingerprint
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights
from far_train.training.recipe import train
from far_train.training.run_folder import find_run, run_identity
from far_train.training.settings import TrainConfig
from far_train.utils.errors import BaseModelError, CheckpointError, WeightsError

QUICK = TrainConfig(steps=2, sample_every=0, save_every=1, device="cpu")


def states_of(base: BaseModel) -> dict[str, dict[str, torch.Tensor]]:
    return {part: module.state_dict() for part, module in base.parts.items()}


def copies(base: BaseModel) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part, state in states_of(base).items() for k, v in state.items()}


@pytest.fixture(scope="module")
def learned(tiny_folder: Path, fusion, tmp_path_factory) -> tuple[Path, FarWeights]:
    """A finished run on the tiny base, and its weights."""
    folder = tmp_path_factory.mktemp("runs") / "twins"
    return folder, train(load_base(tiny_folder), fusion, QUICK, folder)


# ---- fingerprints


def test_a_fingerprint_tells_names_shapes_types_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].view(2, 3), "b": tensors["b"]},
        {"a": tensors["a"].double(), "b": tensors["b"]},
        {"a": tensors["a"], "b": torch.tensor([1.0, 1.0 + 2**-23])},
    ]
    known = {fingerprint(tensors), *map(fingerprint, others)}
    assert len(known) == 5 and fingerprint(dict(reversed(tensors.items()))) in known
    assert fingerprint({"a": tensors["a"].bfloat16()}, torch.float32) == fingerprint({"a": tensors["a"]})


@pytest.mark.parametrize("part", SD21.parts)
def test_any_changed_weight_is_another_base(base: BaseModel, fusion, learned, part: str):
    """The smallest change of a single number, in any part, and the run of the base before is not found."""
    folder, _ = learned
    assert find_run(folder.parent, folder.name, run_identity(base, fusion, QUICK)) == (folder, True)
    parameters = list(base.parts[part].parameters())
    with torch.no_grad():
        values = parameters[len(parameters) // 2].view(-1)
        values[-1] = torch.nextafter(values[-1], torch.tensor(torch.inf))
    found, finished = find_run(folder.parent, folder.name, run_identity(base, fusion, QUICK))
    assert (found.name, finished) == ("twins-2", False)
    with pytest.raises(CheckpointError, match=r"differs in base \(its content changed\)"):
        train(base, fusion, QUICK, folder, resume=True)


def test_a_fingerprint_is_computed_anew_only_for_other_weights(base: BaseModel, monkeypatch):
    before = base.fingerprint
    with monkeypatch.context() as patched:
        patched.setattr("far_train.models.base.base_fingerprint", lambda states: pytest.fail("computed again"))
        assert base.fingerprint == before
    seen = {before}
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.add_(1)
    seen.add(base.fingerprint)
    base.unet.conv_in.weight.data.mul_(2)  # which leaves no trace in the tensor's version
    seen.add(base.fingerprint)
    for factor in (2, 3):  # the memory of what was replaced may be given to what replaces it
        base.unet.conv_in.weight = torch.nn.Parameter(base.unet.conv_in.weight.detach() * factor)
        seen.add(base.fingerprint)
    assert len(seen) == 5


def test_a_fingerprint_from_elsewhere_holds_until_the_weights_change(base: BaseModel):
    own = base.fingerprint
    base.remember_fingerprint("known")
    assert base.fingerprint == "known"
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.add_(1)
    assert base.fingerprint not in ("known", own)


def test_a_fingerprint_keeps_no_weights_alive(base: BaseModel):
    assert base.fingerprint
    weights = [weakref.ref(p) for module in base.parts.values() for p in module.parameters()]
    base.to("meta")
    gc.collect()
    assert len(weights) > 400 and not any(weight() is not None for weight in weights)


def test_a_base_that_can_not_be_placed_stays_as_it_was(base: BaseModel, monkeypatch):
    before, move = copies(base), torch.nn.Module.to

    def full(module, *args, **kwargs):
        if module is base.vae:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError), base.placed("cpu", torch.bfloat16):
        pass
    after = copies(base)
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in after.items())


def test_a_run_of_an_earlier_version_is_called_so(base: BaseModel, fusion, tmp_path: Path):
    train(base, fusion, QUICK, tmp_path)
    begun = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    begun["base"] = {"digest": "ab" * 32, "prediction_type": "v_prediction"}
    (tmp_path / "run.json").write_text(json.dumps(begun), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"differs in base \(that run is of an earlier version of FaR"):
        train(base, fusion, QUICK, tmp_path, resume=True)


def test_every_layout_of_a_base_has_one_fingerprint_and_a_rounded_one_another(base: BaseModel, tiny_folder: Path):
    states = states_of(base)
    older = states | {"text_encoder": {f"text_model.{k}": v for k, v in states["text_encoder"].items()}}
    assert base.fingerprint == load_base(tiny_folder).fingerprint == base_fingerprint(older)
    assert base.to("cpu", torch.float16).fingerprint != base_fingerprint(states)


def test_another_algorithm_of_concept_fusion_makes_another_dataset(fusion, monkeypatch):
    before = fusion.digest()
    monkeypatch.setattr(fusion_module, "ALGORITHM", fusion_module.ALGORITHM + 1)
    assert fusion.digest() != before


def test_seeds_begin_with_other_changes(base: BaseModel, fusion, tmp_path: Path):
    """The random halves of low-rank changes are part of what differs between seeds."""
    first = [train(base, fusion, QUICK.replace(train_seed=seed, steps=1), tmp_path / str(seed)) for seed in (1, 2)]
    name = next(iter(first[0].low_rank_deltas))
    gap = first[0].low_rank_deltas[name].down.float() - first[1].low_rank_deltas[name].down.float()
    assert float(gap.abs().max()) > 0.1  # one step moves them by far less


# ---- a base comes back as it was


def test_weights_are_taken_out_again_so_that_two_can_be_compared(base: BaseModel, learned):
    before, (_, weights) = copies(base), learned
    with applied_weights(weights, base) as vocabulary:
        assert [n.token for n in vocabulary.names] == list(weights.embeddings)
        changed = copies(base)
    assert all(torch.equal(v, copies(base)[k]) for k, v in before.items())
    with applied_weights(weights, base):
        assert all(torch.equal(v, copies(base)[k]) for k, v in changed.items())
    assert any(not torch.equal(v, changed[k]) for k, v in before.items() if k in changed)


def test_weights_on_weights_are_refused(base: BaseModel, fusion, learned, tmp_path: Path):
    _, weights = learned
    apply_weights(weights, base)
    with pytest.raises(WeightsError, match="this base has FaR weights already; load it anew"):
        apply_weights(weights, base)
    with pytest.raises(BaseModelError, match="FaR weights are applied to it"):
        train(base, fusion, QUICK, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_training_leaves_the_base_in_its_precision(base: BaseModel, fusion, tmp_path: Path, precision: str):
    before = copies(base)
    train(base, fusion, QUICK.replace(precision=precision, steps=1), tmp_path)
    after = copies(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())


def test_a_base_that_nobody_needs_afterwards_is_not_kept(base: BaseModel, fusion, tmp_path: Path):
    train(base, fusion, QUICK.replace(precision="bf16", steps=1), tmp_path, keep_base=False)
    assert base.unet.dtype == torch.bfloat16
