"""Pictures and masks from any node: every shape in use, LoadImage's traps, and words that name photo and fix."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from .nodes_pack import pack_module

pictures = pack_module("nodes.pictures")
masks = pack_module("far_train.data.masks")
concepts = pack_module("far_train.data.concepts")
errors = pack_module("far_train.utils.errors")
SubjectError = errors.SubjectError


def disc(height: int = 60, width: int = 80, x: float = 0.5, y: float = 0.5, radius: float = 0.25) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((columns - x * width) ** 2 + (rows - y * height) ** 2 < (radius * min(height, width)) ** 2).float()


def image(height: int = 60, width: int = 80, channels: int = 3) -> torch.Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(height))


def test_images_of_mixed_sizes_batches_and_channels_become_single_pictures():
    singles = pictures.unroll_images([image()[None], torch.stack([image(32, 32)] * 2), image(20, 30)])
    assert [tuple(p.shape) for p in singles] == [(60, 80, 3), (32, 32, 3), (32, 32, 3), (20, 30, 3)]
    assert torch.equal(singles[0], image())
    grey, transparent = pictures.unroll_images([image(channels=1)[None], image(channels=4)[None]])
    assert torch.equal(grey, image(channels=1).expand(60, 80, 3))
    assert torch.equal(transparent, image(channels=4)[..., :3])


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(1, 4, 4, 2), "photo.png", None])
def test_what_is_no_image_is_refused(value):
    with pytest.raises(SubjectError, match="image 2: expected an IMAGE"):
        pictures.unroll_images([image()[None], value])


def test_masks_of_all_shapes_become_single_masks():
    mask = disc()
    shapes = [mask, mask[None], torch.stack([mask, mask]), mask[None, None], mask[None, ..., None], mask.half()]
    singles = pictures.unroll_masks(shapes)
    assert len(singles) == 7
    assert all(torch.equal(m, mask) for m in singles)


def test_mask_values_are_brought_into_range():
    (mask,) = pictures.unroll_masks([torch.tensor([[float("nan"), -3.0], [0.5, 7.0]])])
    assert mask.tolist() == [[0.0, 0.0], [0.5, 1.0]]


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(1, 2, 4, 4, 1), 1.0])
def test_what_is_no_mask_is_refused(value):
    with pytest.raises(SubjectError, match="mask 1: expected a MASK"):
        pictures.unroll_masks([value])


def test_masks_meet_their_photos():
    photos = [image(), image(32, 32)]
    found = pictures.match_masks(photos, [disc(), disc(32, 32)])
    assert torch.equal(found[0], disc()) and torch.equal(found[1], disc(32, 32))


def test_a_missing_mask_is_none_whatever_its_size():
    found = pictures.match_masks([image(), image()], [torch.zeros(64, 64), disc()])
    assert found[0] is None and found[1] is not None
    assert pictures.match_masks([image()], [torch.zeros(60, 80)], invert=True) == [None]


def test_a_mask_that_is_dark_all_over_is_not_taken_for_none():
    """A mask of the values 0 and 1 of 255 was meant; one opaque pixel less in a picture was not."""
    with pytest.raises(SubjectError, match="photo 1: its mask has only the values 0 and 1 of 255; save the subject"):
        pictures.match_masks([image()], [disc() / 255])
    speck = torch.zeros(60, 80)
    speck[30, 40] = 1 / 255
    assert pictures.match_masks([image()], [speck]) == [None]


def test_another_count_of_masks_is_refused():
    with pytest.raises(SubjectError, match="2 photos but 1 mask;"):
        pictures.match_masks([image(), image()], [disc()])


def test_a_mask_of_another_size_is_refused_by_number():
    with pytest.raises(SubjectError, match="photo 2: its mask is 60×80 pixels, but the photo 80×60"):
        pictures.match_masks([image(), image()], [disc(), disc(80, 60)])


def test_a_cut_outs_mask_from_load_image_is_recognised():
    """LoadImage sends 1 − alpha."""
    with pytest.raises(SubjectError, match="photo 1: .*switch invert_mask on"):
        pictures.match_masks([image()], [1 - disc()])
    (found,) = pictures.match_masks([image()], [1 - disc()], invert=True)
    assert torch.equal(found, disc())


def test_a_good_mask_must_not_be_inverted():
    with pytest.raises(SubjectError, match="garden: .*switch invert_mask off"):
        pictures.match_masks([image()], [disc()], invert=True, labels=["garden"])
    with pytest.raises(SubjectError, match="switch it off"):
        pictures.match_masks([image()], [torch.ones(60, 80)], invert=True)


@pytest.mark.parametrize("x, y", [(0.5, 0.5), (0.3, 0.3), (0.5, 0.95), (0.02, 0.5)])
def test_inverted_masks_are_told_from_subjects_at_any_place(x: float, y: float):
    subject = disc(x=x, y=y)
    assert masks.looks_inverted(1 - subject)
    assert not masks.looks_inverted(subject)


def test_subjects_that_fill_the_frame_are_not_taken_for_backgrounds():
    everything = torch.ones(60, 80)
    assert not masks.looks_inverted(everything)
    corner_free = everything.clone()
    corner_free[:25, :25] = 0
    assert not masks.looks_inverted(corner_free)
    speck = everything.clone()
    speck[30, 40] = 0
    assert not masks.looks_inverted(speck)


@pytest.mark.parametrize("share, doubted", [(1.0, True), (0.97, True), (0.94, False), (0.3, False)])
def test_a_mask_of_all_but_the_whole_picture_is_doubted(share: float, doubted: bool):
    mask = (torch.arange(100 * 100).reshape(100, 100) < share * 100 * 100).float()
    lines = pictures.doubts([image(100, 100)], [mask], ["photo 7"])
    words = "photo 7: the mask covers more than 95% of the picture; all of it counts as the subject"
    assert lines == ([words] if doubted else [])


def test_a_photo_that_is_a_mask_is_doubted():
    hard, grey = disc(), image(channels=1).expand(60, 80, 3)
    soft = torch.nn.functional.avg_pool2d(hard[None, None], 3, 1, 1)[0, 0]  # a rim of other values
    red = hard[..., None] * torch.tensor([0.9, 0.1, 0.1])  # two colours, and not of a mask
    masks = [hard, soft, torch.zeros(60, 80)]
    for mask in masks:
        assert pictures.looks_like_mask(mask[..., None].expand(-1, -1, 3))
    for photo in (grey, image(), red):
        assert not pictures.looks_like_mask(photo)
    shown = [m[..., None].expand(-1, -1, 3) for m in (*masks, hard)]
    assert pictures.doubts(shown, [None] * 4, ["a", "b", "c", "d"]) == [
        "a, b, c and 1 more: has only two gray values; is it a mask and not a photo?"
    ]


def test_labels_carry_names_only_if_there_is_one_for_each_photo():
    assert pictures.photo_labels(2, ["a", "b"]) == ["photo 1 (a)", "photo 2 (b)"]
    assert pictures.photo_labels(2, ["a"]) == ["photo 1", "photo 2"]


def test_photos_are_called_by_their_names_if_each_has_one():
    assert pictures.name_photos(2, ["garden", "park"]) == (["garden", "park"], [])
    assert pictures.name_photos(2, []) == (["photo 1", "photo 2"], [])
    warning = "got 2 photos but 1 name; connect images and names of one node"
    assert pictures.name_photos(2, ["garden"]) == (["photo 1", "photo 2"], [warning])


def test_nouns_are_tidied_but_not_guessed():
    assert pictures.tidy_noun("  Teddy  Bear ") == "teddy bear"
    with pytest.raises(errors.CaptionError, match="not a class noun"):
        pictures.tidy_noun("<dog>")


def test_subjects_travel_with_a_byte_per_pixel_of_their_masks():
    """The levels of an 8-bit file come back as they were."""
    image, soft = torch.rand(60, 80, 3), torch.arange(60 * 80).reshape(60, 80) % 256 / 255
    concept = concepts.Concept("<a>", "dog", (image, image), (soft, soft.half()))
    drawn = concepts.ClassPicture("dog", image, soft)
    held = [*concept.masks.stored, *vars(drawn)["_mask"].stored]
    assert [mask.untyped_storage().nbytes() for mask in held] == [60 * 80] * 3
    copies = dataclasses.replace(concept, noun="cat"), dataclasses.replace(drawn, noun="cat")
    for mask in (*concept.masks, drawn.mask, *copies[0].masks, copies[1].mask):
        assert mask.dtype == torch.float32 and torch.equal((mask * 255).round(), (soft * 255).round())
    assert len(concept.masks[1:]) == 1 and concepts.ClassPicture("dog", image).mask is None
