"""Any number of masks per photo, as detectors send them: whose they are, which is taken, and what it costs."""

from __future__ import annotations

import pytest
import torch

from .nodes_pack import pack_module

instances = pack_module("nodes.instances")
pictures = pack_module("nodes.pictures")
Prompt = pack_module("far_train.data.subjects").Prompt
SubjectError = pack_module("far_train.utils.errors").SubjectError


def square(place: int, side: int = 8) -> torch.Tensor:
    """A mask [40,60] of a square whose left upper corner is at (place, place)."""
    mask = torch.zeros(40, 60)
    mask[place : place + side, place : place + side] = 1
    return mask


A, B, C = square(2), square(12, 10), square(25)
NONE = torch.zeros(40, 60)
PHOTO = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(0))


def same(groups, expected) -> bool:
    return [len(g) for g in groups] == [len(e) for e in expected] and all(
        torch.equal(x, y) for g, e in zip(groups, expected) for x, y in zip(g, e)
    )


def test_all_masks_belong_to_a_single_photo():
    assert same(instances.group_masks([1], [torch.stack([A, B, C])]), [[A, B, C]])
    assert same(instances.group_masks([1], [A, torch.stack([B, C])]), [[A, B, C]])
    assert same(instances.group_masks([1], [torch.zeros(0, 40, 60)]), [[]])


def test_a_list_tells_whose_they_are():
    """A detector after a list of photos: two in the first, none in the second, one in the third: three in all."""
    sent = [torch.stack([A, B]), torch.zeros(0, 40, 60), C[None]]
    assert same(instances.group_masks([1, 1, 1], sent), [[A, B], [], [C]])
    assert same(instances.group_masks([3], sent), [[A, B], [], [C]])


def test_as_many_as_photos_are_one_each():
    for batches, sent in (([3], [torch.stack([A, B, C])]), ([1, 1, 1], [torch.stack([A, B, C])]), ([3], [A, B, C])):
        assert same(instances.group_masks(batches, sent), [[A], [B], [C]])
    assert same(instances.group_masks([2, 1], [torch.stack([A, B]), C]), [[A], [B], [C]])


@pytest.mark.parametrize("boxes, expected", [([2, 0, 1], [[A, B], [], [C]]), ([0, 3, 0], [[], [A, B, C], []])])
def test_a_batch_is_split_by_the_detectors_boxes(boxes, expected):
    """SAM3 Detect joins the masks of all photos into one batch, here by chance as many as photos."""
    assert same(instances.group_masks([3], [torch.stack([A, B, C])], boxes), expected)


def test_a_joined_mask_per_photo_is_not_split_by_boxes():
    """Without individual masks there is one for each photo, empty where nothing was found."""
    joined = torch.stack([A + C, NONE])
    assert same(instances.group_masks([2], [joined], [2, 0]), [[A + C], [NONE]])


def test_five_masks_of_two_photos_need_boxes():
    sent = [torch.stack([A, B, C, A, B])]
    assert same(instances.group_masks([2], sent, [2, 3]), [[A, B], [C, A, B]])
    for boxes in ([], [1, 3], [5]):
        with pytest.raises(SubjectError, match="masks: got 2 photos but 5 masks; .*connect the detector's bboxes"):
            instances.group_masks([2], sent, boxes)


def test_nothing_is_copied_before_one_is_chosen():
    """Eight masks of a photo share the detector's memory; the chosen one alone is converted."""
    sent = torch.stack([square(i * 4) for i in range(8)])
    (group,) = instances.group_masks([1], [sent])
    assert {mask.untyped_storage().data_ptr() for mask in group} == {sent.untyped_storage().data_ptr()}
    (own,) = instances.own_masks([PHOTO], [group], [Prompt()], 3, ["p"], True)
    assert torch.equal(own, sent[2])
    assert own.untyped_storage().nbytes() == 40 * 60 * 4  # before: 8 * 40 * 60 * 4, a copy of each


def choose(group, prompt=None, index=0, fallback=True):
    (found,) = instances.own_masks([PHOTO], [group], [prompt or Prompt()], index, ["photo 1"], fallback)
    return found


def test_box_points_number_or_size_choose():
    group = [A, NONE, B, C]
    assert torch.equal(choose(group), B)
    assert torch.equal(choose(group, Prompt((0, 0, 12, 12))), A)
    assert torch.equal(choose(group, Prompt(points=((28, 28, 1),))), C)
    assert torch.equal(choose(group, Prompt((0, 0, 12, 12)), index=4), C)
    assert torch.equal(choose([A.half() * 2, B]), B)


def test_a_single_mask_is_kept_whatever_box_there_is_for_sam():
    assert torch.equal(choose([A], Prompt((30, 10, 50, 30))), A)


def test_what_cannot_be_chosen_says_why():
    assert "photo 1: has no mask that agrees" in str(choose([A, B], Prompt((40, 5, 50, 10))))
    assert "photo 1: index: there is no mask 3 of 2" in str(choose([A, B], index=3))
    assert "photo 1: index: there is no mask 1 of 0" in str(choose([], index=1))
    assert "photo 1: index: mask 2 is empty" in str(choose([A, NONE], index=2))


def test_a_photo_without_masks_may_have_its_subject_found_otherwise():
    assert choose([]) is None and choose([NONE]) is None and choose([NONE, NONE]) is None
    assert choose([NONE], index=1) is None and choose([NONE], index=2) is None
    assert "photo 1: has no mask" in str(choose([], fallback=False))
    assert "photo 1: index: mask 1 is empty" in str(choose([NONE], index=1, fallback=False))


def test_a_mask_of_another_size_is_refused_for_the_whole_node():
    with pytest.raises(SubjectError, match="photo 1: its mask is 20×10 pixels, but the photo 60×40"):
        choose([A, torch.ones(10, 20)])
