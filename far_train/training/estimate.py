"""What a training will cost, measured before it starts: a few of its own steps, which leave nothing behind."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.captions import Name, default_prompts, with_article
from ..data.concepts import Composite, TrainingSet
from ..models.base import BaseModel
from ..models.sampling import draw_pictures
from ..models.tokens import Vocabulary
from ..models.weights import FarWeights
from ..utils.config import SampleConfig, TrainConfig
from ..utils.wording import duration, size_in_words
from .recipe import Callbacks, TrainingRun

TRIAL_STEPS = 2  # after a first one, which also warms up
TRIAL_SAMPLING = (1, 3)  # sampling steps of two trial pictures: what each step costs, and what comes on top


@dataclass(frozen=True)
class Cost:
    """What a training has before it. Seconds are of one step or picture; ``memory`` and ``disk`` in bytes.

    ``encoded``, ``drawn``, ``sampled``: pictures of the dataset, class pictures that the base must draw first, and
    sample pictures. ``memory``: at its peak, on the device.
    """

    device: str
    steps: int
    step_seconds: float
    encoded: int
    encode_seconds: float
    drawn: int
    draw_seconds: float
    sampled: int
    sample_seconds: float
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        parts = (
            (self.steps, self.step_seconds),
            (self.encoded, self.encode_seconds),
            (self.drawn, self.draw_seconds),
            (self.sampled, self.sample_seconds),
        )
        return sum(count * each for count, each in parts)

    @property
    def words(self) -> str:
        """For people, a line for each phase."""
        lines = [f"class pictures to draw: {self.drawn}, {duration(self.drawn * self.draw_seconds)}"] * bool(self.drawn)
        lines += [
            f"pictures to encode: {self.encoded}, {duration(self.encoded * self.encode_seconds)}",
            f"steps: {self.steps}, {duration(self.steps * self.step_seconds)} ({self.step_seconds:.2f} s each)",
        ]
        if self.sampled:
            lines.append(f"sample pictures: {self.sampled}, {duration(self.sampled * self.sample_seconds)}")
        lines += [
            f"in all: {duration(self.seconds)} on {self.device}",
            f"memory: about {size_in_words(self.memory)}; disk: about {size_in_words(self.disk)}",
        ]
        return "\n".join(lines)


def measure_cost(
    base: BaseModel,
    training_set: TrainingSet,
    config: TrainConfig,
    *,
    start: FarWeights | None = None,
    steps_done: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Cost:
    """Take a few steps of this training aside, draw two pictures, and count up. The base comes back as it was.

    ``steps_done``: of a run that is to be resumed. Raises what the training would raise, Interrupted as well.
    """
    clock: list[float] = []
    callbacks = Callbacks(on_phase=lambda *_: clock.append(time.perf_counter()), should_stop=should_stop)
    excerpt = _Excerpt(training_set, config.batch_size, config.prior_batch_size)
    with TemporaryDirectory(prefix="far-") as folder:
        run = TrainingRun(base, excerpt, config, Path(folder), callbacks=callbacks, start=start)
        try:
            run.set_up()
            encode_seconds = (clock[-1] - clock[0]) / max(len(clock) - 1, 1)
            with LiveBytes() as counted:
                run.train_step()  # warms up, and makes the optimizer's moments
            step_seconds = []
            for _ in range(TRIAL_STEPS):
                began = time.perf_counter()
                run.train_step()
                step_seconds.append(time.perf_counter() - began)
            learned = list(run.trainables.named_parameters().values())
            trained = sum(p.numel() for p in learned)
            prompts = config.sample_prompts or default_prompts(training_set.names)
            overhead, each = _time_sampling(base, run.vocabulary, prompts[0], training_set.size)
        finally:
            run.clean_up()
    steps = max(config.steps_for(len(training_set.names)) - steps_done, 0)
    nouns = {name.noun for name in training_set.names}
    lacks_priors = config.prior_batch_size and not training_set.prior_count() and not steps_done
    drawn = config.prior_pictures * len(nouns) if lacks_priors else 0
    rounds = steps // config.sample_every if config.sample_every else 0
    return Cost(
        device=str(run.device),
        steps=steps,
        step_seconds=min(step_seconds),
        encoded=training_set.composite_count() + max(training_set.prior_count(), drawn),
        encode_seconds=encode_seconds,
        drawn=drawn,
        draw_seconds=overhead + config.prior_steps * each,
        sampled=rounds * len(prompts),
        sample_seconds=overhead + config.sample_steps * each,
        memory=_bytes_of(base, learned) + counted.peak,
        disk=trained * (12 * config.keep_checkpoints + 2),  # values and two moments in fp32; in the end fp16 values
    )


def _time_sampling(base: BaseModel, vocabulary: Vocabulary, prompt: str, size: int) -> tuple[float, float]:
    """Seconds for a picture whatever its steps, and for each sampling step."""
    seconds = []
    for steps in TRIAL_SAMPLING:
        began = time.perf_counter()
        draw_pictures(base, vocabulary, [prompt], SampleConfig(sampling_steps=steps, sample_batch=1), size=(size, size))
        seconds.append(time.perf_counter() - began)
    each = max(seconds[1] - seconds[0], 0.0) / (TRIAL_SAMPLING[1] - TRIAL_SAMPLING[0])
    return max(seconds[0] - TRIAL_SAMPLING[0] * each, 0.0), each


class _Excerpt:
    """As many pictures of a training set as one step needs; a composite stands in for class pictures still to draw."""

    def __init__(self, training_set: TrainingSet, composites: int, priors: int):
        self._whole = training_set
        self._counts = (
            min(composites, training_set.composite_count()),
            min(priors, training_set.prior_count() or priors),
        )
        self.names: tuple[Name, ...] = training_set.names
        self.size = training_set.size
        self.digest = training_set.digest
        self.composite = training_set.composite

    def composite_count(self) -> int:
        return self._counts[0]

    def prior_count(self) -> int:
        return self._counts[1]

    def prior(self, index: int) -> Composite:
        if self._whole.prior_count():
            return self._whole.prior(index)
        noun = self.names[0].noun
        return Composite(self.composite(0).image, f"a photo of {with_article(noun)}", (), "prior")


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of all tensors that operations have made and that are still alive: ``now``, and ``peak``.

    Unlike an allocator's own statistics it counts on every device. Tensors made before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key, size = id(storage), storage.nbytes()
            if key not in self._alive and key not in given:  # a view of what was there before is nothing new
                self._alive.add(key)
                weakref.finalize(storage, self._remove, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes_of(base: BaseModel, learned: Sequence[Tensor]) -> int:
    """Of all weights; the learned ones may or may not be parts of the base's modules."""
    tensors = [t for part in base.parts.values() for t in (*part.parameters(), *part.buffers())] + list(learned)
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
