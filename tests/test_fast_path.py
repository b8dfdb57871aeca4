"""What makes a step fast must not change what is learned: bf16, one matrix for K and V, scaled or skipped steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.layers import compiled, uncompiled
from far_train.models.loading import load_base
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.training.loss_scaler import FP16_INITIAL_SCALE
from far_train.training.recipe import TrainingRun
from far_train.training.settings import TrainConfig
from far_train.training.step import accumulate_gradients, sample_batch

STEPS = 30
QUICK = TrainConfig(steps=STEPS, batch_size=1, prior_batch_size=1, sample_every=0, device="cpu")


def prepared(tiny_folder: Path, fusion, folder: Path, **settings) -> TrainingRun:
    return TrainingRun(load_base(tiny_folder), fusion, QUICK.replace(**settings), folder)


def curve(run: TrainingRun) -> list[float]:
    losses = [run.train_step()["loss"] for _ in range(STEPS)]
    run.close()
    return losses


def make_plain(run: TrainingRun) -> None:
    """Each layer projects for itself, and AdamW goes from tensor to tensor."""
    run.state.adapter.prepared_for = lambda context: nullcontext()
    groups = [{**group, "fused": False, "foreach": False} for group in run.state.optimizer.param_groups]
    run.state.optimizer = torch.optim.AdamW(groups)


def test_the_fast_path_has_the_loss_curve_of_plain_fp32(tiny_folder: Path, fusion, tmp_path: Path):
    """Same samples, noise and times, so that single steps can be compared; rates are high, so that they differ."""
    rates = {"trainable": "kv", "kv_lr": 1e-4, "embedding_lr": 5e-3}
    plain = prepared(tiny_folder, fusion, tmp_path / "plain", precision="fp32", **rates)
    make_plain(plain)
    fast = prepared(tiny_folder, fusion, tmp_path / "fast", precision="bf16", **rates)
    expected, got = curve(plain), curve(fast)
    assert got == pytest.approx(expected, rel=2e-2)
    assert fast.state.adapter.rows[0].dtype == torch.float32
    moved = [run.state.adapter.deltas for run in (plain, fast)]
    for name, delta in moved[0].items():
        assert torch.cosine_similarity(delta.flatten(), moved[1][name].flatten(), 0) > 0.9, name


def test_one_product_for_all_layers_gives_what_each_layer_gives(tiny_folder: Path, fusion, tmp_path: Path):
    run = prepared(tiny_folder, fusion, tmp_path, trainable="kv")
    run.train_step()  # deltas that are not zero
    prompt = run.state.latent_cache.composites[0].prompt
    context = run.state.conditioner.encode([prompt], (128, 128)).context.detach().requires_grad_()
    layers = [layer.attn2.to_k for layer in run.state.base.unet.mid_block.attentions[0].transformer_blocks]
    results = []
    for projecting in (nullcontext(), run.state.adapter.prepared_for(context)):
        with projecting:
            keys = layers[0](context)
        kv = run.state.adapter.named_parameters()["kv"]
        results.append((keys, *torch.autograd.grad(keys.square().sum(), (context, kv))))
    run.close()
    for own, shared in zip(*results):
        assert own.abs().sum() > 0 and torch.allclose(own, shared, rtol=1e-4, atol=1e-6)


def test_fp16_scales_the_loss_and_skips_what_overflows(tiny_folder: Path, fusion, tmp_path: Path):
    run = prepared(tiny_folder, fusion, tmp_path, precision="fp16")
    assert run.state.base.unet.dtype == torch.float16 and run.state.scaler.get_scale() == FP16_INITIAL_SCALE
    metrics = run.train_step()
    assert metrics["finite"] and metrics["loss"] < 10  # what is reported is not scaled
    before = {k: p.detach().clone() for k, p in run.state.adapter.named_parameters().items()}
    run.state.scaler.update(2.0**40)
    assert not run.train_step()["finite"]
    assert run.state.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[k], p) for k, p in run.state.adapter.named_parameters().items())
    run.save_checkpoint()
    run.close()
    resumed = TrainingRun(load_base(tiny_folder), fusion, run.state.config, tmp_path, resume=True)
    assert resumed.state.step == 2 and resumed.state.scaler.get_scale() == 2.0**39  # and not the first scale again
    resumed.close()


# ---- compiled blocks


def test_compiled_blocks_compute_the_same(tiny_folder: Path, fusion, tmp_path: Path):
    """What the compiler captures holds recorded maps and shared projections, too; no code is generated here."""
    losses = []
    for backend in (None, "eager"):
        run = prepared(tiny_folder, fusion, tmp_path / str(backend))
        unet = run.state.base.unet
        with compiled(unet, backend=backend) if backend else nullcontext():
            losses.append([list(run.train_step().values()) for _ in range(3)])
            blocks = [m for m in unet.modules() if m._compiled_call_impl is not None]
            assert bool(blocks) == bool(backend)
        assert all(m._compiled_call_impl is None for m in unet.modules())
        run.close()
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-3)


def test_everything_is_compiled_and_nothing_again(fusion, tmp_path: Path):
    """Two layers a block, as SD 2.1 has, in and out of the refinement: torch's own counters say what was compiled."""
    configs = tiny_configs()
    configs["unet"]["layers_per_block"] = 2
    folder = write_folder(tmp_path / "base", configs, random_states(configs))
    run = prepared(folder, fusion, tmp_path / "run", save_every=1000)
    accumulate_gradients(run.state, sample_batch(run.state)[:1], 1)  # as the memory plan's trial does on a GPU
    run.state.optimizer.zero_grad()
    counters.clear()
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    with compiled(run.state.base.unet, backend="eager"):
        assert torch._dynamo.config.recompile_limit > limit
        for _ in range(2):
            run.train_step()
        graphs = counters["stats"]["unique_graphs"]
        assert 0 < graphs <= 12
        with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
            run.train_step()
            with uncompiled(run.state.base.unet):
                config = SampleConfig(sampling_steps=1)
                draw_pictures(run.state.base, run.state.vocabulary, ["a <red-ball> ball"], config)
            run.train_step()
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["unimplemented"] and not counters["graph_break"] and not counters["recompile_limit"]
    assert torch._dynamo.config.recompile_limit == limit
    run.close()
