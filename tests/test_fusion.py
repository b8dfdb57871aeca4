"""Concept Fusion, seen through its composites: synthetic subjects of one colour each tell what was pasted where."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import ndimage

from far_train import fusion as fusion_module
from far_train.captions import Name
from far_train.concepts import Background, ClassPicture, Composite, Concept
from far_train.config import FusionConfig
from far_train.errors import CaptionError, ConfigError, SubjectError, TokenError
from far_train.fusion import ConceptFusion
from far_train.photos import from_pil, mask_to_pil, to_pil
from far_train.placement import Cutout, place
from far_train.scenery import cover, infill

SIZE = 64
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.1, 0.1, 0.9), "pink": (0.95, 0.2, 0.9)}
COLOURS |= {"cyan": (0.1, 0.9, 0.9), "yellow": (0.95, 0.9, 0.05)}
NO_CHANGES = {"rotation": 0, "brightness": 0, "erode": 0, "feather": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(
    colour: str, height: int, width: int, box: tuple[float, float, float, float] = (0.3, 0.25, 0.7, 0.8)
) -> tuple[torch.Tensor, torch.Tensor]:
    """An ellipse of one colour in ``box`` (left, top, right, bottom as shares) on grey noise, with its mask."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    left, top, right, bottom = box
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
    noise = 0.5 + 0.08 * np.random.default_rng(height * width).standard_normal((height, width, 1))
    pixels = np.where(inside[..., None], COLOURS[colour], noise.clip(0, 1))
    return torch.from_numpy(pixels).float(), torch.from_numpy(inside).float()


def concept(colour: str, noun: str = "ball") -> Concept:
    photos = [photo(colour, 60, 60), photo(colour, 48, 80, (0.5, 0.1, 0.95, 0.7)), photo(colour, 90, 50)]
    return Concept(f"<{colour}>", noun, tuple(i for i, _ in photos), tuple(m for _, m in photos))


CONCEPTS = [concept(c) for c in ("red", "green", "blue", "pink", "yellow")]
PRIORS = [ClassPicture("ball", *photo("cyan", 70, 70)), ClassPicture("ball", *photo("cyan", 60, 90))]


def fuse(count: int = 2, priors: Sequence[ClassPicture] = PRIORS, backgrounds: Sequence[Background] = (), **settings):
    return ConceptFusion(CONCEPTS[:count], priors, backgrounds, FusionConfig(**{"size": SIZE, **settings}))


def only(recipe: str, background: str = "infilled", **settings) -> dict:
    return {"recipe_weights": {recipe: 1.0}, "background_weights": {background: 1.0}, **settings}


def shows(image: torch.Tensor, colour: str) -> np.ndarray:
    """Pixels [S, S] of this colour; the subjects' colours are far apart, and from all greys."""
    return (image - torch.tensor(COLOURS[colour])).abs().amax(-1).numpy() < 0.25


def region(mention) -> np.ndarray:
    return mention.mask.numpy() > 0.5


def centre(pixels: np.ndarray) -> tuple[float, float]:
    """x and y of the middle of these pixels, as shares of the canvas."""
    y, x = ndimage.center_of_mass(pixels)
    return (x + 0.5) / pixels.shape[1], (y + 0.5) / pixels.shape[0]


def colour_of(name: Name) -> str:
    return name.token.strip("<>") if name.token else "cyan"


def equal(a: Composite, b: Composite) -> bool:
    return (
        torch.equal(a.image, b.image)
        and (a.caption, a.recipe) == (b.caption, b.recipe)
        and [(m.name, m.spans) for m in a.mentions] == [(m.name, m.spans) for m in b.mentions]
        and all(torch.equal(m.mask, n.mask) for m, n in zip(a.mentions, b.mentions))
    )


# ---- (seed, index)


def test_a_composite_depends_on_seed_and_index_alone():
    first, second, other = fuse(3), fuse(3), fuse(3, fusion_seed=1)
    there = [first.composite(i) for i in range(20)]
    back = [second.composite(i) for i in reversed(range(20))][::-1]
    assert all(equal(a, b) for a, b in zip(there, back))
    assert not any(equal(a, other.composite(i)) for i, a in enumerate(there))
    assert not any(equal(a, b) for a, b in itertools.combinations(there, 2))
    priors = [first.prior(i) for i in range(10)]
    assert all(equal(priors[i], second.prior(i)) for i in reversed(range(10)))


def test_shapes_ranges_and_captions():
    fused = fuse(3)
    for i in range(40):
        composite = fused.composite(i)
        assert composite.image.shape == (SIZE, SIZE, 3) and composite.image.dtype == torch.float32
        assert 0 <= composite.image.min() and composite.image.max() <= 1
        assert composite.mentions
        for mention in composite.mentions:
            assert mention.mask.shape == (SIZE, SIZE) and region(mention).any()
            noun = composite.caption[slice(*mention.spans.noun)]
            token = mention.spans.token and composite.caption[slice(*mention.spans.token)]
            assert Name(noun, token) == mention.name


# ---- recipes

SHARES = {  # of method.md, section 2: original, solo, pair, triple, beside_prior
    1: (0.35, 0.25, 0, 0, 0.40),
    2: (0.25, 0.20, 0.35, 0, 0.20),
    3: (0.20, 0.15, 0.30, 0.20, 0.15),
    4: (0.20, 0.15, 0.30, 0.20, 0.15),
    5: (0.20, 0.15, 0.30, 0.20, 0.15),
}
SUBJECTS = {"original": 1, "solo": 1, "pair": 2, "triple": 3, "beside_prior": 2}


@pytest.mark.parametrize("count", SHARES)
def test_recipes_are_drawn_by_their_shares_and_concepts_evenly(count):
    fused, draws = fuse(count), 500
    composites = [fused.composite(i) for i in range(draws)]
    drawn = Counter(c.recipe for c in composites)
    expected = {k: draws * v for k, v in zip(SUBJECTS, SHARES[count]) if v}
    assert set(drawn) == set(expected)
    assert sum((drawn[k] - e) ** 2 / e for k, e in expected.items()) < 16  # χ², p = 0.003 at 4 degrees of freedom
    for composite in composites:
        names = [m.name for m in composite.mentions]
        assert len(names) == SUBJECTS[composite.recipe] == len(set(names))
        assert sum(n.token is None for n in names) == (composite.recipe == "beside_prior")
    shown = Counter(m.name for c in composites for m in c.mentions if m.name.token)
    mean = sum(shown.values()) / count
    assert len(shown) == count and all(abs(n - mean) < 0.2 * mean for n in shown.values())


def test_without_masked_class_pictures_their_recipe_falls_away():
    bare = [dataclasses.replace(p, mask=None) for p in PRIORS]
    for priors in ((), bare):
        fused = fuse(2, priors)
        assert fused.recipes == pytest.approx({"original": 0.25 / 0.8, "solo": 0.2 / 0.8, "pair": 0.35 / 0.8})
        assert "Recipe 'beside_prior' (20% of the composites) falls away: there are no class pictures" in fused.notes[0]
        assert {m.name.token for i in range(30) for m in fused.composite(i).mentions} == {"<red>", "<green>"}
    assert not [n for n in fuse(2).notes if "Recipe" in n]


def test_given_shares_are_used_and_what_can_not_be_is_said():
    fused = fuse(2, recipe_weights={"solo": 1, "pair": 2, "triple": 5})
    assert fused.recipes == pytest.approx({"solo": 1 / 3, "pair": 2 / 3})
    assert "Recipe 'triple'" in fused.notes[0] and "three concepts" in fused.notes[0]
    with pytest.raises(SubjectError, match="recipe_weights: nothing is left"):
        fuse(1, recipe_weights={"pair": 1})
    with pytest.raises(ConfigError, match="recipe_weights: unknown kind 'duo'"):
        fuse(1, recipe_weights={"duo": 1})


def test_the_companion_is_of_the_same_class_if_there_is_one():
    cats = [ClassPicture("cat", *photo("cyan", 60, 60))] * 5
    same = fuse(1, [*cats, PRIORS[0]], **only("beside_prior"))
    assert {m.name for i in range(30) for m in same.composite(i).mentions} == {Name("ball", "<red>"), Name("ball")}
    other = fuse(1, cats, **only("beside_prior"))
    assert {m.name for i in range(10) for m in other.composite(i).mentions} == {Name("ball", "<red>"), Name("cat")}


# ---- masks and places


@pytest.mark.parametrize("recipe", SUBJECTS)
def test_every_mask_lies_on_its_own_subject(recipe):
    fused = fuse(3, size=128, **only(recipe))
    for i in range(25):
        composite = fused.composite(i)
        for mention in composite.mentions:
            mask, seen = region(mention), shows(composite.image, colour_of(mention.name))
            assert (mask & seen).sum() / (mask | seen).sum() > 0.75, (i, mention.name)
            core = ndimage.binary_erosion(mask, iterations=3)
            assert seen[core].mean() > 0.99, (i, mention.name)  # the 3 px towards the rim are soft
        for colour in COLOURS.keys() - {colour_of(m.name) for m in composite.mentions}:
            assert not shows(composite.image, colour).any(), "an in-filled background still shows its subject"


@pytest.mark.parametrize("recipe", ["pair", "triple", "beside_prior"])
@pytest.mark.parametrize("margin", [1 / 64, 0.1])
def test_subjects_keep_their_distance(recipe, margin):
    """At a tenth of the canvas random places hardly ever fit, so the columns are tested as well."""
    fused = fuse(3, size=128, margin=margin, **only(recipe, occlusion=0, erode=0))
    for i in range(25):
        grown = [ndimage.maximum_filter(region(m), 2 * round(margin * 128) + 1) for m in fused.composite(i).mentions]
        for a, b in itertools.combinations(grown, 2):
            assert not (a & b).any(), i


def test_nothing_is_cut_off_by_the_canvas():
    fused = fuse(3, size=128, **only("triple", flip=0, **NO_CHANGES))
    for i in range(25):
        for mention in fused.composite(i).mentions:
            box = mention_box(mention)
            filled = region(mention).sum() / (box[0] * box[1])
            assert filled == pytest.approx(np.pi / 4, rel=0.08)  # the share of its box that a whole ellipse fills


def mention_box(mention) -> tuple[int, int]:
    """Width and height of a mention's region in pixels."""
    (rows, columns) = ndimage.find_objects(region(mention).astype(int))[0]
    return columns.stop - columns.start, rows.stop - rows.start


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
    fused = fuse(2, size=128, **only("pair", occlusion=1, max_covered=0.5, **NO_CHANGES))
    trimmed = 0
    for i in range(25):
        composite = fused.composite(i)
        assert sum(m.mask for m in composite.mentions).max() <= 1.001
        for mention in composite.mentions:
            assert shows(composite.image, colour_of(mention.name))[region(mention)].mean() > 0.9
            box = mention_box(mention)
            trimmed += region(mention).sum() / (box[0] * box[1]) < 0.7
    assert trimmed > 10


def test_place_does_not_follow_the_order_of_mention():
    fused, draws = fuse(2, **only("pair")), 400
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


def test_single_subjects_come_in_all_sizes_at_all_places():
    fused = fuse(1, (), size=128, **only("solo", **NO_CHANGES))
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


@pytest.mark.parametrize("recipe", ["original", "pair", "triple", "beside_prior"])
def test_size_words_are_for_single_subjects(recipe):
    fused = fuse(3, **only(recipe))
    captions = [fused.composite(i).caption for i in range(30)]
    assert not [c for c in captions if "far" in c or "close" in c]


@pytest.mark.parametrize(("recipe", "low", "high"), [("pair", 0.27, 0.5), ("triple", 0.28, 0.34)])
def test_several_subjects_share_the_width(recipe, low, high):
    """Fitted to half the canvas × U(.6, 1), or to a third × U(.9, 1), whichever side binds."""
    wide = Concept("<wide>", "ball", *(tuple([x]) for x in photo("red", 60, 60, (0.1, 0.4, 0.9, 0.6))))
    others = [dataclasses.replace(wide, token=f"<wide-{i}>") for i in range(2)]
    settings = only(recipe, size=128, occlusion=0, margin=0.01, flip=0, **NO_CHANGES)
    fused = ConceptFusion([wide, *others], (), (), FusionConfig(**settings))
    widths = [mention_box(m)[0] / 128 for i in range(40) for m in fused.composite(i).mentions]
    assert low - 0.01 < min(widths) < low + 0.08 and high - 0.04 < max(widths) < high + 0.012


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


@pytest.mark.parametrize("recipe", ["original", "solo"])
@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_a_mask_is_mirrored_with_its_picture(recipe, flip):
    fused = ConceptFusion([two_faced()], (), (), FusionConfig(size=128, **only(recipe, flip=flip, rotation=0)))
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


# ---- odd photos


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


def test_a_subject_thinner_than_the_eroded_rim_survives():
    image, mask = torch.rand(64, 64, 3), torch.zeros(64, 64)
    mask[30:34] = 1
    fused = ConceptFusion(
        [Concept("<snake>", "snake", (image,), (mask,))], (), (), FusionConfig(**only("solo", size=64, rotation=0))
    )
    assert all(region(fused.composite(i).mentions[0]).any() for i in range(20))


# ---- backgrounds


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


def test_a_photo_that_is_all_subject_fills_in_grey():
    filled = infill(to_pil(torch.ones(40, 40, 3)), mask_to_pil(torch.ones(40, 40)), SIZE)
    assert np.unique(np.asarray(filled)).tolist() == [128]


def test_photos_are_filled_in_once(monkeypatch):
    calls = []
    monkeypatch.setattr(fusion_module, "infill", lambda *args: calls.append(args) or infill(*args))
    fused = fuse(2, **only("pair"))
    for i in range(40):
        fused.composite(i)
    assert 0 < len(calls) <= 6  # two concepts with three photos each


SCENES = [
    Background(torch.tensor(COLOURS["cyan"]).expand(40, 60, 3), "in a garden"),
    Background(torch.zeros(50, 40, 3)),
]


def test_backgrounds_are_drawn_by_their_shares():
    fused = fuse(2, backgrounds=SCENES)
    assert fused.background_kinds == {"scene": 0.45, "infilled": 0.2, "prior": 0.2, "plain": 0.15}
    assert fused.notes == []
    assert fuse(2).background_kinds == pytest.approx(
        {"infilled": 0.2 / 0.55, "prior": 0.2 / 0.55, "plain": 0.15 / 0.55}
    )
    assert fuse(2, ()).background_kinds == pytest.approx({"infilled": 0.2 / 0.35, "plain": 0.15 / 0.35})
    assert "No background pictures are given" in fuse(2).notes[-1]
    assert fuse(2, background_weights={"plain": 1}).notes == []
    with pytest.raises(SubjectError, match="background_weights: nothing is left"):
        fuse(2, background_weights={"scene": 1})


def test_a_scene_brings_its_words():
    fused = fuse(1, (), SCENES, **only("solo", "scene"))
    words = Counter()
    for i in range(40):
        composite = fused.composite(i)
        is_garden = shows(composite.image, "cyan").any()
        assert composite.caption.endswith(", in a garden") == is_garden
        words[bool(is_garden)] += 1
    assert min(words.values()) > 8


def test_plain_backgrounds_name_their_colour():
    fused = fuse(1, (), **only("solo", "plain"))
    captions = [fused.composite(i).caption for i in range(60)]
    plain = [c for c in captions if ", on a plain " in c]
    gradient = [c for c in captions if c.endswith(", on a gradient background")]
    assert len(plain) + len(gradient) == 60 and min(len(plain), len(gradient)) > 15
    white = next(i for i, c in enumerate(captions) if "plain white" in c)
    assert fused.composite(white).image.median() > 0.85


def test_collage_words_are_drawn_by_their_share():
    for share in (0.0, 0.5, 1.0):
        fused = fuse(2, **only("pair", collage_words=share))
        count = sum("collage" in fused.composite(i).caption for i in range(100))
        assert count / 100 == pytest.approx(share, abs=0.15 if share == 0.5 else 0)
    assert not any("collage" in fuse(2, **only("original")).composite(i).caption for i in range(20))


# ---- class pictures


def test_class_pictures_come_as_they_are_or_in_collages():
    fused = fuse(2)
    assert fused.prior_count() == 2
    pictures = [fused.prior(i) for i in range(200)]
    kinds = Counter(p.recipe for p in pictures)
    assert set(kinds) == {"prior", "prior_collage"} and kinds["prior_collage"] / 200 == pytest.approx(0.3, abs=0.1)
    for picture in pictures:
        assert picture.mentions == () and "<" not in picture.caption and picture.image.shape == (SIZE, SIZE, 3)
        assert ("a ball and another ball" in picture.caption) == (picture.recipe == "prior_collage")
    assert {fuse(2, prior_collages=0).prior(i).recipe for i in range(20)} == {"prior"}


def test_class_pictures_without_masks_are_still_pictures():
    fused = fuse(1, [dataclasses.replace(PRIORS[0], mask=None)])
    assert fused.prior_count() == 1
    assert shows(fused.prior(0).image, "cyan").any() and fused.prior(0).caption.endswith(" of a ball")


# ---- what identifies a training set


def test_the_digest_tells_contents_apart():
    base = fuse(2, backgrounds=SCENES).digest()
    assert base == fuse(2, backgrounds=list(SCENES)).digest()
    image, mask = PRIORS[0].image.clone(), PRIORS[0].mask.clone()
    image[0, 0, 0] = 1 - image[0, 0, 0].round()
    mask[0, 0] = 1
    maskless = [dataclasses.replace(PRIORS[0], mask=None), PRIORS[1]]
    others = [
        fuse(3, backgrounds=SCENES),
        fuse(2, backgrounds=SCENES, fusion_seed=1),
        fuse(2, backgrounds=SCENES[::-1]),
        fuse(2, backgrounds=[dataclasses.replace(SCENES[0], phrase="at sea"), SCENES[1]]),
        fuse(2, [ClassPicture("ball", image, PRIORS[0].mask), PRIORS[1]], SCENES),
        fuse(2, [ClassPicture("ball", PRIORS[0].image, mask), PRIORS[1]], SCENES),
        fuse(2, [ClassPicture("dog", PRIORS[0].image, PRIORS[0].mask), PRIORS[1]], SCENES),
        fuse(2, maskless, SCENES),
    ]
    assert len({base, *(o.digest() for o in others)}) == len(others) + 1


# ---- bad input


def test_bad_input_is_named():
    image, mask = photo("red", 60, 60)
    with pytest.raises(SubjectError, match="concepts: none given"):
        ConceptFusion([])
    with pytest.raises(TokenError, match="<red> names two concepts"):
        ConceptFusion([CONCEPTS[0], dataclasses.replace(CONCEPTS[1], token="<red>")])
    with pytest.raises(TokenError, match="write it as <red>"):
        Concept("red", "ball", (image,), (mask,))
    with pytest.raises(CaptionError, match="'Ball' is no class noun"):
        Concept("<red>", "Ball", (image,), (mask,))
    with pytest.raises(SubjectError, match="concept <red>: no subjects"):
        Concept("<red>", "ball", (), ())
    with pytest.raises(SubjectError, match="1 photos but 2 masks"):
        Concept("<red>", "ball", (image,), (mask, mask))
    with pytest.raises(SubjectError, match="<red>, photo 2: the mask is 60×59 pixels but the picture 60×60"):
        Concept("<red>", "ball", (image, image), (mask, mask[1:]))
    with pytest.raises(SubjectError, match="photo 1: the mask is empty"):
        Concept("<red>", "ball", (image,), (mask * 0,))
    with pytest.raises(SubjectError, match=r"photo 1: the mask must be \[height, width\], got \[1, 60, 60\]"):
        Concept("<red>", "ball", (image,), (mask[None],))
    with pytest.raises(SubjectError, match=r"must be \[height, width, 3\], got \[1, 60, 60, 3\]"):
        ClassPicture("ball", image[None])
    with pytest.raises(SubjectError, match=r"background: a picture must be \[height, width, 3\], got \[60, 60\]"):
        Background(mask)


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


def test_pillow_pictures_are_not_changed():
    """The photos are shared by all composites."""
    fused = fuse(2)
    before = fused.digest()
    for i in range(20):
        fused.composite(i)
        fused.prior(i)
    assert fused.digest() == before
