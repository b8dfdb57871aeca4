"""Concept Fusion, seen through its composites: what is drawn, how often, and from what."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from far_train.data import fusion as fusion_module
from far_train.data.backgrounds import infill
from far_train.data.captions import Name
from far_train.data.concepts import Background, ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.utils.errors import CaptionError, ConfigError, SubjectError, TokenError

from .coloured import (
    CONCEPTS,
    NO_CHANGES,
    PRIORS,
    SCENES,
    SIZE,
    equal,
    fuse,
    mention_box,
    only,
    photo,
    region,
    shows,
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


# ---- layouts

# Original, solo, pair, triple, beside_prior; benchmarks/reports/2026-11-26/tuning.md has those of two concepts.
SHARES = {
    1: (0.35, 0.25, 0, 0, 0.40),
    2: (0.10, 0.25, 0.65, 0, 0),
    3: (0.20, 0.15, 0.30, 0.20, 0.15),
    4: (0.20, 0.15, 0.30, 0.20, 0.15),
    5: (0.20, 0.15, 0.30, 0.20, 0.15),
}
SUBJECTS = {"original": 1, "solo": 1, "pair": 2, "triple": 3, "beside_prior": 2}


@pytest.mark.parametrize("count", SHARES)
def test_layouts_are_drawn_by_their_shares_and_concepts_evenly(count):
    fused, draws = fuse(count), 500
    composites = [fused.composite(i) for i in range(draws)]
    drawn = Counter(c.layout for c in composites)
    expected = {k: draws * v for k, v in zip(SUBJECTS, SHARES[count]) if v}
    assert set(drawn) == set(expected)
    assert sum((drawn[k] - e) ** 2 / e for k, e in expected.items()) < 16  # χ², p = 0.003 at 4 degrees of freedom
    for composite in composites:
        names = [m.name for m in composite.mentions]
        assert len(names) == SUBJECTS[composite.layout] == len(set(names))
        assert sum(n.token is None for n in names) == (composite.layout == "beside_prior")
    shown = Counter(m.name for c in composites for m in c.mentions if m.name.token)
    mean = sum(shown.values()) / count
    assert len(shown) == count and all(abs(n - mean) < 0.2 * mean for n in shown.values())


def test_without_masked_class_pictures_their_layout_is_skipped():
    bare = [dataclasses.replace(p, mask=None) for p in PRIORS]
    for priors in ((), bare):
        fused = fuse(1, priors)
        assert fused.layouts == pytest.approx({"original": 0.35 / 0.6, "solo": 0.25 / 0.6})
        note = "Layout 'beside_prior' (40% of the composites) is skipped: there are no regularization images"
        assert note in fused.notes[0]
        assert {m.name.token for i in range(30) for m in fused.composite(i).mentions} == {"<red>"}
    assert not [n for n in (*fuse(1).notes, *fuse(2, ()).notes) if "Layout" in n]


def test_given_shares_are_used_and_what_can_not_be_is_said():
    fused = fuse(2, layout_weights={"solo": 1, "pair": 2, "triple": 5})
    assert fused.layouts == pytest.approx({"solo": 1 / 3, "pair": 2 / 3})
    assert fused.notes[0].startswith("Layout 'triple' (62% of the composites) is skipped: it needs three concepts")
    with pytest.raises(SubjectError, match="layout_weights: none of the chosen kinds"):
        fuse(1, layout_weights={"pair": 1})
    with pytest.raises(ConfigError, match="layout_weights: unknown kind 'duo'"):
        fuse(1, layout_weights={"duo": 1})


def test_the_distractor_is_of_the_same_class_if_there_is_one():
    cats = [ClassPicture("cat", *photo("cyan", 60, 60))] * 5
    same = fuse(1, [*cats, PRIORS[0]], **only("beside_prior"))
    assert {m.name for i in range(30) for m in same.composite(i).mentions} == {Name("ball", "<red>"), Name("ball")}
    other = fuse(1, cats, **only("beside_prior"))
    assert {m.name for i in range(10) for m in other.composite(i).mentions} == {Name("ball", "<red>"), Name("cat")}
    note = "Layout 'beside_prior' shows <red> beside another class: no regularization image of its own class"
    assert [n for n in other.notes if n.startswith(note)] and not [n for n in same.notes if "another class" in n]
    assert not [n for n in fuse(1, cats, **only("solo")).notes if "another class" in n]


# ---- backgrounds


def test_photos_are_filled_in_once(monkeypatch):
    calls = []
    monkeypatch.setattr(fusion_module, "infill", lambda *args: calls.append(args) or infill(*args))
    fused = fuse(2, **only("pair"))
    for i in range(40):
        fused.composite(i)
    assert 0 < len(calls) <= 6  # two concepts with three photos each


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
    with pytest.raises(SubjectError, match="background_weights: none of the chosen kinds"):
        fuse(2, background_weights={"scene": 1})


def test_collage_words_are_drawn_by_their_share():
    for share in (0.0, 0.5, 1.0):
        fused = fuse(2, **only("pair", collage_caption_probability=share))
        count = sum("collage" in fused.composite(i).caption for i in range(100))
        assert count / 100 == pytest.approx(share, abs=0.15 if share == 0.5 else 0)
    assert not any("collage" in fuse(2, **only("original")).composite(i).caption for i in range(20))


# ---- class pictures


def test_class_pictures_come_as_they_are_or_in_collages():
    fused = fuse(2)
    assert fused.prior_count() == 2
    pictures = [fused.prior(i) for i in range(200)]
    kinds = Counter(p.layout for p in pictures)
    assert set(kinds) == {"prior", "prior_composite"} and kinds["prior_composite"] / 200 == pytest.approx(0.3, abs=0.1)
    for picture in pictures:
        assert picture.mentions == () and "<" not in picture.caption and picture.image.shape == (SIZE, SIZE, 3)
        assert ("a ball and another ball" in picture.caption) == (picture.layout == "prior_composite")
    assert {fuse(2, prior_composites=0).prior(i).layout for i in range(20)} == {"prior"}


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
    with pytest.raises(CaptionError, match="'Ball' is not a class noun"):
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


def test_pillow_pictures_are_not_changed():
    """The photos are shared by all composites."""
    fused = fuse(2)
    before = fused.digest()
    for i in range(20):
        fused.composite(i)
        fused.prior(i)
    assert fused.digest() == before


# ---- subjects that their photos cut off


def cut_off(colour: str, box: tuple[float, float, float, float]) -> Concept:
    """A concept of one whole photo, and of one that cuts the subject off, in another colour."""
    photos = [photo("red", 60, 60), photo(colour, 60, 60, box)]
    return Concept("<red>", "ball", tuple(i for i, _ in photos), tuple(m for _, m in photos))


@pytest.mark.parametrize("box", [(-0.3, 0.2, 0.4, 0.8), (0.6, 0.2, 1.3, 0.8), (0.2, -0.3, 0.8, 0.4)])
def test_a_subject_that_a_side_cuts_off_is_shown_as_its_photo_alone(box):
    fused = ConceptFusion([cut_off("green", box)], (), SCENES, FusionConfig(size=SIZE, count=60))
    shown = {(c.layout, bool(shows(c.image, "green").any())) for c in map(fused.composite, range(60))}
    assert shown == {("original", True), ("original", False), ("solo", False)}
    assert any("side are used for 'original' only: photo 2." in note for note in fused.notes)


@pytest.mark.parametrize("row", [0.0, 1.0])
def test_a_subject_that_the_bottom_cuts_off_stands_on_the_lower_edge(row):
    """Upright, so that no straight cut is seen above it."""
    low = cut_off("green", (0.2, 0.5, 0.8, 1.5))
    settings = {"size": SIZE, "count": 40, "row_probability": row, "layout_weights": {"pair": 0.5, "solo": 0.5}}
    fused = ConceptFusion([low, CONCEPTS[2]], (), SCENES, FusionConfig(**settings, **(NO_CHANGES | {"rotation": 10})))
    found = 0
    for composite in map(fused.composite, range(40)):
        for mention in composite.mentions:
            pixels = region(mention)
            if mention.name.token == "<red>" and (shows(composite.image, "green") & pixels).any():
                found += 1
                assert pixels[-1].sum() >= 0.9 * mention_box(mention)[0]  # its cut, whole, on the edge
    assert found > 10
    assert any("bottom are placed on the lower edge: photo 2." in note for note in fused.notes)


def test_a_concept_without_a_whole_photo_is_said():
    half = photo("green", 60, 60, (-0.3, 0.2, 0.4, 0.8))
    concept = Concept("<green>", "ball", half[:1], half[1:])
    fused = ConceptFusion([concept], (), SCENES, FusionConfig(size=SIZE, count=1))
    assert any("<green>: every photo crops the subject at a side" in note for note in fused.notes)
    assert fused.composite(0).mentions


def test_distractors_that_are_cut_off_are_not_pasted():
    half = ClassPicture("ball", *photo("cyan", 60, 60, (-0.3, 0.2, 0.4, 0.8)))
    fused = fuse(1, priors=[half])
    assert "beside_prior" not in fused.layouts and fused.prior_count() == 1
    assert any("1 regularization image(s) crop their subject" in note for note in fused.notes)


def test_min_area_changes_no_identity():
    """It chooses among the photos, which are part of it themselves."""
    assert fuse().digest() == fuse(min_area=0.01).digest()
