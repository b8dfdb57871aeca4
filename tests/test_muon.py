"""The small trainings' optimizer, and the windows that the autoencoder learns from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.small_models.autoencoder import crop_to_sprites
from benchmarks.small_models.muon import UPDATE_RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_orthogonal_brings_singular_values_near_one_and_keeps_their_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    _, found = orthogonal(torch.stack([torch.zeros(shape), matrix])).float()  # one matrix leaves the next as it is
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.3
    aligned = (u.T @ found @ vh.T).diagonal()
    assert float(aligned.min()) > 0.4


def test_kernels_of_one_shape_step_as_each_would_alone():
    shapes = [(8, 4, 3, 3), (8, 36), (6, 5), (8, 4, 3, 3)]  # the first two and the last are matrices of one shape
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]

    def stepped(group: list[int]) -> list[torch.Tensor]:
        kernels = [nn.Parameter(first[i].clone()) for i in group]
        optimizer = Muon(kernels, [nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            for kernel, i in zip(kernels, group):
                kernel.grad = gradients[i]
            optimizer.step()
        return [k.detach() for k in kernels]

    alone = [stepped([i])[0] for i in range(len(shapes))]
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(stepped([0, 1, 2, 3]), alone))  # bf16 products


def test_the_first_step_is_as_large_as_adamws_and_goes_downhill():
    kernel = nn.Parameter(torch.zeros(8, 4, 3, 3))
    bias = nn.Parameter(torch.zeros(8))
    optimizer = Muon([kernel], [bias], lr=1e-2, weight_decay=0.0)
    gradient = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    kernel.grad, bias.grad = gradient.clone(), torch.ones(8)
    optimizer.step()
    rms = float(kernel.detach().square().mean().sqrt())
    assert rms == pytest.approx(1e-2 * UPDATE_RMS, rel=0.25)
    assert float((kernel.detach() * gradient).sum()) < 0
    assert torch.allclose(bias.detach(), torch.full((8,), -1e-2), atol=1e-6)  # AdamW's first step is the rate itself


def test_only_kernels_decay_and_all_rates_can_be_set_at_once():
    kernel, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = Muon([kernel], [other], lr=1.0, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    kernel.grad, other.grad = torch.zeros(4, 4), torch.zeros(4)
    optimizer.step()
    assert torch.allclose(kernel.detach(), torch.full((4, 4), 0.95)) and torch.equal(other.detach(), torch.ones(4))


def test_parameters_without_a_gradient_stay():
    kernel, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = Muon([kernel], [other], lr=1.0, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(kernel.detach(), torch.ones(4, 4)) and torch.equal(other.detach(), torch.ones(4))


def test_most_windows_hold_a_part_of_a_sprite():
    pictures = torch.arange(64 * 64).float().view(1, 1, 64, 64).expand(200, 3, 64, 64)
    labels = torch.zeros(200, 64, 64, dtype=torch.uint8)
    labels[:, 60:, :4] = 1  # in a corner, where few random windows would reach
    windows = crop_to_sprites(pictures, labels, 16, torch.Generator().manual_seed(0))
    assert windows.shape == (200, 3, 16, 16)
    sprite = (windows[:, 0] >= 60 * 64) & (windows[:, 0] % 64 < 4)
    assert 0.7 < float(sprite.flatten(1).any(1).float().mean()) < 0.95
    assert torch.equal(windows[0, 0, 0, 1:] - windows[0, 0, 0, :-1], torch.ones(15))  # whole pieces, nothing scaled
