"""Where subjects stand in composites, how large, and whether their masks lie on them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.images import mask_to_pil
from far_train.data.placement import Cutout, Placement, paste, place
from far_train.data.settings import LAYOUTS, FusionConfig

from .coloured import COLOURS, NO_CHANGES, centre, colour_of, fuse, mention_box, only, photo, region, shows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mask_lies_on_its_own_subject(layout):
    fused = fuse(3, size=128, **only(layout))
    for i in range(25):
        composite = fused.composite(i)
        for mention in composite.mentions:
            mask, seen = region(mention), shows(composite.image, colour_of(mention.name))
            assert (mask & seen).sum() / (mask | seen).sum() > 0.75, (i, mention.name)
            core = ndimage.binary_erosion(mask, iterations=3)
            assert seen[core].mean() > 0.99, (i, mention.name)  # the 3 px towards the rim are soft
        for colour in COLOURS.keys() - {colour_of(m.name) for m in composite.mentions}:
            assert not shows(composite.image, colour).any(), "an in-filled background still shows its subject"


@pytest.mark.parametrize("layout", ["pair", "triple", "beside_prior"])
@pytest.mark.parametrize("margin", [1 / 64, 0.1])
def test_subjects_keep_their_distance(layout, margin):
    """At a tenth of the canvas random places hardly ever fit, so the columns are tested as well."""
    fused = fuse(3, size=128, margin=margin, **only(layout, row_probability=0, occlusion=0, erode=0))
    for i in range(25):
        grown = [ndimage.maximum_filter(region(m), 2 * round(margin * 128) + 1) for m in fused.composite(i).mentions]
        for a, b in itertools.combinations(grown, 2):
            assert not (a & b).any(), i


def test_nothing_is_cut_off_by_the_canvas():
    fused = fuse(3, size=128, **only("triple", flip=0, occlusion=0, **NO_CHANGES))
    for i in range(25):
        for mention in fused.composite(i).mentions:
            box = mention_box(mention)
            filled = region(mention).sum() / (box[0] * box[1])
            assert filled == pytest.approx(np.pi / 4, rel=0.08)  # the share of its box that a whole ellipse fills


@pytest.mark.parametrize("count", [2, 3])
def test_an_occlusion_hides_some_but_little(count):
    size, rng = 128, np.random.default_rng(0)
    mask = mask_to_pil(photo("red", 60, 60)[1])
    cutouts = [Cutout(mask.convert("RGB"), mask.resize((w, 60))) for w in (40, 50, 60)[:count]]
    smallest = min(c.region.sum() for c in cutouts)
    tries = 60
    hidden = []
    for _ in range(tries):
        layers = np.zeros((size + 200, size + 200), int)
        placed = place(cutouts, size, 2, 0.15, rng)
        for item in placed:
            height, width = item.cutout.region.shape
            layers[item.y + 100 : item.y + 100 + height, item.x + 100 : item.x + 100 + width] += item.cutout.region
        assert sorted(p.z for p in placed) == list(range(count))
        hidden.append((layers - (layers > 0)).sum())
    assert max(hidden) <= 0.15 * max(c.region.sum() for c in cutouts) and np.mean(np.array(hidden) > 0) > 0.9
    if count == 2:
        assert max(hidden) <= 0.15 * smallest


def test_occluded_masks_are_trimmed_to_what_is_seen():
    fused = fuse(2, size=128, **only("pair", row_probability=0, occlusion=1, max_covered=0.5, **NO_CHANGES))
    trimmed = 0
    for i in range(25):
        composite = fused.composite(i)
        assert sum(m.mask for m in composite.mentions).max() <= 1.001
        for mention in composite.mentions:
            assert shows(composite.image, colour_of(mention.name))[region(mention)].mean() > 0.9
            box = mention_box(mention)
            trimmed += region(mention).sum() / (box[0] * box[1]) < 0.7
    assert trimmed > 10


@pytest.mark.parametrize("row", [0, 1])
def test_place_does_not_follow_the_order_of_mention(row):
    fused, draws = fuse(2, **only("pair", row_probability=row)), 400
    left = first = red_left = 0
    for i in range(draws):
        composite = fused.composite(i)
        one, two = composite.mentions
        is_left = centre(region(one))[0] < centre(region(two))[0]
        is_red = one.name.token == "<red>"
        left, first, red_left = left + is_left, first + is_red, red_left + (is_left == is_red)
        assert composite.caption.index(one.name.token) < composite.caption.index(two.name.token)
    for share in (left / draws, first / draws, red_left / draws):
        assert share == pytest.approx(0.5, abs=0.08)  # 3 σ


def test_the_class_subject_is_mentioned_first_as_often_as_last():
    fused = fuse(1, **only("beside_prior"))
    first = sum(fused.composite(i).mentions[0].name.token is None for i in range(200))
    assert first / 200 == pytest.approx(0.5, abs=0.11)  # 3 σ


def test_single_subjects_come_in_all_sizes_at_all_places():
    fused = fuse(1, (), size=128, vertical_jitter=1, **only("solo", **NO_CHANGES))
    composites = [fused.composite(i) for i in range(120)]
    sides = np.array([max(mention_box(c.mentions[0])) / 128 for c in composites])
    assert 0.33 < sides.min() < 0.40 and 0.85 < sides.max() < 0.92
    assert np.histogram(sides, 5, (0.35, 0.9))[0].min() >= 12  # uniform: 24 each
    centres = np.array([centre(region(c.mentions[0])) for c in composites])
    assert (centres.min(0) < 0.3).all() and (centres.max(0) > 0.7).all()
    for composite, side in zip(composites, sides):
        if 0.44 < side < 0.46 or 0.79 < side < 0.81:
            continue  # the words go by the size before rounding
        words = "far away" if side < 0.45 else "close up" if side > 0.8 else ""
        assert (words in composite.caption) and ("far" in composite.caption) == (words == "far away")
        assert ("close" in composite.caption) == (words == "close up")


@pytest.mark.parametrize("layout", ["original", "pair", "triple", "beside_prior"])
def test_size_words_are_for_single_subjects(layout):
    fused = fuse(3, **only(layout))
    captions = [fused.composite(i).caption for i in range(30)]
    assert not [c for c in captions if "far" in c or "close" in c]


@pytest.mark.parametrize(
    ("layout", "fill", "low", "high"), [("pair", 0.6, 0.27, 0.5), ("pair", 0.9, 0.42, 0.5), ("triple", 0.6, 0.28, 0.34)]
)
def test_several_subjects_share_the_width(layout, fill, low, high):
    """Fitted to half the canvas × U(pair_scale_min, 1), or to a third × U(.9, 1), whichever side binds."""
    wide = Concept("<wide>", "ball", *(tuple([x]) for x in photo("red", 60, 60, (0.1, 0.4, 0.9, 0.6))))
    others = [dataclasses.replace(wide, token=f"<wide-{i}>") for i in range(2)]
    settings = only(
        layout, size=128, row_probability=0, occlusion=0, margin=0.01, flip=0, pair_scale_min=fill, **NO_CHANGES
    )
    fused = ConceptFusion([wide, *others], (), (), FusionConfig(**settings))
    widths = [mention_box(m)[0] / 128 for i in range(40) for m in fused.composite(i).mentions]
    assert low - 0.01 < min(widths) < low + 0.08 and high - 0.04 < max(widths) < high + 0.012


@pytest.mark.parametrize(("layout", "count"), [("pair", 2), ("triple", 3)])
def test_narrow_subjects_get_no_more_room_than_square_ones(layout, count):
    """Of a box of 0.2 × 0.8, the area that a square of the same layout has: (U(.9, 1) / count)²."""
    tall = Concept("<tall>", "ball", *(tuple([x]) for x in photo("red", 60, 60, (0.4, 0.1, 0.6, 0.9))))
    others = [dataclasses.replace(tall, token=f"<tall-{i}>") for i in range(2)]
    fused = ConceptFusion([tall, *others], (), (), FusionConfig(size=256, **only(layout, occlusion=0, **NO_CHANGES)))
    boxes = [mention_box(m) for i in range(20) for m in fused.composite(i).mentions]
    areas = [width * height / 256**2 for width, height in boxes]
    assert 0.85 * (0.9 / count) ** 2 < min(areas) and max(areas) < 1.1 / count**2
    assert all(3.4 < height / width < 4.6 for width, height in boxes)


def test_in_a_row_wide_subjects_get_no_less_room():
    wide = Concept("<wide>", "ball", *(tuple([x]) for x in photo("red", 60, 60, (0.15, 0.3, 0.85, 0.8))))
    other = dataclasses.replace(wide, token="<other>")
    fused = ConceptFusion(
        [wide, other], (), (), FusionConfig(size=256, **only("pair", row_probability=1, max_covered=0.5))
    )
    boxes = [mention_box(m) for i in range(20) for m in fused.composite(i).mentions]
    areas = [width * height / 256**2 for width, height in boxes]
    assert 0.85 * 0.45**2 < np.median(areas) < 1.1 * 0.5**2 and max(width for width, _ in boxes) > 0.55 * 256


@pytest.mark.parametrize(("layout", "count"), [("pair", 2), ("triple", 3)])
def test_in_a_row_subjects_are_evenly_apart(layout, count):
    fused = fuse(3, size=256, **only(layout, row_probability=1, max_covered=0, **NO_CHANGES))
    for i in range(25):
        xs = sorted(centre(region(m))[0] for m in fused.composite(i).mentions)
        assert np.diff(xs) == pytest.approx([0.82 / count] * (count - 1), abs=0.1 / count)
        assert np.mean(xs) == pytest.approx(0.5, abs=0.03)


def test_in_a_row_the_lower_one_is_in_front_and_hides_little():
    tall = Concept("<tall>", "ball", *(tuple([x]) for x in photo("red", 60, 60, (0.25, 0.2, 0.75, 0.8))))
    flat = Concept("<flat>", "ball", *(tuple([x]) for x in photo("green", 60, 60, (0.1, 0.4, 0.9, 0.9))))
    fused = ConceptFusion(
        [tall, flat], (), (), FusionConfig(size=128, **only("pair", row_probability=1, flip=0, **NO_CHANGES))
    )
    touching = 0
    for i in range(40):
        mentions = sorted(fused.composite(i).mentions, key=lambda m: np.flatnonzero(region(m).any(1))[-1])
        whole = [region(m).sum() / np.prod(mention_box(m)) for m in mentions]
        assert whole[1] == pytest.approx(np.pi / 4, rel=0.05)  # the share of its box that a whole ellipse fills
        assert whole[0] > 0.84 * np.pi / 4
        touching += whole[0] < 0.98 * np.pi / 4
    assert touching > 5


def test_lengths_are_shares_of_the_canvas():
    settings = only("pair", occlusion=0, **NO_CHANGES)
    small, large = fuse(2, size=128, **settings), fuse(2, size=512, **settings)
    for i in range(12):
        areas = [
            sorted(m.mask.mean().item() for m in sorted(c.mentions, key=lambda m: m.name.token))
            for c in (small.composite(i), large.composite(i))
        ]
        assert areas[0] == pytest.approx(areas[1], rel=0.12)  # whole pixels of 128


def two_faced() -> Concept:
    """A subject that is red and tall on the left, green and flat on the right."""
    image, mask = torch.full((60, 60, 3), 0.5), torch.zeros(60, 60)
    image[10:50, 10:30], mask[10:50, 10:30] = torch.tensor(COLOURS["red"]), 1
    image[35:50, 30:50], mask[35:50, 30:50] = torch.tensor(COLOURS["green"]), 1
    return Concept("<two-faced>", "thing", (image,), (mask,))


@pytest.mark.parametrize("layout", ["original", "solo"])
@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_a_mask_is_mirrored_with_its_picture(layout, flip):
    fused = ConceptFusion([two_faced()], (), (), FusionConfig(size=128, **only(layout, flip=flip, rotation=0)))
    mirrored = 0
    for i in range(60):
        composite = fused.composite(i)
        (mention,) = composite.mentions
        red, green = (centre(shows(composite.image, c))[0] for c in ("red", "green"))
        box = ndimage.find_objects(region(mention).astype(int))[0]
        is_mirrored = red > green
        assert (centre(region(mention)[box])[0] > 0.5) == is_mirrored  # the tall side is the red side
        mirrored += is_mirrored
    assert mirrored / 60 == pytest.approx(flip, abs=0.2 if flip == 0.5 else 0)


def test_subjects_are_turned_within_the_limit():
    bar = Concept("<bar>", "bar", *(tuple([x]) for x in photo("red", 120, 120, (0.05, 0.4, 0.95, 0.6))))
    fused = ConceptFusion([bar], (), (), FusionConfig(size=128, **only("solo", rotation=20)))
    angles = []
    for i in range(60):
        y, x = np.nonzero(region(fused.composite(i).mentions[0]))
        angles.append(np.degrees(np.arctan(np.polyfit(x, y, 1)[0])))
    assert -22 < min(angles) < -12 and 12 < max(angles) < 22


def test_dark_and_bright_subjects_vary_in_brightness_only():
    fused = fuse(1, (), **only("solo", brightness=0.1, feather=0, erode=0, rotation=0))
    levels = []
    for i in range(40):
        composite = fused.composite(i)
        core = ndimage.binary_erosion(region(composite.mentions[0]), iterations=3)
        red, green, blue = composite.image[torch.from_numpy(core)].mean(0).tolist()
        assert green / red == pytest.approx(1 / 9, abs=0.02) and blue / red == pytest.approx(1 / 9, abs=0.02)
        levels.append(red / 0.9)
    assert 0.89 < min(levels) < 0.95 and 1.05 < max(levels) < 1.11


def test_a_subject_thinner_than_the_eroded_rim_survives():
    image, mask = torch.rand(64, 64, 3), torch.zeros(64, 64)
    mask[30:34] = 1
    fused = ConceptFusion(
        [Concept("<snake>", "snake", (image,), (mask,))],
        (),
        (),
        FusionConfig(**only("solo", size=64, rotation=0, erode=0.05)),
    )
    assert all(region(fused.composite(i).mentions[0]).any() for i in range(20))


@pytest.mark.parametrize("layout", ["solo", "pair"])
def test_subjects_stand_as_high_as_in_one_of_their_photos(layout):
    feet = (0.7, 0.8)  # where the ellipses of the photos end
    off = {}
    for drift in (0.1, 1.0):
        fused = fuse(2, size=128, vertical_jitter=drift, **only(layout, flip=0, occlusion=0, **NO_CHANGES))
        off[drift] = []
        for mention in (m for i in range(25) for m in fused.composite(i).mentions):
            rows = np.flatnonzero(region(mention).any(1))
            lowest, height = (rows[-1] + 1) / 128, (rows[-1] + 1 - rows[0]) / 128
            off[drift].append(min(abs(lowest - max(foot, height)) for foot in feet))  # a tall one touches the top
    assert max(off[0.1]) <= 0.1 + 2 / 128
    assert max(off[1.0]) > 0.15


def test_a_shadow_darkens_the_ground_and_nothing_else():
    """A red square of 20 pixels on white: the shadow is an ellipse, 17 wide and 3 high, around the foot's middle."""
    mask = Image.new("L", (24, 24))
    mask.paste(255, (2, 2, 22, 22))
    square = Placement(Cutout(Image.new("RGB", (24, 24), (200, 0, 0)), mask), 20, 10, 0)
    white = Image.new("RGB", (64, 64), "white")
    (plain, plain_masks), (shaded, masks) = (paste(white, [square], 0, 0, depth) for depth in (0.0, 0.4))
    plain, shaded = np.asarray(plain), np.asarray(shaded)
    assert torch.equal(masks[0], plain_masks[0]) and white.getextrema() == ((255, 255),) * 3
    changed = (plain != shaded).any(-1)
    assert not (changed & (masks[0].numpy() > 0)).any(), "the subject is as it was"
    # The foot is at row 32, the middle at column 32: there the shadow is at its full depth, and it ends within
    # 8.5 columns and 1.5 rows; one row on it has 0.4 × (1 − 1 / 1.5²).
    assert shaded[32, 32].tolist() == [153] * 3
    assert shaded[33, 32].tolist() == [round(255 * (1 - 0.4 * (1 - 1 / 2.25)))] * 3
    rows, columns = np.nonzero(changed)
    assert set(rows) == {32, 33} and (columns.min(), columns.max()) == (24, 40)
