"""Counts that don't depend on the machine: of known computations, and of a training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.counting import counting
from benchmarks.speed.work import RandomPictures, count_steps, our_run, random_base, work_config
from far_train.mini.tiny import tiny_configs
from far_train.training.settings import TrainConfig


@pytest.fixture(scope="module")
def counts():
    return count_steps(tiny_configs(), 128, 4, torch.float32)


def test_a_linear_layer_by_hand():
    """[3, 4] → [3, 5]: one product of 2 · 3 · 4 · 5 FLOPs; the input and what relu needs stay for the backward."""
    layer, x = nn.Linear(4, 5), torch.randn(3, 4, requires_grad=True)
    with counting(layer.parameters()) as counts:
        F.relu(layer(x))
    assert counts.flops == 2 * 3 * 4 * 5
    assert counts.kernels == 2 and dict(counts.operations) == {"aten::addmm": 1, "aten::relu": 1}
    assert counts.saved_bytes == 4 * (3 * 4 + 3 * 5)
    assert counts.waits.total() == 0


def test_what_makes_the_host_wait():
    x, on_host = torch.ones(3), torch.ones(())
    with counting(on_host=[on_host]) as counts:
        assert x.sum().item() == 3 and on_host.item() == 1
        x[x > 0] = 2
        x.nonzero()
    assert dict(counts.waits) == {"aten::_local_scalar_dense": 1, "aten::index_put_": 1, "aten::nonzero": 1}


def test_our_step_waits_for_nothing_and_the_reference_does(counts):
    assert counts["fast"].waits.total() == counts["lean"].waits.total() == 0
    assert counts["reference"].waits["aten::_local_scalar_dense"] == 1  # it reads the loss


def test_the_optimizer_and_the_projections_are_single_launches(counts):
    """K and V of all layers: two products forward, for W and Δ, whatever the number of layers; one AdamW."""
    operations = counts["fast"].operations
    assert operations["aten::_fused_adamw_"] == 2  # rows and K/V learn at rates of their own
    assert operations["aten::split_with_sizes_backward"] + operations["aten::cat"] < 30


def test_lean_keeps_less_and_computes_more(counts):
    assert counts["lean"].saved_bytes < counts["fast"].saved_bytes / 3
    assert counts["fast"].flops < counts["lean"].flops < 1.5 * counts["fast"].flops


def test_output_preservation_adds_a_forward_pass_and_keeps_nothing_of_it(counts):
    added = counts["preserving"].flops - counts["fast"].flops
    assert added == pytest.approx(4 * counts["unet forward"].flops, rel=0.02)
    assert counts["preserving"].saved_bytes == pytest.approx(counts["fast"].saved_bytes, rel=0.02)
    assert counts["preserving"].waits.total() == 0


def test_the_reference_encodes_its_pictures_in_every_step(counts):
    assert counts["fast"].flops < counts["reference"].flops - 3 * counts["vae encode"].flops


def test_a_step_costs_the_same_whatever_the_pool_and_the_vocabulary():
    """Operations, FLOPs and memory of one step: flat in the number of pictures and in the embedding table's rows."""
    seen = []
    for pictures, words in ((4, 49408), (16, 49408), (4, 60000)):
        configs = tiny_configs()
        configs["text_encoder"]["vocab_size"] = words
        base = random_base(configs)
        with our_run(base, 128, work_config(4, device="cpu"), RandomPictures(128, pictures)) as run:
            run.take_step()
            with counting(p for m in base.parts.values() for p in m.parameters()) as counts:
                run.take_step()
        seen.append((counts.operations, counts.flops, counts.saved_bytes))
    assert seen[0] == seen[1] == seen[2]


def test_more_concepts_take_more_steps_and_not_longer_ones():
    """500 steps for each; a step of four concepts computes what one of one concept does, but for their maps."""
    assert [TrainConfig().steps_for(k) for k in (1, 2, 4)] == [500, 1000, 2000]
    flops, kernels = [], []
    base = random_base(tiny_configs())
    for concepts in (1, 2, 4):
        with our_run(base, 128, work_config(2, device="cpu"), RandomPictures(128, 2, concepts)) as run:
            run.take_step()
            with counting() as counts:
                run.take_step()
        flops.append(counts.flops)
        kernels.append(counts.kernels)
    assert max(flops) < 1.01 * min(flops) and max(kernels) < 1.01 * min(kernels)


def test_a_run_is_linear_in_its_steps():
    with our_run(random_base(tiny_configs()), 128, work_config(2, device="cpu")) as run:
        run.take_step()
        flops = []
        for steps in (1, 2, 3):
            with counting() as counts:
                for _ in range(steps):
                    run.take_step()
            flops.append(counts.flops)
    assert flops[1] == 2 * flops[0] and flops[2] == 3 * flops[0]
