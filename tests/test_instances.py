"""Of several masks of one photo, the one that a box, points, a number or its size point at."""

from __future__ import annotations

import pytest
import torch

from far_train.data.instances import choose_instance
from far_train.data.subjects import Prompt
from far_train.utils.errors import SubjectError


def rectangle(left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    mask = torch.zeros(40, 60)
    mask[top:bottom, left:right] = 1
    return mask


SMALL, LARGE, OTHER = rectangle(2, 2, 12, 12), rectangle(20, 5, 50, 35), rectangle(52, 30, 58, 38)
MASKS = [SMALL, LARGE, OTHER]


def test_without_a_prompt_the_largest_is_taken():
    assert choose_instance(MASKS) == 1
    assert choose_instance([OTHER, SMALL, torch.zeros(40, 60)]) == 1


def test_of_equals_the_first_is_taken():
    assert choose_instance([rectangle(30, 5, 40, 15), rectangle(0, 0, 10, 10)]) == 0


@pytest.mark.parametrize("box, chosen", [((0, 0, 15, 15), 0), ((18, 3, 52, 38), 1), ((50, 28, 60, 40), 2)])
def test_a_box_chooses_what_fills_it_best(box, chosen: int):
    assert choose_instance(MASKS, Prompt(box)) == chosen


def test_a_box_within_the_union_of_all_masks_is_not_given_to_the_union():
    """A mask of all subjects overlaps any box with most pixels, but reaches far beyond it."""
    union = torch.stack(MASKS).amax(0)
    assert choose_instance([union, SMALL], Prompt((0, 0, 15, 15))) == 1


def test_a_box_that_is_thinner_than_a_pixel_still_points_somewhere():
    assert choose_instance(MASKS, Prompt((5.1, 5.1, 5.3, 5.3))) == 0


def test_points_choose_and_points_on_the_background_exclude():
    assert choose_instance(MASKS, Prompt(points=((5, 5, 1),))) == 0
    nested = [LARGE, rectangle(20, 5, 30, 15)]
    assert choose_instance(nested, Prompt(points=((25, 10, 1),))) == 0  # both hold it: the whole and not a part
    assert choose_instance(nested, Prompt(points=((25, 10, 1), (45, 30, 0)))) == 1
    two = [rectangle(0, 0, 10, 10), rectangle(5, 0, 20, 5)]
    assert choose_instance(two, Prompt(points=((7, 2, 1), (15, 2, 1)))) == 1


def test_points_go_before_the_overlap_with_the_box():
    box = (20, 5, 50, 35)
    part = rectangle(20, 5, 30, 15)
    assert choose_instance([LARGE, part], Prompt(box)) == 0
    assert choose_instance([LARGE, part], Prompt(box, ((45, 30, 0),))) == 1


def test_a_point_on_the_far_edge_belongs_to_the_last_pixel():
    corner = rectangle(50, 30, 60, 40)
    assert choose_instance([LARGE, corner], Prompt(points=((60, 40, 1),))) == 1


def test_a_number_counts_from_one_and_goes_before_the_prompt():
    assert [choose_instance(MASKS, Prompt((0, 0, 15, 15)), index) for index in (1, 2, 3)] == [0, 1, 2]
    for index in (4, -1):
        with pytest.raises(SubjectError, match=f"index: there is no mask {index} of 3"):
            choose_instance(MASKS, index=index)


@pytest.mark.parametrize("prompt", [Prompt((13, 13, 19, 40)), Prompt(points=((15, 20, 1),))])
def test_a_prompt_that_lies_on_no_mask_is_refused(prompt: Prompt):
    with pytest.raises(SubjectError, match="no mask that agrees with its box and points among 3"):
        choose_instance(MASKS, prompt)


def test_empty_masks_and_prompts_outside_are_refused():
    with pytest.raises(SubjectError, match="has no mask among 1"):
        choose_instance([torch.zeros(40, 60)])
    with pytest.raises(SubjectError, match="outside the photo, which is 60x40"):
        choose_instance(MASKS, Prompt((0, 0, 61, 10)))
