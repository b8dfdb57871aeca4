"""What people edit in a dataset folder is what the next training learns: nothing encoded before the edit is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from far_train.cli.main import main
from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.models.base import BaseModel
from far_train.models.loading import load_base
from far_train.models.tokens import Vocabulary
from far_train.models.weights import FarWeights
from far_train.training.latent_cache import LatentCache, Sample, cache_latents
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig

from .cats import SIZE, fuse_cats
from .command_line import refused

QUICK = TrainConfig(steps=2, sample_every=0, batch_size=6, prior_batch_size=1, device="cpu")
CAPTION, MASK, PICTURE = (f"composites/0000{ending}" for ending in (".txt", ".0.mask.png", ".png"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(fuse_cats(), tmp_path / "cats")
    return tmp_path / "cats"


def edit_caption(folder: Path) -> None:
    path = folder / CAPTION
    path.write_text(path.read_text().strip() + ", at noon\n")


def redraw_mask(folder: Path) -> None:
    """The mask of the first subject becomes a pixel: as little as can be marked."""
    mask = Image.new("L", (SIZE, SIZE))
    mask.putpixel((17, 42), 255)
    mask.save(folder / MASK)


def repaint(folder: Path) -> None:
    Image.new("RGB", (SIZE, SIZE), (200, 30, 90)).save(folder / PICTURE)


def encoded(folder: Path, base: BaseModel) -> LatentCache:
    dataset = DatasetFolder(folder)
    vocabulary = Vocabulary(base.tokenizer, dataset.names, base.tokenizer_size, 1)
    return cache_latents(dataset, base, vocabulary, 4, seed=0)


def differences(one: Sample, other: Sample) -> set[str]:
    pairs = {name: (value, getattr(other, name)) for name, value in vars(one).items()}
    return {name for name, (a, b) in pairs.items() if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [(edit_caption, {"prompt"}), (redraw_mask, {"cell_masks", "map_masks"}), (repaint, {"latents"})],
)
def test_an_edit_is_encoded_and_nothing_else_changes(folder: Path, base: BaseModel, edit: Callable, changed: set[str]):
    before = encoded(folder, base)
    edit(folder)
    after = encoded(folder, base)
    assert [differences(*pair) for pair in zip(before.composites, after.composites, strict=True)] == [changed] + 5 * [
        set()
    ]


def test_a_pixel_of_a_mask_is_not_lost_at_latent_size(folder: Path, base: BaseModel):
    """A mask that is empty at latent size would be a subject that isn't learned."""
    redraw_mask(folder)
    sample = encoded(folder, base).composites[0]
    cells, maps = torch.zeros(SIZE // 8, SIZE // 8), torch.zeros(SIZE // 32, SIZE // 32)
    cells[42 // 8, 17 // 8], maps[42 // 32, 17 // 32] = 1 / 8**2, 1 / 32**2
    assert torch.allclose(sample.cell_masks[0], cells) and torch.allclose(sample.map_masks[0], maps)


def test_the_next_training_learns_the_edits(folder: Path, base: BaseModel, tiny_folder: Path, tmp_path: Path):
    """With the base that was trained on before, as with one that has seen nothing."""

    def learned(base: BaseModel, name: str) -> FarWeights:
        return train(base, DatasetFolder(folder), QUICK, tmp_path / name)

    before = learned(base, "before")
    edit_caption(folder)
    redraw_mask(folder)
    after = learned(base, "after")
    assert after.digest() == learned(load_base(tiny_folder), "elsewhere").digest() != before.digest()
    assert all(torch.isfinite(after.delta(name)).all() for name in after.shapes())


def test_a_run_is_not_resumed_with_an_edited_dataset(folder: Path, tiny_folder: Path, tmp_path: Path, capsys):
    argv = ["train", "--base", tiny_folder, "--dataset", folder, "--out", tmp_path / "run", "--device", "cpu"]
    argv += ["--steps", "1", "--sample-every", "0", "--batch-size", "1", "--prior-batch-size", "1"]
    assert main([str(a) for a in argv]) == 0
    edit_caption(folder)
    redraw_mask(folder)
    refused(capsys, [*argv, "--resume"], "dataset (its content changed)", f"changed: {CAPTION}, {MASK}")
