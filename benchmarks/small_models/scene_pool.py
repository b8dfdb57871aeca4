"""Scenes rendered once, on all cores, and read many times: an accelerator eats faster than the world is drawn.

A pool is a folder of safetensors files, each a chunk of scenes, written atomically: filling resumes where it stopped,
scene i depends on (pool_seed, i) alone, and a training can begin on the first chunks while others are being rendered.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from far_train.data.captions import TEMPLATES, Name, join_phrases
from far_train.mini.identity import FIELDS, identity_codes
from far_train.mini.scenery import BACKGROUNDS, PLACES
from far_train.mini.world import COUNT_SHARES, MOST_SPRITES, Scene, caption_for, render_scene
from far_train.utils.config import Config, setting
from far_train.utils.errors import DatasetError, Interrupted
from far_train.utils.files import write_json, write_tensors

from .held_out import held_out_identities

CAPTIONS = 6  # drawn per scene, so that a picture isn't tied to one wording
ABSENT = -1


@dataclass(frozen=True)
class PoolConfig(Config):
    """Which scenes a pool holds."""

    count: int = setting(180_000, "scenes in the pool; more can be added later", low=1, shapes_result=False)
    pool_seed: int = setting(1, "series of scenes; another series holds other scenes", low=0, high=2**31)
    picture_size: int = setting(128, "side of the pictures in pixels", low=64, high=512)
    chunk: int = setting(500, "scenes in each of the pool's files", low=1)
    hold_out: bool = setting(True, "leave out the identities that benchmarks take their subjects from")

    @property
    def chunks(self) -> int:
        """How many files the pool has."""
        return -(-self.count // self.chunk)


def label_map(scene: Scene) -> Tensor:
    """Which sprite owns each pixel: uint8 [H, W], 0 for none, i + 1 for sprite i."""
    labels = torch.zeros(scene.image.shape[:2], dtype=torch.uint8)
    for i, mask in enumerate(scene.masks):
        labels[mask > 0.5] = i + 1  # masks sum to 1 at most, so no pixel is claimed twice
    return labels


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in the world's words, or in the form in which FaR writes its own ("a photo of …, in a meadow")."""
    cast = [s.identity for s in scene.sprites]
    text, style = caption_for(cast, scene.background, rng), rng.random()
    if style < 0.4 or not cast:
        return text
    place = PLACES[scene.background][0]
    if style < 0.8:
        said = text.removeprefix("a picture of ")
        subjects = said.removesuffix(f" {place}")
        named = subjects != said
    else:
        coloured = rng.random() < 0.7
        order = rng.permutation(len(cast))
        names = [Name(f"{cast[i].body} {cast[i].noun}" if coloured else cast[i].noun) for i in order]
        subjects, named = join_phrases(names), rng.random() < 0.85
    caption = TEMPLATES[rng.integers(len(TEMPLATES))].format(subjects)
    return f"{caption}, {place}" if named else caption


def render_chunk(folder: Path, number: int, config: PoolConfig) -> None:
    """Render the scenes of one chunk and write its file."""
    held_out = held_out_identities() if config.hold_out else frozenset()
    images, labels, subjects, places, captions = [], [], [], [], []
    for index in range(number * config.chunk, (number + 1) * config.chunk):
        scene = render_scene(config.pool_seed, index, config.picture_size, held_out=held_out)
        images.append((scene.image * 255).round().to(torch.uint8))
        labels.append(label_map(scene))
        codes = [identity_codes(s.identity) for s in scene.sprites]
        subjects.append(codes + [[ABSENT] * len(FIELDS)] * (MOST_SPRITES - len(codes)))
        places.append(BACKGROUNDS.index(scene.background))
        rng = np.random.default_rng([config.pool_seed, index, 0xCA])
        captions.append([training_caption(scene, rng) for _ in range(CAPTIONS)])
    tensors = {
        "images": torch.stack(images),
        "labels": torch.stack(labels),
        "subjects": torch.tensor(subjects, dtype=torch.int8),
        "places": torch.tensor(places, dtype=torch.int8),
    }
    write_tensors(_chunk_path(folder, number), tensors, {"captions": json.dumps(captions)})


def _chunk_path(folder: Path, number: int) -> Path:
    return folder / f"scenes-{number:05d}.safetensors"


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked for the scenes
    torch.set_num_threads(1)


@contextmanager
def rendering(folder: Path, config: PoolConfig, workers: int) -> Iterator[dict[int, Future[None]]]:
    """Render what is missing of a pool on ``workers`` processes, in the background: chunk number → its job.

    On leaving, chunks that haven't been begun are dropped. Raises DatasetError if the folder holds other scenes.
    """
    missing = _missing_chunks(folder, config)
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and an open accelerator
    executor = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        yield {number: executor.submit(render_chunk, folder, number, config) for number in missing}
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def fill_pool(
    folder: Path,
    config: PoolConfig,
    workers: int = 0,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ScenePool:
    """Render what is missing of a pool, on ``workers`` processes (0: in this one), and open it.

    ``on_progress(done, total)`` counts scenes. Raises Interrupted when ``should_stop`` says so, DatasetError if the
    folder holds other scenes.
    """
    missing = _missing_chunks(folder, config)
    done = config.chunks - len(missing)

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(done * config.chunk, config.chunks * config.chunk)
        if should_stop():
            raise Interrupted(f"stopped after {done * config.chunk} scenes, which are saved; start again to resume")

    if not workers:
        for number in missing:
            render_chunk(folder, number, config)
            count()
    elif missing:
        with rendering(folder, config, workers) as jobs:
            for job in as_completed(jobs.values()):
                _wait_for(job)
                count()
    return ScenePool(folder, config)


def _wait_for(job: Future[None]) -> None:
    """Raises what the rendering of a chunk raised, DatasetError where its process is gone."""
    try:
        job.result()
    except BrokenProcessPool as e:
        raise DatasetError("rendering stopped: a process was killed, perhaps for want of memory; start again") from e


def describe_pool(config: PoolConfig) -> dict[str, Any]:
    """All that decides which scenes a pool holds, but for their number, in JSON types."""
    return {**config.result_shaping(), "captions": CAPTIONS, "count_shares": list(COUNT_SHARES)}


def _missing_chunks(folder: Path, config: PoolConfig) -> list[int]:
    """Numbers of the chunks that aren't rendered yet. Raises DatasetError if the folder holds other scenes."""
    path, wanted = folder / "pool.json", describe_pool(config)
    if not path.exists():
        write_json(path, wanted)
    elif json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise DatasetError(f"{folder}: holds scenes of other settings; choose another folder or delete it")
    return [n for n in range(config.chunks) if not _chunk_path(folder, n).exists()]


def as_pictures(images: Tensor) -> Tensor:
    """Images uint8 [n, S, S, 3] as an autoencoder takes them: float [n, 3, S, S] from -1 to 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class ScenePool:
    """The scenes of a pool. Raises DatasetError if chunks are missing or damaged.

    ``coming``: the jobs of chunks that are still being rendered (see :func:`rendering`); :meth:`grow` adds those that
    are ready. Fields of :meth:`take`, n rows: ``images`` uint8 [n, S, S, 3]; ``labels`` uint8 [n, S, S] (see
    :func:`label_map`); ``subjects`` int8 [n, 3, 6] (codes, -1 where there is no sprite); ``places`` int8 [n].
    """

    def __init__(self, folder: Path, config: PoolConfig, coming: Mapping[int, Future[None]] | None = None):
        self.folder, self.config, self.device = folder, config, torch.device("cpu")
        self.coming = coming or {}
        self.chunks: list[dict[str, Tensor]] = []
        self.held: dict[str, Tensor] = {}
        while self.grow():
            pass

    def grow(self) -> bool:
        """Open the next chunk; False if there is none, or it isn't rendered yet. Raises what its rendering raised."""
        number = len(self.chunks)
        job = self.coming.get(number)
        if number == self.config.chunks or (job and not job.done()):
            return False
        if job:
            _wait_for(job)
        path = _chunk_path(self.folder, number)
        try:
            with safe_open(path, "pt") as file:  # the tensors stay on disk until they are read
                self.chunks.append({name: file.get_tensor(name) for name in file.keys()})
        except (OSError, SafetensorError) as e:
            raise DatasetError(f"{path}: can't be read ({e}); delete it and fill the pool again") from e
        return True

    def __len__(self) -> int:
        return min(self.config.count, len(self.chunks) * self.config.chunk)

    def captions(self, number: int) -> list[list[str]]:
        """The captions of a chunk's scenes, ``CAPTIONS`` of each."""
        with safe_open(_chunk_path(self.folder, number), "pt") as file:
            return json.loads(file.metadata()["captions"])

    def hold(self, device: torch.device) -> ScenePool:
        """Give rows on ``device`` from now on, and keep all scenes there if they fit well within a card's memory."""
        if device != self.device:
            self.device, self.held = device, {}
            size = sum(t.numel() for chunk in self.chunks for t in chunk.values())
            if device.type == "cuda" and 3 * size < torch.cuda.mem_get_info(device)[0]:
                self.held = {k: torch.cat([c[k].to(device) for c in self.chunks]) for k in self.chunks[0]}
        return self

    def take(self, field: str, rows: Tensor) -> Tensor:
        """One field of the scenes ``rows`` [n]."""
        if self.held:
            return self.held[field][rows.to(self.device)]
        chunk = self.config.chunk
        return torch.stack([self.chunks[r // chunk][field][r % chunk] for r in rows.tolist()]).to(self.device)

    def pictures(self, rows: Tensor) -> Tensor:
        """The scenes ``rows`` [n] as :func:`as_pictures` gives them."""
        return as_pictures(self.take("images", rows))
