"""Time, memory and disk that a training will need, measured on a few of its own steps."""

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
from ..models.settings import SampleConfig
from ..models.tokens import Vocabulary
from ..models.weights import FarWeights
from ..utils.wording import duration, size_in_words
from .callbacks import Callbacks
from .checkpoints import checkpoint_bytes, weights_bytes
from .class_images import count_missing
from .recipe import CHECK_PICTURES, TrainingRun
from .settings import TrainConfig

TRIAL_STEPS = 2  # after a first one that warms up
TRIAL_SAMPLING = (1, 3)  # sampling steps of two trial pictures; their difference is the time of a step


@dataclass(frozen=True)
class Cost:
    """The estimate. Seconds are per step or picture; ``memory``, at its peak on the device, and ``disk`` are in bytes.

    ``encoded``, ``drawn``, ``sampled``, ``checked`` count the images of the dataset, the regularization images that the
    base must draw first, the sample pictures, and those that are drawn to check the result; how long it takes to judge
    these is not known. ``disk`` counts saved pictures as they are before PNG compresses them.
    """

    device: str
    steps: int
    step_seconds: float
    encoded: int
    encode_seconds: float
    drawn: int
    draw_seconds: float
    sampled: int
    checked: int
    sample_seconds: float
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        """Duration of the whole training."""
        parts = (
            (self.steps, self.step_seconds),
            (self.encoded, self.encode_seconds),
            (self.drawn, self.draw_seconds),
            (self.sampled + self.checked, self.sample_seconds),
        )
        return sum(count * each for count, each in parts)

    @property
    def words(self) -> str:
        """A line of text for each phase."""
        lines = []
        if self.drawn:
            lines.append(f"regularization images to draw: {self.drawn}, {duration(self.drawn * self.draw_seconds)}")
        lines += [
            f"pictures to encode: {self.encoded}, {duration(self.encoded * self.encode_seconds)}; "
            "fewer if earlier runs have kept them",
            f"steps: {self.steps}, {duration(self.steps * self.step_seconds)} ({self.step_seconds:.2f} s each)",
        ]
        if self.sampled:
            lines.append(f"sample pictures: {self.sampled}, {duration(self.sampled * self.sample_seconds)}")
        if self.checked:
            lines.append(f"pictures for the check: {self.checked}, {duration(self.checked * self.sample_seconds)}")
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
    is_checked: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Cost:
    """Take a few steps of this training, draw two pictures, and extrapolate. The base comes back as it was.

    ``steps_done``: of a run that is to be resumed, at its newest checkpoint. ``is_checked``: whether pictures will be
    drawn to check the result (``Callbacks.on_check``). Raises what the training would raise; Interrupted between
    pictures, steps and sampling steps, once ``should_stop`` says so.
    """
    ticks: list[float] = []  # a moment before each picture is encoded, and one after the last

    def on_phase(phase: str, _done: int, _total: int) -> None:
        if phase == "encoding":
            ticks.append(time.perf_counter())

    callbacks = Callbacks(on_phase=on_phase, should_stop=should_stop)
    generated = drawn = 0  # regularization images: of the run, and those of them that are not there yet
    if config.prior_batch_size and not training_set.prior_count():
        generated = config.num_class_images * len({name.noun for name in training_set.names})
        drawn = count_missing(training_set, base, config) if not steps_done else 0
    weights = _tensors(base)
    excerpt = _Excerpt(training_set, config.batch_size, config.prior_batch_size)
    prompts = config.sample_prompts or default_prompts(training_set.names)
    with (
        TemporaryDirectory(prefix="far-") as folder,
        TrainingRun(base, excerpt, config, Path(folder), callbacks=callbacks, start=start) as run,
    ):
        device, learned = run.state.device, run.state.adapter.named_parameters()
        with LiveBytes() as counted:
            _seconds(run.train_step, callbacks)  # warms up, and makes the optimizer's moments
        step_seconds = min(_seconds(run.train_step, callbacks) for _ in range(TRIAL_STEPS))
        # Now, in the precision of the training. Layers that others stand in for may be elsewhere, as with fp8_base.
        held = [t for t in (*weights, *_tensors(base), *learned.values()) if t.device.type == device.type]
        memory = _bytes_of(held) + counted.peak
        run.state.release_graphs()
        overhead, each = _time_sampling(base, run.state.vocabulary, prompts[0], training_set.size, callbacks)
    steps = max(config.steps_for(len(training_set.names)) - steps_done, 0)
    rounds = steps // config.sample_every if config.sample_every else 0
    sampled = rounds * len(prompts)
    return Cost(
        device=str(device),
        steps=steps,
        step_seconds=step_seconds,
        encoded=training_set.composite_count() + training_set.prior_count() + generated,
        encode_seconds=(ticks[-1] - ticks[0]) / (len(ticks) - 1),
        drawn=drawn,
        draw_seconds=overhead + config.class_image_steps * each,
        sampled=sampled,
        checked=CHECK_PICTURES * len(default_prompts(training_set.names)) if is_checked else 0,
        sample_seconds=overhead + config.sample_steps * each,
        memory=memory,
        disk=config.keep_checkpoints * checkpoint_bytes(learned)
        + weights_bytes(learned)
        + (drawn + sampled) * 3 * training_set.size**2,
    )


def _seconds(work: Callable[[], object], callbacks: Callbacks) -> float:
    """Seconds that a part of the trial takes. Raises Interrupted instead of beginning it."""
    callbacks.check_stop("trial")
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _time_sampling(
    base: BaseModel, vocabulary: Vocabulary, prompt: str, size: int, callbacks: Callbacks
) -> tuple[float, float]:
    """Seconds that a picture takes whatever its sampling steps, and seconds for each of them."""

    def draw(steps: int) -> None:
        config = SampleConfig(sampling_steps=steps, sample_batch=1)
        on_progress = callbacks.progress_of("trial")
        draw_pictures(base, vocabulary, [prompt], config, size=(size, size), on_progress=on_progress)

    few, more = TRIAL_SAMPLING
    few_seconds, more_seconds = _seconds(lambda: draw(few), callbacks), _seconds(lambda: draw(more), callbacks)
    each = max(more_seconds - few_seconds, 0.0) / (more - few)
    return max(few_seconds - few * each, 0.0), each


class _Excerpt:
    """The first images of a training set, as many as one step needs.

    A composite stands in for regularization images that are not drawn yet: it costs as much.
    """

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
    """Counts the bytes of the live tensors that operations create within this context: ``now``, and their ``peak``.

    Unlike the statistics of an allocator it works on every device. Tensors from before the context are not counted.
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


def _tensors(base: BaseModel) -> list[Tensor]:
    return [t for part in base.parts.values() for t in (*part.parameters(), *part.buffers())]


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each storage once: the learned ones may be part of the base's modules."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
