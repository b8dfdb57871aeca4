"""Backgrounds and crops: the subject is kept or painted over, the rest stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage

from far_train.data.backgrounds import cover, infill
from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.images import from_pil, mask_to_pil, to_pil
from far_train.data.settings import FusionConfig

from .coloured import COLOURS, SCENES, SIZE, centre, fuse, only, photo, region, shows


def test_original_photos_keep_the_subject_whole_where_it_fits():
    image, mask = photo("red", 50, 150, (0.75, 0.1, 0.98, 0.9))
    fused = ConceptFusion([Concept("<red>", "ball", (image,), (mask,))], (), (), FusionConfig(**only("original")))
    whole = mask.sum().item() / 50**2
    shares, places = [], set()
    for i in range(12):
        (mention,) = fused.composite(i).mentions
        shares.append(mention.mask.mean().item())
        places.add(round(centre(region(mention))[0], 2))
    assert shares == pytest.approx([whole] * 12, rel=0.02) and len(places) > 4


def test_a_subject_wider_than_the_crop_is_still_shown():
    """Two dogs at the ends of a panorama: its middle would be empty."""
    image, mask = photo("red", 50, 200, (0.0, 0.1, 0.2, 0.9))
    other = mask.flip(1)
    both = (mask + 0.3 * other).clamp(0, 1)
    both[:, -20:] = torch.maximum(both[:, -20:], other[:, -20:])
    rng = np.random.default_rng(0)
    _, cropped = cover(to_pil(image), mask_to_pil(both), SIZE, rng)
    assert np.asarray(cropped).mean() / 255 == pytest.approx(mask.sum().item() / 50**2, rel=0.05)


def test_in_filled_photos_lose_their_subject():
    image, mask = photo("red", 96, 160, (0.3, 0.2, 0.7, 1.0))
    filled = from_pil(infill(to_pil(image), mask_to_pil(mask), SIZE))
    assert filled.shape == (SIZE, round(SIZE * 160 / 96), 3)  # the short side covers the canvas
    assert not shows(filled, "red").any()
    assert (filled - 0.5).abs().max() < 0.45 and (filled - 0.5).abs().mean() < 0.1
    small = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], filled.shape[:2], mode="area")[0]
    rest = torch.nn.functional.interpolate(mask[None, None], filled.shape[:2], mode="area")[0, 0] == 0
    rest &= torch.nn.functional.max_pool2d((~rest).float()[None], 7, 1, 3)[0] == 0
    assert (filled - small.permute(1, 2, 0)).abs()[rest].mean() < 0.03  # the scene itself stays


def test_the_soft_rim_of_a_mask_is_filled_in_as_well():
    image, mask = photo("red", 96, 96)
    halo = ndimage.binary_dilation(mask.numpy() > 0, iterations=8)
    image[torch.from_numpy(halo)] = torch.tensor(COLOURS["red"])
    soft = torch.where(torch.from_numpy(halo), mask.clamp(min=0.2), mask)
    assert not shows(from_pil(infill(to_pil(image), mask_to_pil(soft), 96)), "red").any()


def test_a_photo_that_is_all_subject_fills_in_grey():
    filled = infill(to_pil(torch.ones(40, 40, 3)), mask_to_pil(torch.ones(40, 40)), SIZE)
    assert np.unique(np.asarray(filled)).tolist() == [128]


def test_plain_backgrounds_name_their_colour():
    fused = fuse(1, (), **only("solo", "plain"))
    captions = [fused.composite(i).caption for i in range(60)]
    plain = [c for c in captions if ", on a plain " in c]
    gradient = [c for c in captions if c.endswith(", on a gradient background")]
    assert len(plain) + len(gradient) == 60 and min(len(plain), len(gradient)) > 15
    white = next(i for i, c in enumerate(captions) if "plain white" in c)
    assert fused.composite(white).image.median() > 0.85


def test_a_scene_brings_its_words():
    fused = fuse(1, (), SCENES, **only("solo", "scene"))
    words = Counter()
    for i in range(40):
        composite = fused.composite(i)
        is_garden = shows(composite.image, "cyan").any()
        assert composite.caption.endswith(", in a garden") == is_garden
        words[bool(is_garden)] += 1
    assert min(words.values()) > 8
