"""The whole recipe on the tiny model: it learns, it touches nothing else, and it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from far_train.data.concepts import Composite
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models.attention_maps import AttentionRecorder, cross_attention_layers, supervised_layers
from far_train.models.loading import load_base
from far_train.training import step
from far_train.training.recipe import Callbacks, TrainingRun, train
from far_train.training.run_folder import find_run, read_metrics, run_identity, what_changed
from far_train.training.settings import TrainConfig
from far_train.utils.errors import CheckpointError, ConfigError, Interrupted, OutputError, TrainingDiverged

QUICK = TrainConfig(steps=4, sample_every=0, save_every=2, device="cpu")


def state_of(base) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in base.parts.items() for k, v in m.state_dict().items()}


def same_weights(a, b) -> bool:
    return a.digest() == b.digest()


def open_run(base, fusion, folder: Path, **settings) -> TrainingRun:
    return TrainingRun(base, fusion, QUICK.replace(**settings), folder)


def stop_at(step: int) -> Callbacks:
    """Callbacks that ask to stop once ``step`` steps are done."""
    done = []
    return Callbacks(on_step=lambda step, _: done.append(step), should_stop=lambda: len(done) >= step > 0)


@pytest.mark.parametrize(("trainable", "matrices"), [("kv", 20), ("lora", 80)])
def test_everything_trainable_moves_and_nothing_else_does(base, fusion, tmp_path: Path, trainable, matrices):
    before = state_of(base)
    run = open_run(base, fusion, tmp_path, trainable=trainable)
    rows = run.state.adapter.rows[0].detach().clone()
    for _ in range(4):
        run.train_step()
    moved = (run.state.adapter.rows[0].detach() - rows).abs().amax(1)
    assert (moved > 0).all() and len(moved) == 2  # the last row too
    weights = run.save_weights()
    assert len(weights.shapes()) == matrices and all(weights.delta(name).any() for name in weights.shapes())
    run.close()
    after = state_of(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in base.unet.parameters())


def test_a_run_leaves_its_files(base, fusion, tmp_path: Path):
    phases, steps, samples = [], [], []
    callbacks = Callbacks(
        on_phase=lambda phase, done, total: phases.append((phase, done, total)),
        on_step=lambda step, metrics: steps.append(step),
        on_samples=lambda step, prompts, pictures: samples.append((step, prompts, pictures.shape)),
    )
    config = QUICK.replace(sample_every=4, sample_steps=2)
    weights = train(base, fusion, config, tmp_path / "run", callbacks=callbacks)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == steps == [1, 2, 3, 4]
    assert all(m["finite"] and m["loss"] > 0 and m["refinement"] > 0 for m in lines)
    assert lines[0]["prior"] == 0 and all(m["prior"] > 0 for m in lines[1:])  # at first it predicts what the base does
    assert phases[-1] == ("encoding", 16, 16)
    assert samples[0][1][0] == "a photo of a <red-ball> ball and a <blue-ball> ball"
    assert samples[0][2] == (3, 128, 128, 3)
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        f"step-000004-{i}.png" for i in range(3)
    ]
    assert weights.provenance.base_digest == base.digest and weights.provenance.steps == 4
    assert not list((tmp_path / "run").rglob("*.part*"))


def train_on_one_batch(base, fusion, folder: Path, monkeypatch, refinement_weight: float):
    """Repeat one batch for 100 steps; denoising and refinement loss [2] before and after."""
    for layer in cross_attention_layers(base.unet).values():
        layer.to_q.weight.data.mul_(6)  # random maps are flat; as in a trained model, these have peaks to begin with
    run = open_run(
        base,
        fusion,
        folder,
        steps=60,
        refinement_weight=refinement_weight,
        refinement_ramp=0.0,
        competition_weight=0.1,  # one batch of a random model: its keys can't give every pixel to its owner
        min_snr_gamma=None,
        trainable="kv",
        kv_lr=2e-3,
        embedding_lr=1e-2,
        weight_decay=0.0,
        prior_batch_size=0,
    )
    batch = run.state.latent_cache.sample_batch((2, 0), 1000, seed=0, step=0)
    batch.timesteps.clamp_(max=400)  # a random model can't learn to see subjects in pure noise
    monkeypatch.setattr(step, "sample_batch", lambda _: batch)
    if run.state.recorder is None:  # λ = 0 measures nothing by itself
        run.state.recorder = AttentionRecorder(base.unet, supervised_layers(base.unet, 16, 16))
    before = step.run_eagerly(run.state, batch, 1.0)[1:3]
    for _ in range(run.state.steps):
        run.train_step()
    after = step.run_eagerly(run.state, batch, 1.0)[1:3]
    run.close()
    monkeypatch.undo()
    return before, after


def test_both_losses_fall_by_half_and_refinement_needs_its_weight(tiny_folder, concepts, tmp_path: Path, monkeypatch):
    fusion = ConceptFusion(concepts, config=FusionConfig(size=128, count=4))
    before, after = train_on_one_batch(load_base(tiny_folder), fusion, tmp_path / "a", monkeypatch, 1.0)
    assert (after < 0.5 * before).all(), (before, after)
    before, after = train_on_one_batch(load_base(tiny_folder), fusion, tmp_path / "b", monkeypatch, 0.0)
    assert after[0] < 0.5 * before[0] and after[1] > 0.8 * before[1], (before, after)


def test_micro_batches_add_up_to_the_whole_step(base, fusion, tmp_path: Path):
    gradients = []
    for i, micro in enumerate((None, 1, 3)):
        run = open_run(base, fusion, tmp_path / str(i), micro_batch=micro, batch_size=3, prior_batch_size=2)
        run.train_step()
        gradients.append({k: p.grad.clone() for k, p in run.state.adapter.named_parameters().items()})
        run.close()
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-7), name


def test_gradient_checkpointing_changes_nothing(base, fusion, tmp_path: Path):
    gradients = []
    for i, checkpointing in enumerate((False, True)):
        run = open_run(base, fusion, tmp_path / str(i), gradient_checkpointing=checkpointing)
        run.train_step()
        gradients.append({k: p.grad.clone() for k, p in run.state.adapter.named_parameters().items()})
        run.close()
    assert all(torch.allclose(gradients[0][k], gradients[1][k], rtol=1e-4, atol=1e-7) for k in gradients[0])


def test_prior_rows_carry_no_refinement(base, fusion, tmp_path: Path):
    run = open_run(base, fusion, tmp_path, output_preservation=False)
    batch = run.state.latent_cache.sample_batch((2, 2), 1000, seed=0, step=0)
    assert batch.is_instance.tolist() == [True, True, False, False]
    whole = step.run_eagerly(run.state, batch, 1.0)
    prior_part = step.run_eagerly(run.state, batch[2:4], 1.0)
    run.close()
    assert whole[2] > 0 and prior_part[2] == 0 and prior_part[1] == 0
    assert torch.isclose(prior_part[3], whole[3])


def test_masks_follow_flips_and_tokens_follow_the_caption(base, fusion, tmp_path: Path):
    """The cached masks lie where the subjects are, and the token columns on the words that name them."""
    run = open_run(base, fusion, tmp_path)
    composite: Composite = fusion.composite(0)
    for index in range(12):
        composite, sample = fusion.composite(index), run.state.latent_cache.composites[index]
        pieces = [base.tokenizer.decode([i]) if i < 49408 else "modifier" for i in sample.prompt.ids]
        for k, mention in enumerate(composite.mentions):
            words = [pieces[i].strip() for i in sample.noun_select[k].nonzero()[:, 0]]
            assert words == ["ball"]
            expected = ["modifier"] if mention.name.token else []
            assert [pieces[i] for i in sample.token_select[k].nonzero()[:, 0]] == expected
            if mention.name.token:
                row = base.tokenizer_size + run.state.vocabulary.rows(mention.name.token)[0]
                assert sample.prompt.ids[sample.token_select[k].argmax()] == row
            channel = {"<red-ball>": 0, "<blue-ball>": 2}.get(mention.name.token)
            if channel is not None:
                inside = composite.image[mention.mask > 0.9]
                assert inside[:, channel].mean() > 0.7 > 0.4 > inside[:, 1].mean()
            assert torch.allclose(sample.map_masks[k].mean(), mention.mask.mean(), atol=1e-5)
    run.close()


def test_the_right_number_of_layers_is_recorded(base, fusion, tmp_path: Path):
    run = open_run(base, fusion, tmp_path)
    assert len(run.state.recorder.layers) == 3  # all 16×16 layers of the tiny UNet: one going down, two going up
    run.close()
    assert all(type(layer.processor).__name__ == "AttnProcessor2_0" for layer in run.state.recorder.layers.values())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_and_resumed_equals_uninterrupted(tiny_folder: Path, fusion, tmp_path: Path, stop: int):
    """Bit for bit, from any step, also when the stop is no multiple of save_every."""
    config = QUICK.replace(sample_every=3, sample_steps=1)
    whole = train(load_base(tiny_folder), fusion, config, tmp_path / "whole")
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of 4"):
        train(load_base(tiny_folder), fusion, config, folder, callbacks=stop_at(stop))
    assert not (folder / "weights.safetensors").exists()
    resumed = train(load_base(tiny_folder), fusion, config, folder, resume=True)
    assert same_weights(whole, resumed)
    histories = [read_metrics(run / "metrics.jsonl") for run in (tmp_path / "whole", folder)]
    assert len(histories[0]) == 4
    for mine, theirs in zip(*histories):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_killed_after_a_checkpoint_replays_the_lost_steps(tiny_folder: Path, fusion, tmp_path: Path):
    """A process that dies between checkpoints has metrics of steps that it then takes again."""

    def die(step, _metrics):
        if step == 3:
            raise MemoryError("killed")

    whole = train(load_base(tiny_folder), fusion, QUICK, tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(load_base(tiny_folder), fusion, QUICK, tmp_path / "run", callbacks=Callbacks(on_step=die))
    resumed = train(load_base(tiny_folder), fusion, QUICK, tmp_path / "run", resume=True)
    assert same_weights(whole, resumed)
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_stopping_while_encoding(base, fusion, tmp_path: Path):
    seen = []
    callbacks = Callbacks(on_phase=lambda *a: seen.append(a), should_stop=lambda: len(seen) > 2)
    before = state_of(base)
    with pytest.raises(Interrupted, match="encoding"):
        train(base, fusion, QUICK, tmp_path, callbacks=callbacks)
    assert all(torch.equal(before[k], v) for k, v in state_of(base).items())
    assert train(base, fusion, QUICK, tmp_path, resume=True).provenance.steps == 4


def test_a_resumed_run_must_be_the_same(base, fusion, concepts, tmp_path: Path):
    train(base, fusion, QUICK, tmp_path)
    with pytest.raises(OutputError, match="holds a run already"):
        train(base, fusion, QUICK, tmp_path)
    with pytest.raises(CheckpointError, match=r"train_seed \(0 then, 1 now\)"):
        train(base, fusion, QUICK.replace(train_seed=1), tmp_path, resume=True)
    other = ConceptFusion(concepts, (), (), FusionConfig(size=128, count=12, fusion_seed=5))
    with pytest.raises(CheckpointError, match="dataset"):
        train(base, other, QUICK, tmp_path, resume=True)
    # What only concerns reports may differ.
    train(base, fusion, QUICK.replace(save_every=1, sample_every=2, sample_steps=1), tmp_path, resume=True)


def test_checkpoints_of_an_unknown_run_are_not_taken_over(base, fusion, tmp_path: Path):
    train(base, fusion, QUICK, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(OutputError, match=r"checkpoints without run\.json"):
        train(base, fusion, QUICK.replace(train_seed=1), tmp_path)


def test_find_run(base, fusion, tmp_path: Path):
    one, two = (run_identity(base, fusion, QUICK.replace(train_seed=s)) for s in (1, 2))
    assert find_run(tmp_path, "dogs", one) == (tmp_path / "dogs", False)
    train(base, fusion, QUICK.replace(train_seed=1), tmp_path / "dogs")
    assert find_run(tmp_path, "dogs", one) == (tmp_path / "dogs", True)
    assert find_run(tmp_path, "dogs", two) == (tmp_path / "dogs-2", False)
    with pytest.raises(Interrupted):
        train(base, fusion, QUICK.replace(train_seed=2), tmp_path / "dogs-2", callbacks=stop_at(1))
    assert find_run(tmp_path, "dogs", two) == (tmp_path / "dogs-2", False)
    (tmp_path / "dogs-2").rename(tmp_path / "dogs-12")  # as if 2 to 11 had been deleted
    assert find_run(tmp_path, "dogs", two) == (tmp_path / "dogs-12", False)
    assert what_changed(tmp_path, "dogs", two) == ("dogs-12", [])
    three = run_identity(base, fusion, QUICK.replace(train_seed=3))
    (tmp_path / "dogs-2").write_text("a file of the user")
    assert find_run(tmp_path, "dogs", three) == (tmp_path / "dogs-3", False)


def test_the_seed_decides(tiny_folder: Path, fusion, tmp_path: Path):
    runs = [
        train(load_base(tiny_folder), fusion, QUICK.replace(train_seed=seed), tmp_path / str(i))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert same_weights(runs[0], runs[1]) and not same_weights(runs[0], runs[2])


def test_global_randomness_is_neither_used_nor_changed(tiny_folder: Path, fusion, tmp_path: Path):
    torch.manual_seed(1)
    first = train(load_base(tiny_folder), fusion, QUICK, tmp_path / "a")
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = train(load_base(tiny_folder), fusion, QUICK, tmp_path / "b")
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(first, second)


def test_class_pictures_are_drawn_where_there_are_none(base, concepts, tmp_path: Path):
    shares = {"solo": 0.5, "beside_prior": 0.5}
    bare = ConceptFusion(concepts, (), (), FusionConfig(size=128, count=4, layout_weights=shares))
    assert any("is skipped" in note for note in bare.notes)
    config = QUICK.replace(steps=2, num_class_images=2, class_image_steps=1)
    train(base, bare, config, tmp_path)
    drawn = sorted((tmp_path / "priors" / "ball").iterdir())
    assert [p.name for p in drawn] == ["0000.png", "0001.png"]
    assert drawn[0].read_bytes() != drawn[1].read_bytes()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["prior"] > 0


def test_without_prior_half(base, concepts, tmp_path: Path):
    bare = ConceptFusion(concepts, (), (), FusionConfig(size=128, count=4))
    train(base, bare, QUICK.replace(steps=1, prior_batch_size=0), tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["prior"] == 0
    assert not (tmp_path / "priors").exists()


def test_steps_that_are_not_finite_are_skipped_then_end_the_run(base, fusion, tmp_path: Path):
    run = open_run(base, fusion, tmp_path, steps=10)
    run.train_step()
    before = {k: p.detach().clone() for k, p in run.state.adapter.named_parameters().items()}
    composites = run.state.latent_cache.composites
    composites[:] = [dataclasses.replace(s, latents=s.latents * float("nan")) for s in composites]
    metrics = run.train_step()
    assert not metrics["finite"]
    assert all(torch.equal(before[k], p) for k, p in run.state.adapter.named_parameters().items())
    with pytest.raises(TrainingDiverged, match="3 steps"):
        run.fit()
    run.close()


def test_norms_are_capped_at_the_nouns(base, fusion, tmp_path: Path):
    run = open_run(base, fusion, tmp_path)
    table = base.text_encoders[0].get_input_embeddings().weight
    limit = table[base.tokenizer("ball", add_special_tokens=False)["input_ids"]].mean(0).norm()
    with torch.no_grad():
        run.state.adapter.rows[0][0].mul_(100)
        run.state.adapter.rows[0][1].mul_(0.5)
        half = run.state.adapter.rows[0][1].clone()
    run.state.adapter.cap_norms()
    assert torch.isclose(run.state.adapter.rows[0][0].norm(), limit, rtol=1e-5)
    assert torch.equal(run.state.adapter.rows[0][1], half)
    run.close()


def test_bad_settings(base, concepts, tmp_path: Path):
    with pytest.raises(ConfigError, match="device: 'abacus'"):
        train(base, ConceptFusion(concepts, config=FusionConfig(size=128)), QUICK.replace(device="abacus"), tmp_path)
    with pytest.raises(ConfigError, match="nothing would be learned"):
        TrainConfig(lora_lr=0, embedding_lr=0)
    assert not any(tmp_path.iterdir())


def test_other_sizes_than_the_native_one(base, concepts, tmp_path: Path):
    """Training at 192 px supervises maps of at least 16 cells there too."""
    larger = ConceptFusion(concepts, config=FusionConfig(size=192, count=2))
    run = open_run(base, larger, tmp_path, prior_batch_size=0)
    assert run.state.latent_cache.composites[0].map_masks.shape[-2:] == (24, 24)
    assert run.train_step()["finite"]
    run.close()


def test_bf16_base_keeps_fp32_masters(base, fusion, tmp_path: Path):
    """Tiny updates survive: the delta is fp32 and isn't rounded into the frozen weight."""
    run = open_run(base, fusion, tmp_path, precision="bf16")
    assert base.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in run.state.adapter.named_parameters().values())
    metrics = run.train_step()
    assert metrics["finite"]
    assert all(p.grad.dtype == torch.float32 for p in run.state.adapter.named_parameters().values())
    run.close()
