"""Items that threads compute ahead of the loop that uses them."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from far_train.data.dataset import write_dataset
from far_train.models.loading import load_base
from far_train.models.tokens import Vocabulary
from far_train.training import latent_cache
from far_train.utils import ahead
from far_train.utils.ahead import EACH, computed_ahead


def test_values_come_in_order_whichever_is_ready_first():
    second_ready = threading.Event()

    def work(i: int) -> int:
        if i == 0:
            assert second_ready.wait(60)
        if i == 1:
            second_ready.set()
        return i * i

    with computed_ahead(work, 50, 3) as values:
        assert list(values) == [i * i for i in range(50)]


def test_no_more_than_a_few_are_held_and_none_is_begun_after_the_end():
    begun = []
    with computed_ahead(lambda i: begun.append(i) or i, 100, 2) as values:
        assert list(islice(values, 5)) == [0, 1, 2, 3, 4]
    assert set(range(5)) <= set(begun) <= set(range(5 + 2 * EACH))
    assert not [t for t in threading.enumerate() if t.name.startswith("far-ahead")]


def test_an_error_is_raised_where_its_value_would_come():
    with computed_ahead(lambda i: 6 // (i - 2), 5, 4) as values:
        assert [next(values), next(values)] == [-3, -6]
        with pytest.raises(ZeroDivisionError):
            next(values)


def test_latents_and_datasets_are_the_same_with_any_number_of_threads(
    tiny_folder: Path, fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = load_base(tiny_folder)
    vocabulary = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size, 1)
    caches, folders = [], []
    for threads in (1, 4):
        monkeypatch.setattr(latent_cache, "threads_beside", lambda *_, threads=threads: threads)
        monkeypatch.setattr(ahead, "MOST_THREADS", threads)
        caches.append(latent_cache.cache_latents(fusion, base, vocabulary, 1, seed=3))
        folders.append(write_dataset(fusion, tmp_path / str(threads)))
    one, four = ([*c.composites, *c.class_images] for c in caches)
    assert len(one) == len(four) == fusion.composite_count() + fusion.prior_count()
    assert all(torch.equal(a.latents, b.latents) and a.prompt == b.prompt for a, b in zip(one, four))
    assert folders[0].file_digests() == folders[1].file_digests()
    index = [(folder.folder / "dataset.json").read_bytes() for folder in folders]
    assert index[0] == index[1]
