"""Copies of photos and stiff poses are found, true new pictures are neither; KID by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.groups import dev_groups, test_groups
from benchmarks.quality.overfitting import cut_out, kernel_distance, overfitting_figures, subject_rulers
from benchmarks.quality.run import concepts
from far_train.mini.oracle import picture_features, read_pictures
from far_train.mini.shipped import SIZE, small_oracle
from far_train.mini.world import render_scene

PAIR = dev_groups()[1]
SEED = 93_000  # other pictures than the rulers have seen


def test_kernel_distance_by_hand():
    zeros_and_ones, twos = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    # (0·1 + 1)³ inside the first, (2·2 + 1)³ inside the second, (1 + 27) / 2 across.
    assert kernel_distance(zeros_and_ones, twos) == pytest.approx(1 + 125 - 2 * 14)
    assert kernel_distance(zeros_and_ones, torch.zeros(2, 1)) == pytest.approx(0)


def test_a_cut_out_does_not_depend_on_where_its_subject_stands():
    image, mask = torch.full((64, 64, 3), 0.5), torch.zeros(64, 64)
    image[10:26, 10:34], mask[10:26, 10:34] = torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0)), 1
    here, there = cut_out(image, mask), cut_out(image.roll((20, 25), (0, 1)), mask.roll((20, 25), (0, 1)))
    assert torch.allclose(here, there, atol=1e-6) and float(here.norm()) == pytest.approx(1)
    assert float(here @ cut_out(image.flip(1), mask.flip(1))) < 0.9
    assert not cut_out(image, torch.zeros(64, 64)).any()


@pytest.fixture(scope="module")
def oracle():
    return small_oracle()


@pytest.fixture(scope="module")
def rulers(oracle):
    return subject_rulers(PAIR.identities, concepts(PAIR), oracle, SIZE)


def test_true_new_pictures_are_neither_copies_nor_stiff(oracle, rulers):
    pictures = torch.stack([render_scene(SEED, k, SIZE, identities=PAIR.identities).image for k in range(40)])
    figures = overfitting_figures(rulers, PAIR.identities, pictures, read_pictures(oracle, pictures))
    assert figures["copied"] < 0.2 and figures["pose_spread"] > 0.8


def test_five_at_once_have_rulers_too(oracle):
    five = test_groups()[-1]
    assert len(subject_rulers(five.identities, concepts(five), oracle, SIZE)) == 5


def test_photos_are_copies_and_stiff(oracle, rulers):
    photos = torch.stack([image for c in concepts(PAIR) for image in c.images])
    figures = overfitting_figures(rulers, PAIR.identities, photos, read_pictures(oracle, photos))
    assert figures["copied"] > 0.8
    same = photos[:1].expand(8, -1, -1, -1)
    assert overfitting_figures(rulers, PAIR.identities, same, read_pictures(oracle, same))["pose_spread"] == 0


def test_features_tell_places_apart_and_not_seeds(oracle):
    def drawn(first: int, place: str) -> torch.Tensor:
        scenes = [render_scene(SEED, first + k, SIZE, background=place).image for k in range(16)]
        return picture_features(oracle, torch.stack(scenes))

    beach = drawn(0, "beach")
    assert kernel_distance(beach, drawn(100, "moon")) > 10 * abs(kernel_distance(beach, drawn(200, "beach")))
