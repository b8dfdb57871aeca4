"""The weights that come with the package: whole, small, described, and as good as their cards say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.groups import NEAR
from benchmarks.small_models.held_out import held_out_identities
from benchmarks.small_models.small_sam import BOX_GATE, POINT_GATE, measure_sam
from far_train.mini import shipped
from far_train.mini.oracle import read_pictures
from far_train.mini.scenery import PLACES
from far_train.mini.shipped import DRAWING, SIZE, SUBJECTS, WEIGHTS, sample_photos, small_base, small_oracle, small_sam
from far_train.mini.world import render_scene
from far_train.models.conditioning import plain_vocabulary
from far_train.models.sampling import draw_pictures
from far_train.utils.errors import BaseModelError


def test_they_are_small_and_described():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}
    for part in ("base", "sam", "oracle"):
        card = (WEIGHTS / part / "card.md").read_text(encoding="utf-8")
        for said in ("Seed", "minutes", "python -m benchmarks.small_models.learn", "## Measured", "Licence: MIT"):
            assert said in card, part


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "BASE", tmp_path / "base")
    with pytest.raises(BaseModelError, match="benchmarks.small_models.learn"):
        small_base()


def test_subjects_are_near_twins_that_the_base_has_not_seen():
    identities = [identity for _, identity in SUBJECTS.values()]
    assert set(identities) <= held_out_identities()
    for a, b in zip(identities[::2], identities[1::2]):
        assert a.noun == b.noun and len(a.differs(b)) in NEAR
    photos = sample_photos("rex")
    assert len(photos) == 5 and all(p.image.shape == (SIZE, SIZE, 3) and p.mask is None for p in photos)
    assert torch.equal(photos[0].image, sample_photos("rex")[0].image)


def test_the_small_sam_keeps_its_gates():
    figures = measure_sam(small_sam(), None, count=64)
    assert figures["iou_box"] >= BOX_GATE and figures["iou_point"] >= POINT_GATE


def test_the_oracle_knows_fresh_renders():
    scenes = [render_scene(11, i, sprites=1) for i in range(24)]
    readings = read_pictures(small_oracle(), torch.stack([s.image for s in scenes]))
    right = [[d.identity.noun for d in r.subjects] == [s.sprites[0].identity.noun] for r, s in zip(readings, scenes)]
    places = [r.background == s.background for r, s in zip(readings, scenes)]
    assert sum(right) >= 22 and sum(places) >= 23


def test_the_base_draws_the_place_it_is_told():
    base, wanted = small_base(), list(PLACES)[:8]
    prompts = [f"a photo of a red cat, {PLACES[place][0]}" for place in wanted]
    pictures = draw_pictures(base, plain_vocabulary(base), prompts, DRAWING.replace(sampling_steps=12))
    readings = read_pictures(small_oracle(), pictures)
    assert sum(r.background == place for r, place in zip(readings, wanted)) >= 6
