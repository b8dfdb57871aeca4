"""The small world: deterministic, exactly masked, readable attributes, a closed vocabulary."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from benchmarks.small_models.held_out import all_identities, held_out_identities
from far_train.mini import world
from far_train.mini.identity import vary
from far_train.mini.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    NOUNS,
    POSES,
    SHAPES,
    Identity,
    attribute_values,
    caption_for,
    describe,
    draw_background,
    draw_sprite,
    empty_scene,
    far_apart,
    near_twin,
    reference_photos,
    render_scene,
    sample_identity,
    world_words,
)


def same(a: world.Scene, b: world.Scene) -> bool:
    return (
        torch.equal(a.image, b.image)
        and len(a.masks) == len(b.masks)
        and a.caption == b.caption
        and all(map(torch.equal, a.masks, b.masks))
        and a.sprites == b.sprites
        and a.background == b.background
    )


def test_scenes_depend_on_seed_and_index_alone():
    first = [render_scene(3, i) for i in range(6)]
    again = [render_scene(3, i) for i in reversed(range(6))][::-1]
    assert all(map(same, first, again))
    assert not same(render_scene(4, 0), first[0])


def test_scene_types_and_counts():
    for n in range(4):
        scene = render_scene(1, n, sprites=n)
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == torch.float32
        assert 0 <= float(scene.image.min()) and float(scene.image.max()) <= 1
        assert len(scene.masks) == len(scene.sprites) == n
        assert all(m.shape == (128, 128) and m.dtype == torch.float32 for m in scene.masks)
        assert [s.x for s in scene.sprites] == sorted(s.x for s in scene.sprites)


def test_masks_are_where_compositing_changed_pixels():
    for index in range(12):
        scene = render_scene(5, index, sprites=1 + index % 3)
        back = np.full((128, 128, 3), 255, np.uint8)
        shadowed = back.astype(np.float32) / 255
        for sprite in scene.sprites:
            world._shadow(shadowed, sprite)
        image, masks = world._compose(back, scene.sprites)
        assert all(map(torch.equal, masks, scene.masks))  # masks don't depend on the background
        total = torch.stack(masks).sum(0)
        assert float(total.max()) <= 1 + 1e-5
        changed = (image - torch.from_numpy(shadowed)).abs().amax(-1)
        assert float(changed[total == 0].max()) == 0
        # A second background tells the coverage exactly, whatever the colours: the background shows by 1 − mask.
        black, _ = world._compose(np.zeros((128, 128, 3), np.uint8), scene.sprites)
        assert torch.allclose((image - black).amax(-1), torch.from_numpy(shadowed).amax(-1) * (1 - total), atol=1e-4)


def test_sprites_stay_inside_and_hardly_hide_each_other():
    for index in range(40):
        scene = render_scene(6, index, sprites=2 + index % 2)
        for sprite, mask in zip(scene.sprites, scene.masks):
            _, (alone,) = world._compose(np.zeros((128, 128, 3), np.uint8), [sprite])
            border = torch.cat([alone[0], alone[-1], alone[:, 0], alone[:, -1]])
            assert float(border.max()) == 0
            assert float(mask.sum()) >= 0.8 * float(alone.sum())
            ys, xs = torch.nonzero(alone, as_tuple=True)
            left, top, right, bottom = (v * 128 for v in sprite.box)
            assert left - 1 < xs.min() and xs.max() < right and top - 1 < ys.min() and ys.max() < bottom


@pytest.mark.parametrize("size", [64, 256, 512])
def test_any_size_is_the_same_scene_scaled(size):
    for index in range(4):
        small, other = render_scene(8, index, 128), render_scene(8, index, size)
        assert small.sprites == other.sprites and small.caption == other.caption

        def fit(t):  # to 64 px
            return torch.nn.functional.interpolate(t[None], size=(64, 64), mode="area")

        a, b = fit(small.image.permute(2, 0, 1)), fit(other.image.permute(2, 0, 1))
        assert float((a - b).abs().mean()) < 0.012
        for m, n in zip(small.masks, other.masks):
            m, n = fit(m[None]), fit(n[None])
            assert float(torch.minimum(m, n).sum() / torch.maximum(m, n).sum()) > 0.95


def on_grey(identity: Identity, pose: str = "standing") -> np.ndarray:
    tile = draw_sprite(identity, pose, 60).astype(np.float32) / 255
    return tile[..., :3] * tile[..., 3:] + 0.6 * (1 - tile[..., 3:])


@pytest.mark.parametrize("noun", NOUNS)
def test_every_attribute_value_shows(noun):
    """At 60 px every two values differ in ≥ 2 % of the sprite, and still do after pooling to cells of 8 px."""
    for pattern in world.PATTERNS:
        base = Identity(noun, "red", "blue", pattern, "none", SHAPES[noun][1][0])
        area = float((draw_sprite(base, size_px=60)[..., 3] > 127).sum())
        for name, values in attribute_values(noun).items():
            free = [v for v in values if {"body": "blue", "second": "red"}.get(name) != v]
            for v, w in combinations(free, 2):
                gap = np.abs(on_grey(replace(base, **{name: v})) - on_grey(replace(base, **{name: w})))
                assert (gap.max(-1) > 0.15).sum() >= 0.02 * area, (name, v, w)
                cells = gap[:112, :112].reshape(14, 8, 14, 8, 3).mean((1, 3)).max(-1)
                assert cells.max() > 0.12, (name, v, w, cells.max())


@pytest.mark.parametrize("noun", NOUNS)
def test_no_accessory_hides_shape_or_second_colour(noun):
    for accessory in world.ACCESSORIES:
        base = Identity(noun, "red", "white", "plain", accessory, SHAPES[noun][1][0])
        for change in ({"shape": SHAPES[noun][1][1]}, {"second": "blue"}):
            gap = np.abs(on_grey(base) - on_grey(replace(base, **change)))
            cells = gap[:112, :112].reshape(14, 8, 14, 8, 3).mean((1, 3)).max(-1)
            assert (cells > 0.08).sum() >= 2 and cells.max() > 0.12, (accessory, change, np.sort(cells.ravel())[-3:])


def test_poses_and_flip_show():
    one = sample_identity(np.random.default_rng(0), "dog")
    tiles = [draw_sprite(one, pose, 60) for pose in POSES] + [draw_sprite(one, "standing", 60, flip=True)]
    assert all((a != b).any() for a, b in combinations(tiles, 2))


def test_near_and_far_change_as_many_attributes_as_asked():
    rng = np.random.default_rng(0)
    for _ in range(100):
        one = sample_identity(rng)
        for n in (1, 2):
            twin = near_twin(one, rng, n)
            assert twin.noun == one.noun and len(one.differs(twin)) == n and set(one.differs(twin)) <= set(ATTRIBUTES)
        for n in (4, 5):
            assert len(one.differs(far_apart(one, rng, n))) == n
    with pytest.raises(ValueError, match="near_twin"):
        near_twin(one, rng, 3)
    with pytest.raises(ValueError, match="far_apart"):
        far_apart(one, rng, 3)


def test_identities_are_checked():
    with pytest.raises(ValueError, match="Identity.noun"):
        Identity("cow", "red", "blue", "plain", "none", "round")
    with pytest.raises(ValueError, match="Identity.shape"):
        Identity("dog", "red", "blue", "plain", "none", "round")
    with pytest.raises(ValueError, match="Identity.second"):
        Identity("dog", "red", "red", "plain", "none", "floppy")


def test_captions_use_a_closed_vocabulary():
    words, rng, used = set(world_words()), np.random.default_rng(1), set()
    for _ in range(4000):
        cast = [sample_identity(rng) for _ in range(int(rng.integers(4)))]
        if rng.random() < 0.3:
            cast = [replace(c) for c in cast[:1]] * len(cast)
        caption = caption_for(cast, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], rng)
        assert caption == " ".join(caption.lower().split())
        used |= set(caption.split())
        for a, b in pairwise(caption.split()):
            assert not (a == "a" and b[0] in "aeiou") and not (a == "an" and b[0] not in "aeiou"), caption
    assert used == words


def test_descriptions_tell_identities_apart():
    one = Identity("dog", "red", "blue", "banded", "hat", "floppy")
    assert describe(one) == "a red dog with blue bands and floppy ears and a hat"
    assert describe(one, ()) == "a dog"
    assert describe(replace(one, body="orange"), ("body",)) == "an orange dog"
    rng = np.random.default_rng(2)
    for _ in range(200):
        a = sample_identity(rng)
        assert describe(a) != describe(near_twin(a, rng))


def test_scene_arguments():
    pair = [
        Identity("cat", "red", "blue", "plain", "none", "curly"),
        Identity("cup", "green", "pink", "banded", "scarf", "round"),
    ]
    scene = render_scene(0, 0, identities=pair, background="moon")
    assert [s.identity for s in scene.sprites] == pair and scene.background == "moon"
    held = {s.identity for i in range(60) for s in render_scene(0, i, 64).sprites}
    assert not held & {s.identity for i in range(60) for s in render_scene(0, i, 64, held_out=held).sprites}
    pets = {s.identity.noun for i in range(10) for s in render_scene(0, i, 64, nouns=("dog", "cat")).sprites}
    assert pets <= {"dog", "cat"}
    for bad in ({"size": 32}, {"sprites": 4}, {"background": "bath"}, {"sprites": 1, "identities": pair}):
        with pytest.raises(ValueError, match=f"render_scene: {next(iter(bad))}"):
            render_scene(0, 0, **bad)


def test_references_and_empty_scenes():
    one = sample_identity(np.random.default_rng(5), "robot")
    photos = reference_photos(one, 0, count=4, size=96, backgrounds=("snow",))
    again = reference_photos(one, 0, count=4, size=96, backgrounds=("snow",))
    assert all(torch.equal(a, b) and torch.equal(m, n) for (a, m), (b, n) in zip(photos, again))
    assert all(i.shape == (96, 96, 3) and m.shape == (96, 96) and float(m.sum()) > 500 for i, m in photos)
    assert not torch.equal(photos[0][1], photos[1][1])
    for name in BACKGROUNDS:
        place = empty_scene(name, 1, 64)
        assert place.shape == (64, 64, 3) and not torch.equal(place, empty_scene(name, 2, 64))
    with pytest.raises(ValueError, match="bath"):
        empty_scene("bath", 0)


def test_subjects_are_more_saturated_than_places():
    def chroma(pixels: np.ndarray) -> float:
        return float((pixels.max(-1).astype(float) - pixels.min(-1)).mean())

    places = [chroma(draw_background(name, 0)) for name in BACKGROUNDS]
    assert max(places) < 110 < np.mean([max(rgb) - min(rgb) for name, rgb in world.COLOURS.items() if name != "white"])


def test_held_out_identities_leave_every_value_to_be_seen():
    everyone, held_out = set(all_identities()), held_out_identities()
    assert held_out < everyone and 0.09 < len(held_out) / len(everyone) < 0.11
    seen = everyone - held_out
    for field in ("body", "second", "pattern", "accessory", "shape"):
        assert {(i.noun, getattr(i, field)) for i in seen} == {(i.noun, getattr(i, field)) for i in everyone}
    rng = np.random.default_rng(0)
    assert any(vary(i, rng, 1) in held_out for i in sorted(held_out, key=repr)[:200])  # near twins, both held out
