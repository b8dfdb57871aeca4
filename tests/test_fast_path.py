"""What makes a step fast must not change what is learned: bf16, one matrix for K and V, scaled or skipped steps."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.conditioning import TextConditioner
from far_train.models.layers import set_compiled, uncompiled
from far_train.models.loading import load_base
from far_train.models.sampling import draw_pictures
from far_train.training.latent_cache import slice_batch
from far_train.training.memory_plan import MARGIN, MemoryPlan, choose_plan, plan_memory
from far_train.training.recipe import FP16_SCALE, TrainingRun
from far_train.utils.config import SampleConfig, TrainConfig

STEPS = 60
QUICK = TrainConfig(steps=STEPS, batch_size=1, prior_batch_size=1, sample_every=0, device="cpu")


def prepared(tiny_folder: Path, fusion, folder: Path, **settings) -> TrainingRun:
    run = TrainingRun(load_base(tiny_folder), fusion, QUICK.replace(**settings), folder)
    run.set_up()
    return run


def curve(run: TrainingRun) -> list[float]:
    losses = [run.train_step()["loss"] for _ in range(STEPS)]
    run.clean_up()
    return losses


def make_plain(run: TrainingRun) -> None:
    """Each layer projects for itself, and AdamW goes from tensor to tensor."""
    run.trainables.prepared_for = lambda context: nullcontext()
    groups = [{**group, "fused": False, "foreach": False} for group in run.optimizer.param_groups]
    run.optimizer = torch.optim.AdamW(groups)


def test_the_fast_path_has_the_loss_curve_of_plain_fp32(tiny_folder: Path, fusion, tmp_path: Path):
    """Same samples, noise and times, so that single steps can be compared; rates are high, so that they differ."""
    rates = {"trainable": "kv", "kv_lr": 1e-4, "embedding_lr": 5e-3}
    plain = prepared(tiny_folder, fusion, tmp_path / "plain", precision="fp32", **rates)
    make_plain(plain)
    fast = prepared(tiny_folder, fusion, tmp_path / "fast", precision="bf16", **rates)
    expected, got = curve(plain), curve(fast)
    assert got == pytest.approx(expected, rel=2e-2)
    assert fast.trainables.rows[0].dtype == torch.float32
    moved = [run.trainables.deltas for run in (plain, fast)]
    for name, delta in moved[0].items():
        assert torch.cosine_similarity(delta.flatten(), moved[1][name].flatten(), 0) > 0.9, name


def test_one_product_for_all_layers_gives_what_each_layer_gives(tiny_folder: Path, fusion, tmp_path: Path):
    run = prepared(tiny_folder, fusion, tmp_path, trainable="kv")
    run.train_step()  # deltas that are not zero
    context = TextConditioner(run.base).encode([run.pools[0][0].prompt], (64, 64)).context.detach().requires_grad_()
    layers = [layer.attn2.to_k for layer in run.base.unet.mid_block.attentions[0].transformer_blocks]
    results = []
    for projecting in (nullcontext(), run.trainables.prepared_for(context)):
        with projecting:
            keys = layers[0](context)
        kv = run.trainables.named_parameters()["kv"]
        results.append((keys, *torch.autograd.grad(keys.square().sum(), (context, kv))))
    run.clean_up()
    for own, shared in zip(*results):
        assert own.abs().sum() > 0 and torch.allclose(own, shared, rtol=1e-4, atol=1e-6)


def test_fp16_scales_the_loss_and_skips_what_overflows(tiny_folder: Path, fusion, tmp_path: Path):
    run = prepared(tiny_folder, fusion, tmp_path, precision="fp16")
    assert run.base.unet.dtype == torch.float16 and run.scaler.get_scale() == FP16_SCALE
    metrics = run.train_step()
    assert metrics["finite"] and metrics["loss"] < 10  # what is reported is not scaled
    before = {k: p.detach().clone() for k, p in run.trainables.named_parameters().items()}
    run.scaler.update(2.0**40)
    assert not run.train_step()["finite"]
    assert run.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[k], p) for k, p in run.trainables.named_parameters().items())
    run._save_checkpoint()
    run.clean_up()
    resumed = TrainingRun(load_base(tiny_folder), fusion, run.config, tmp_path, resume=True)
    resumed.set_up()
    assert resumed.step == 2 and resumed.scaler.get_scale() == 2.0**39  # and not the first scale again
    resumed.clean_up()


# ---- memory plans

GB = 2**30


def plan(samples: int, free: float, fast: float, lean: float, **settings) -> MemoryPlan:
    """The plan for ``free`` GB, where one sample takes ``fast`` or, checkpointed, ``lean`` GB."""
    peaks = {False: fast * GB, True: lean * GB}
    return choose_plan(TrainConfig(**settings), samples, peaks.__getitem__, lambda: int(free * GB / MARGIN))


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (40, MemoryPlan(4, False)),  # all at once
        (6.1, MemoryPlan(4, False)),
        (5, MemoryPlan(2, False)),  # three fit, but two halves are as many parts and more even
        (2, MemoryPlan(1, False)),
        (1.1, MemoryPlan(4, True)),  # checkpointing only where not even one fits without
        (0.6, MemoryPlan(2, True)),
        (0.01, MemoryPlan(1, True)),  # nothing is known to fit: the least there is
    ],
)
def test_the_fastest_plan_that_fits(free: float, expected: MemoryPlan):
    assert plan(4, free, 1.5, 0.25) == expected


def test_one_sample_that_does_not_fit_is_checkpointed():
    assert plan(4, 1.1, math.inf, 0.25) == MemoryPlan(4, True)


def test_what_the_user_sets_is_kept():
    assert plan(8, 40, 1.5, 0.25, micro_batch=3) == MemoryPlan(3, False)
    assert plan(8, 40, 1.5, 0.25, gradient_checkpointing=True) == MemoryPlan(8, True)
    cpu = torch.device("cpu")

    def never(checkpointing: bool) -> None:
        raise AssertionError("nothing is measured on a CPU")

    assert plan_memory(TrainConfig(), 4, cpu, never) == MemoryPlan(4, False)
    assert plan_memory(TrainConfig(memory="lean"), 4, cpu, never) == MemoryPlan(4, True)
    assert plan_memory(TrainConfig(micro_batch=9), 4, cpu, never) == MemoryPlan(4, False)


# ---- compiled blocks


def test_compiled_blocks_compute_the_same(tiny_folder: Path, fusion, tmp_path: Path):
    """What the compiler captures holds recorded maps and shared projections, too; no code is generated here."""
    losses = []
    for backend in (None, "eager"):
        run = prepared(tiny_folder, fusion, tmp_path / str(backend))
        if backend:
            run.base.unet.compile_repeated_blocks(backend=backend)
        losses.append([list(run.train_step().values()) for _ in range(3)])
        blocks = [m for m in run.base.unet.modules() if m._compiled_call_impl is not None]
        assert bool(blocks) == bool(backend)
        set_compiled(run.base.unet, False)
        assert all(m._compiled_call_impl is None for m in run.base.unet.modules())
        run.clean_up()
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-3)


def test_everything_is_compiled_and_nothing_again(fusion, tmp_path: Path):
    """Two layers a block, as SD 2.1 has, in and out of the refinement: torch's own counters say what was compiled."""
    configs = tiny_configs()
    configs["unet"]["layers_per_block"] = 2
    folder = write_folder(tmp_path / "base", configs, random_states(configs))
    run = prepared(folder, fusion, tmp_path / "run", save_every=1000)
    run.backward(slice_batch(run._draw(), 0, 1))  # a trial of one sample, as the memory plan takes on a GPU
    run.optimizer.zero_grad()
    counters.clear()
    torch._dynamo.reset()
    set_compiled(run.base.unet, True, backend="eager")
    for _ in range(2):
        run.train_step()
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 12
    with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        run.train_step()
        with uncompiled(run.base.unet):
            draw_pictures(run.base, run.vocabulary, ["a <red-ball> ball"], SampleConfig(sampling_steps=1))
        run.train_step()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["unimplemented"] and not counters["graph_break"] and not counters["recompile_limit"]
    set_compiled(run.base.unet, False)
    run.clean_up()
