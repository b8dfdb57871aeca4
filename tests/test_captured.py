"""A training step as one CUDA graph computes what the eager one computes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.small_models.captured import WARM_UP, CapturedStep
from benchmarks.small_models.learning import LearnConfig, _descend, _optimizer

RATES = [1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 5e-4]
STAYS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_a_captured_step_computes_what_the_eager_one_does():
    device, dtype = torch.device("cuda"), torch.float32
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(device)

    def trained(captured: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
        parameters = dict(module.named_parameters())
        average = {k: nn.Parameter(p.detach().clone(), requires_grad=False) for k, p in parameters.items()}
        optimizer = _optimizer(module, parameters, LearnConfig(), capturable=True)

        def loss_of():
            error = (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            return error, {"error": error}

        take = partial(_descend, parameters, average, optimizer, 1.0, device, dtype, loss_of)
        step = CapturedStep(take, optimizer, device) if captured else None
        losses = []
        for rate, stay in zip(RATES, STAYS):
            if step is None:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                figures = take(stay)
            else:
                figures = step(rate, stay)
            losses.append(figures["loss"])
        return [float(x) for x in losses], [*parameters.values(), *average.values()]

    assert len(RATES) > WARM_UP + 1
    (eager, weights), (replayed, others) = trained(False), trained(True)
    assert replayed == pytest.approx(eager, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(weights, others))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_each_replay_draws_anew_and_reads_what_has_grown():
    device = torch.device("cuda")
    ready = torch.ones((), dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1, device=device))], capturable=True)

    def take(stay: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"drawn": torch.rand((), device=device), "ready": ready * 1}

    step, figures = CapturedStep(take, optimizer, device), []
    for number in range(WARM_UP + 4):
        ready.fill_(number)
        figures.append(step(1e-3, 0.5))
    assert len({float(f["drawn"]) for f in figures}) == len(figures)
    assert [int(f["ready"]) for f in figures] == list(range(len(figures)))


@pytest.mark.parametrize("stay", [0.25, torch.tensor(0.25)])
def test_a_step_moves_weights_and_their_average(stay):
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    parameters = dict(module.named_parameters())
    average = {"weight": nn.Parameter(torch.zeros(1, 2), requires_grad=False)}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    figures = _descend(
        parameters, average, optimizer, 0.1, torch.device("cpu"), torch.float32, lambda: (module.weight.sum(), {}), stay
    )
    # The gradient (1, 1) of norm √2 is cut to 0.1, so each weight falls by 0.5 · 0.1 / √2.
    weight = 1 - 0.05 / 2**0.5
    assert torch.allclose(module.weight, torch.full((1, 2), weight))
    assert torch.allclose(average["weight"], torch.full((1, 2), 0.75 * weight))
    assert float(figures["loss"]) == 2.0 and float(figures["grad_norm"]) == pytest.approx(2**0.5)
