"""Memory-efficient layers compute the same, forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.counting import counting
from far_train.models.memory_efficient import MemoryEfficientLayers

CONTEXT = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))


def run(unet, context: torch.Tensor):
    """The prediction, its gradient to the text, and the bytes kept between."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = context.clone().requires_grad_()
    with counting((*unet.parameters(), *unet.buffers())) as counts:
        prediction = unet(latents, torch.tensor([10, 900]), context).sample
    prediction.square().sum().backward()
    return prediction.detach(), context.grad, counts.saved_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_results_and_less_kept(base, checkpointing: bool):
    plain = run(base.unet, CONTEXT)
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    names = [name for name, _ in base.unet.named_modules()]
    layers = MemoryEfficientLayers(base.unet)
    saving = run(base.unet, CONTEXT)
    assert torch.equal(plain[0], saving[0])
    assert torch.allclose(plain[1], saving[1], rtol=1e-4, atol=1e-6)
    assert saving[2] < 0.85 * plain[2]
    layers.remove()
    assert [name for name, _ in base.unet.named_modules()] == names
    base.unet.disable_gradient_checkpointing()
    assert run(base.unet, CONTEXT)[2] == plain[2]


def test_layers_that_learn_are_left_alone(base):
    conv = base.unet.down_blocks[0].resnets[0].conv1
    conv.requires_grad_(True)
    layers = MemoryEfficientLayers(base.unet)
    assert base.unet.down_blocks[0].resnets[0].conv1 is conv
    assert base.unet.down_blocks[0].resnets[0].conv2 is not conv
    run(base.unet, CONTEXT)
    assert conv.weight.grad.abs().sum() > 0
    layers.remove()
