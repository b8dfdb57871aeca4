"""The loss: values computed by hand, gradients by finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from far_train.training import losses


def test_min_snr_weight_by_hand():
    alphas = torch.tensor([0.5, 0.9, 0.99])  # SNR 1, 9, 99
    epsilon = losses.min_snr_weight(alphas, "epsilon", 5.0)
    velocity = losses.min_snr_weight(alphas, "v_prediction", 5.0)
    assert torch.allclose(epsilon, torch.tensor([1.0, 5 / 9, 5 / 99]), rtol=1e-4)
    assert torch.allclose(velocity, torch.tensor([1 / 2, 5 / 10, 5 / 100]), rtol=1e-4)
    assert losses.min_snr_weight(alphas, "epsilon", None).tolist() == [1, 1, 1]


def test_subject_weight_grows_the_mask_by_one_cell():
    masks = torch.zeros(2, 2, 5, 5)
    masks[0, 1, 2, 2] = 1  # the second sample has no subject
    weight = losses.subject_weight(masks, 0.3)
    expected = torch.full((5, 5), 0.3)
    expected[1:4, 1:4] = 1
    assert torch.allclose(weight[0, 0], expected)
    assert torch.allclose(weight[1], torch.full((1, 5, 5), 0.3))


def test_subject_weight_without_mentions():
    assert torch.allclose(losses.subject_weight(torch.zeros(3, 0, 4, 4), 0.3), torch.full((3, 1, 4, 4), 0.3))


def test_output_preservation_learns_the_image_on_subjects_and_one_cell_around_them():
    target, base = torch.full((2, 4, 5, 5), 1.0), torch.full((2, 4, 5, 5), 7.0)
    masks = torch.zeros(2, 2, 5, 5)
    masks[0, 0, 1, 1] = 1.0  # grows over rows and columns 0 to 2
    masks[0, 1, 4, 4] = 0.01  # too little of a cell to be a subject
    mixed = losses.preserved_target(target, base, masks)
    learned = torch.zeros(5, 5, dtype=torch.bool)
    learned[:3, :3] = True
    assert (mixed[0, :, learned] == 1).all() and (mixed[0, :, ~learned] == 7).all()
    assert (mixed[1] == 7).all()  # an image without mentions
    assert torch.equal(losses.preserved_target(target, base, masks[:, :0]), base)


def test_denoising_loss_by_hand():
    prediction, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    # squared errors: cell 0: (1 + 9) / 2 = 5, cell 1: (4 + 0) / 2 = 2
    assert losses.denoising_loss(prediction, target).item() == pytest.approx(3.5)
    weight = torch.tensor([[[[1.0, 0.3]]]])
    assert losses.denoising_loss(prediction, target, weight).item() == pytest.approx((5 + 0.3 * 2) / 1.3)


def test_denoising_weights_are_normalised_per_sample():
    """A sample's loss doesn't depend on its neighbours in the batch: micro-batches must add up."""
    torch.manual_seed(0)
    prediction, target, weight = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6), torch.rand(3, 1, 6, 6)
    whole = losses.denoising_loss(prediction, target, weight)
    alone = [losses.denoising_loss(prediction[i : i + 1], target[i : i + 1], weight[i : i + 1]) for i in range(3)]
    assert torch.allclose(whole, torch.cat(alone))


@pytest.mark.parametrize("per_mention", [False, True])
def test_a_large_subject_weighs_no_more_than_a_small_one(per_mention):
    """In another image: the same error on all of it, on 3 × 3 cells as on 8 × 8, gives the same loss."""
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 4, 4] = masks[1, 0] = 1
    weight = losses.subject_weight(masks, 0.0, per_mention)
    assert weight.sum((1, 2, 3)).tolist() == [9, 64]
    prediction, target = 0.5 * weight, torch.zeros(2, 1, 8, 8)  # wrong by 0.5 on the subject alone
    assert losses.denoising_loss(prediction, target, weight).tolist() == [0.25, 0.25]
    attention = torch.full((2, 2, 8, 8), 0.5) * torch.tensor([0.8, 0.2])[:, None, None]
    rivals = torch.cat([masks, torch.zeros(2, 1, 8, 8)], 1)
    competition = losses.competition_loss(attention, rivals, torch.ones(2, 2, dtype=torch.bool), per_mention)
    assert torch.allclose(competition, torch.tensor(-math.log(0.8)).expand(2))


@pytest.mark.parametrize("per_mention", [False, True])
def test_masks_without_a_cell_stay_finite(per_mention):
    """Nothing to divide by: the loss and its gradient are 0, and what has no mask is not NaN."""
    masks, present = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, dtype=torch.bool)
    prediction = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    attention = torch.full((1, 2, 4, 4), 0.25, requires_grad=True)
    weight = losses.subject_weight(masks, 0.0, per_mention)
    loss = losses.denoising_loss(prediction, torch.zeros(1, 4, 4, 4), weight)
    loss = loss + losses.competition_loss(attention, masks, present, per_mention)
    loss.sum().backward()
    assert loss.tolist() == [0] and not prediction.grad.any() and not attention.grad.any()
    assert losses.localization_loss(attention, masks).tolist() == [[1, 1]]  # even attention, all of it outside


def test_localization_loss_by_hand():
    attention = torch.tensor([[[[0.2, 0.1], [0.05, 0.0]]]])  # A / max A = 1, .5, .25, 0
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert losses.localization_loss(attention, mask).item() == pytest.approx((0 + 0.25 + 0.0625 + 0) / 4)


def test_localization_loss_is_scale_free_and_wants_coverage():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    spread, peak = 0.3 * mask, torch.zeros(1, 1, 4, 4)
    peak[..., 0, 0] = 0.3  # all inside, but on one cell alone
    assert losses.localization_loss(spread, mask).item() == 0
    assert losses.localization_loss(spread * 0.01, mask).item() == pytest.approx(0, abs=1e-6)
    assert losses.localization_loss(peak, mask).item() == pytest.approx(7 / 16)


def test_competition_loss_by_hand():
    # Two cells, two mentions: cell 0 belongs to the first, cell 1 to the second.
    attention = torch.tensor([[[[0.3, 0.1]], [[0.1, 0.4]]]])
    masks = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    present = torch.tensor([[True, True]])
    expected = -(math.log(0.3 / 0.4) + math.log(0.4 / 0.5)) / 2
    assert losses.competition_loss(attention, masks, present).item() == pytest.approx(expected, rel=1e-5)


def test_per_mention_every_subject_counts_alike():
    # On 8 × 8 cells one subject in a corner, which grows to 2 × 2 cells, one inside, which grows to 4 × 4, and padding.
    masks = torch.zeros(1, 3, 8, 8)
    masks[0, 0, 0, 0] = 1
    masks[0, 1, 4:6, 4:6] = 1
    by_cell, by_mention = (losses.subject_weight(masks, 0.25, each)[0, 0] - 0.25 for each in (False, True))
    corner, inside = (slice(0, 2),) * 2, (slice(3, 7),) * 2
    assert (by_cell[corner].sum(), by_cell[inside].sum()) == (0.75 * 4, 0.75 * 16)
    assert (by_mention[corner].sum(), by_mention[inside].sum()) == (0.75 * 10, 0.75 * 10)  # together as much as before
    assert by_mention.sum() == by_cell.sum() == 0.75 * 20
    alone = masks[:, 1:2]
    assert torch.equal(losses.subject_weight(alone, 0.25, True), losses.subject_weight(alone, 0.25))
    assert torch.equal(losses.subject_weight(masks[:, :0], 0.25, True), torch.full((1, 1, 8, 8), 0.25))

    # The first has one cell with a share of 0.8, the second three with 0.5.
    attention = torch.tensor([[[[0.8, 0.5, 0.5, 0.5]], [[0.2, 0.5, 0.5, 0.5]]]])
    masks = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 1.0]]]])
    present = torch.tensor([[True, True]])
    by_cell, by_mention = (losses.competition_loss(attention, masks, present, each).item() for each in (False, True))
    assert by_cell == pytest.approx(-(math.log(0.8) + 3 * math.log(0.5)) / 4, rel=1e-5)
    assert by_mention == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2, rel=1e-5)


def test_the_peak_of_a_map_is_detached():
    """A map can't fit its mask by lowering its peak: scaled as a whole, its loss stays, and so does each gradient's sum
    that a moving peak would cancel."""
    attention = torch.tensor([[[[0.4, 0.1]]]], requires_grad=True)
    losses.localization_loss(attention, torch.tensor([[[[0.0, 1.0]]]])).sum().backward()
    # d/dA of mean (M − A / peak)², peak = 0.4 fixed: for the peak itself (1 − 0) / 0.4, for the other (0.25 − 1) / 0.4.
    assert torch.allclose(attention.grad, torch.tensor([[[[2.5, -1.875]]]]))


def test_competition_needs_a_rival():
    attention, masks = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    alone = losses.competition_loss(attention, masks, torch.tensor([[True, False]]))
    assert alone.item() == pytest.approx(0, abs=1e-6)


WEIGHTS = {"noun_weight": 0.5, "competition_weight": 0.1}


def _inputs(dtype=torch.float32, seed=0):
    """Three samples: two concepts, a concept beside a class subject, a class picture without mentions."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand(3, 2, 4, 5, generator=generator, dtype=dtype) * 0.1 + 0.01 for _ in range(2)]
    masks = (torch.rand(3, 2, 4, 5, generator=generator) > 0.5).to(dtype)
    is_concept = torch.tensor([[True, True], [True, False], [False, False]])
    is_mention = torch.tensor([[True, True], [True, True], [False, False]])
    return maps[0], maps[1], masks * is_mention[..., None, None], is_concept, is_mention


def test_refinement_loss_composition():
    """The whole equals its parts, put together by hand for each sample."""
    token_maps, noun_maps, masks, is_concept, is_mention = _inputs()
    loss = losses.refinement_loss(token_maps, noun_maps, masks, is_concept, is_mention, **WEIGHTS)

    def place(maps, i, k):
        return losses.localization_loss(maps[i : i + 1, k : k + 1], masks[i : i + 1, k : k + 1]).item()

    def compete(maps, i, count):
        rows = torch.ones(1, count, dtype=torch.bool)
        return losses.competition_loss(maps[i : i + 1, :count], masks[i : i + 1, :count], rows).item()

    pair = sum(place(token_maps, 0, k) + 0.5 * place(noun_maps, 0, k) for k in (0, 1)) / 2
    pair += 0.1 * (compete(noun_maps, 0, 2) + compete(token_maps, 0, 2))
    beside = (place(token_maps, 1, 0) + 0.5 * place(noun_maps, 1, 0) + 0.5 * place(noun_maps, 1, 1)) / 2
    beside += 0.1 * compete(noun_maps, 1, 2)
    assert torch.allclose(loss, torch.tensor([pair, beside, 0.0]), atol=1e-6)


def test_refinement_without_localization_keeps_the_competition():
    token_maps, noun_maps, masks, is_concept, is_mention = _inputs()
    loss = losses.refinement_loss(token_maps, noun_maps, masks, is_concept, is_mention, localization="none", **WEIGHTS)
    expected = losses.competition_loss(noun_maps, masks, is_mention)
    expected += losses.competition_loss(token_maps, masks, is_concept)
    assert torch.allclose(loss, 0.1 * expected)


def test_padding_and_class_pictures_get_no_gradient():
    token_maps, noun_maps, masks, is_concept, is_mention = _inputs()
    token_maps.requires_grad_()
    noun_maps.requires_grad_()
    losses.refinement_loss(token_maps, noun_maps, masks, is_concept, is_mention, **WEIGHTS).sum().backward()
    for gradient in (token_maps.grad, noun_maps.grad):
        assert torch.isfinite(gradient).all()
        assert not gradient[2].any()
    assert not token_maps.grad[1, 1].any() and token_maps.grad[1, 0].any()
    assert noun_maps.grad[1, 1].any()


def test_silent_maps_stay_finite():
    """A token without any attention (underflow) must not make the loss NaN."""
    zeros = torch.zeros(1, 2, 4, 4, requires_grad=True)
    masks = torch.ones(1, 2, 4, 4)
    both = torch.ones(1, 2, dtype=torch.bool)
    loss = losses.refinement_loss(zeros, zeros, masks, both, both, **WEIGHTS)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(zeros.grad).all()


def test_gradient_by_finite_differences(monkeypatch):
    """Autograd against central differences in float64, with the detached maximum held fixed."""
    token_maps, noun_maps, masks, is_concept, is_mention = _inputs(torch.float64)
    peaks = [m.amax((-2, -1), keepdim=True).clone() for m in (token_maps, noun_maps)]
    token_maps.requires_grad_()
    noun_maps.requires_grad_()

    def loss_with_fixed_peaks(tokens, nouns):
        order = iter(peaks)

        def localization(attention, region):
            return (region - attention / next(order)).square().mean((-2, -1))

        monkeypatch.setattr(losses, "localization_loss", localization)
        value = losses.refinement_loss(tokens, nouns, masks, is_concept, is_mention, **WEIGHTS).sum()
        monkeypatch.undo()
        return value

    losses.refinement_loss(token_maps, noun_maps, masks, is_concept, is_mention, **WEIGHTS).sum().backward()
    step = 1e-6
    worst = 0.0
    for which, maps in enumerate((token_maps, noun_maps)):
        for place in range(0, maps.numel(), 3):
            values = []
            for sign in (1, -1):
                moved = [token_maps.detach().clone(), noun_maps.detach().clone()]
                moved[which].view(-1)[place] += sign * step
                values.append(loss_with_fixed_peaks(*moved).item())
            numeric = (values[0] - values[1]) / (2 * step)
            worst = max(worst, abs(numeric - maps.grad.view(-1)[place].item()))
    assert worst < 1e-7


def test_refinement_rises_over_the_first_steps():
    assert [losses.refinement_ramp(step, 100, 0.1) for step in (0, 4, 9, 99)] == [0.1, 0.5, 1, 1]
    assert losses.refinement_ramp(0, 100, 0.0) == 1


def test_refinement_weighs_less_at_high_noise():
    assert losses.refinement_timestep_weight(torch.tensor([0.25, 1.0])).tolist() == [0.5, 1]
