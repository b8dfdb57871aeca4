"""The demo from end to end, with fewer pictures and steps: every stage leaves what the page shows."""

from __future__ import annotations

import re

import pytest

from far_train.data.images import load_photo
from far_train.mini import demo
from far_train.mini.shipped import SIZE
from far_train.models.weights import FarWeights
from far_train.training.run_folder import read_metrics
from far_train.utils.errors import OutputError


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "CLASS_PICTURES", 3)
    monkeypatch.setattr(demo, "COMPOSITES", 20)
    monkeypatch.setattr(demo, "EMPTY_SCENES", 1)
    monkeypatch.setattr(demo, "PICTURES_EACH", 2)
    monkeypatch.setattr(demo, "PLACES_SHOWN", ("beach", "moon"))
    monkeypatch.setattr(demo, "DRAWING", demo.DRAWING.replace(sampling_steps=2))
    for name in ("TRAINING", "RIVAL"):
        monkeypatch.setattr(demo, name, getattr(demo, name).replace(steps=2, batch_size=2, prior_batch_size=1))


def test_the_full_pipeline(short, tmp_path):
    phases = []
    page = demo.run_demo(tmp_path / "demo", "cpu", lambda phase, done, total: phases.append(phase))
    text = page.read_text(encoding="utf-8")
    for heading in ("rex-dog", "max-dog", "Regularization images", "Concept Fusion", "Training: Custom Diffusion"):
        assert heading in text
    captions = re.findall(r"<figcaption>([^<]+): joint accuracy \d of 4 pictures", text)
    assert captions[1:] == ["Custom Diffusion", "Fuse-and-Refine"] and captions[0].startswith("The base")
    assert 'src="http' not in text and "file:" not in text  # one page that needs nothing else
    for folder in ("run-custom-diffusion", "run-far"):
        assert len(read_metrics(page.parent / folder / "metrics.jsonl")) == 2
        weights = FarWeights.load(page.parent / folder / "weights.safetensors")
        assert list(weights.embeddings) == ["<rex-dog>", "<max-dog>"]
    assert all(m["refinement"] == 0 for m in read_metrics(page.parent / "run-custom-diffusion" / "metrics.jsonl"))
    assert all(m["refinement"] > 0 for m in read_metrics(page.parent / "run-far" / "metrics.jsonl"))
    assert load_photo(page.parent / "main-grid.png").image.shape == (3 * SIZE, 2 * SIZE, 3)
    assert {"extracting", "regularization images", "fusing", "Custom Diffusion", "Fuse-and-Refine"} <= set(phases)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        demo.run_demo(tmp_path, "cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="mine.txt: is a file"):
        demo.run_demo(tmp_path / "mine.txt", "cpu")
