"""The latent cache: each training image as latents, its caption as token ids, its masks at latent and at map size.

An image is encoded once and trained on many times. The batch of a step depends on the seed and the step's number alone,
so that a resumed run and a run on several GPUs see the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.concepts import Composite, TrainingSet, picture_at
from ..data.dataset import DatasetFolder
from ..models.base import BaseModel
from ..models.tokens import TokenizedPrompt, Vocabulary
from ..utils.ahead import computed_ahead, threads_beside
from ..utils.errors import CaptionError
from ..utils.out_of_memory import in_batches, with_less_memory
from ..utils.seeding import derive_seed
from .distributed import World
from .encodings import Encodings

ENCODE_BATCH = 8  # images that a GPU encodes at once


@dataclass(frozen=True, eq=False)
class Sample:
    """A training image, encoded.

    ``latents`` [C, h, w]; per mention: ``cell_masks`` [N, h, w], ``map_masks`` [N, a, b] at the attention maps' size,
    ``token_select`` and ``noun_select`` [N, length], rows that average over the tokens of the placeholder and of the
    class noun.
    """

    latents: Tensor
    prompt: TokenizedPrompt
    cell_masks: Tensor
    map_masks: Tensor
    token_select: Tensor
    noun_select: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side, with noise [B, C, h, w] and timesteps [B]. Every field has one entry per sample.

    Mentions are padded to the same count N; ``is_instance`` [B] is False for regularization images. ``prompts`` are
    empty in a captured step, which gets the token ids as a tensor.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: tuple[TokenizedPrompt, ...]
    is_instance: Tensor
    cell_masks: Tensor
    map_masks: Tensor
    token_select: Tensor
    noun_select: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, Tensor]:
        """All fields but the prompts, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def __getitem__(self, samples: slice) -> Batch:
        """Some of the samples, as a batch."""
        return Batch(**{k: tensor[samples] for k, tensor in self.tensors().items()}, prompts=self.prompts[samples])

    @property
    def is_concept(self) -> Tensor:
        """[B, N]: mentions that have a placeholder token."""
        return self.token_select.sum(-1) > 0

    @property
    def is_mention(self) -> Tensor:
        """[B, N]: rows that are mentions and not padding."""
        return self.noun_select.sum(-1) > 0

    def to(self, device: torch.device) -> Batch:
        """Move all tensors; to a GPU from pinned memory, in the background."""

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return Batch(**{k: move(tensor) for k, tensor in self.tensors().items()}, prompts=self.prompts)


@dataclass(frozen=True, eq=False)
class LatentCache:
    """All training images, encoded: composites and regularization images."""

    composites: list[Sample]
    class_images: list[Sample]

    def prompts(self) -> list[TokenizedPrompt]:
        """The caption of every image, composites first."""
        return [sample.prompt for sample in (*self.composites, *self.class_images)]

    @cached_property
    def max_mentions(self) -> int:
        """The largest number of mentions in a caption."""
        return max((len(sample.cell_masks) for sample in (*self.composites, *self.class_images)), default=0)

    def sample_batch(
        self, counts: tuple[int, int], timesteps: int, *, seed: int, step: int, mentions: int | None = None
    ) -> Batch:
        """The batch of ``step``: ``counts`` composites and regularization images, each with its own noise and timestep.

        ``timesteps``: how many the noise schedule has. ``mentions``: how many every sample is padded to; default: as
        many as one of them has. Each image comes up once before any comes up again.
        """
        samples, noises, times, is_instance = [], [], [], []
        for stream, cached, count in zip(("composite", "prior"), (self.composites, self.class_images), counts):
            for place in range(count if cached else 0):
                number = step * count + place
                samples.append(cached[_shuffled(len(cached), number, seed, stream)])
                generator = torch.Generator().manual_seed(derive_seed(seed, f"{stream} noise", number))
                times.append(torch.randint(timesteps, (), generator=generator))
                noises.append(torch.randn(samples[-1].latents.shape, generator=generator))
                is_instance.append(stream == "composite")
        if mentions is None:
            mentions = max((len(s.cell_masks) for s in samples), default=0)

        def padded(field: str) -> Tensor:
            rows = [getattr(s, field) for s in samples]
            return torch.stack([F.pad(r, [0, 0] * (r.ndim - 1) + [0, mentions - len(r)]) for r in rows])

        return Batch(
            latents=torch.stack([s.latents for s in samples]),
            noise=torch.stack(noises),
            timesteps=torch.stack(times),
            prompts=tuple(s.prompt for s in samples),
            is_instance=torch.tensor(is_instance),
            cell_masks=padded("cell_masks"),
            map_masks=padded("map_masks"),
            token_select=padded("token_select"),
            noun_select=padded("noun_select"),
        )


def cache_latents(
    training_set: TrainingSet,
    base: BaseModel,
    vocabulary: Vocabulary,
    map_stride: int,
    *,
    seed: int,
    encodings: Encodings | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentCache:
    """Encode all composites and regularization images; of several processes, each encodes a part.

    ``map_stride``: latent cells per cell of the supervised attention maps. ``encodings``: those of earlier runs, to
    which the new ones are added. Calls ``on_progress(done, total)``, which may raise to stop.
    """
    world = World.current()
    composites = training_set.composite_count()
    total = composites + training_set.prior_count()
    at_once = first_encode_batch(base)
    samples: list[Sample] = []
    waiting: list[tuple[Sample, Tensor, int]] = []  # this process's, with their images and numbers

    def shrink(size: int) -> None:
        nonlocal at_once
        at_once = size

    def encode_waiting() -> None:
        encoded = _encode([image for _, image, _ in waiting], base.vae, shrink)
        for (sample, image, number), (mean, std) in zip(waiting, encoded):
            sample.latents.copy_(draw(number, mean, std))
            if encodings is not None:
                encodings.keep(image, mean, std)
        waiting.clear()

    def draw(number: int, mean: Tensor, std: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "latents", number))
        drawn = mean + std * torch.randn((1, *mean.shape), generator=generator)[0]
        return (drawn * base.vae.config.scaling_factor).float()

    threads = threads_beside(base.device, world.size_here)  # a GPU encodes faster than one core fuses
    with computed_ahead(partial(picture_at, training_set), total, threads) as pictures:
        for i in range(total):
            on_progress(i, total)
            picture = next(pictures)
            try:
                prompt = vocabulary.tokenize(picture.caption)
            except CaptionError as e:
                which = f"composite {i}" if i < composites else f"regularization image {i - composites}"
                raise CaptionError(f"{which} of the dataset: {e}") from e  # of one in memory; files were checked before
            sides = (s // base.downscale for s in picture.image.shape[:2])
            samples.append(_sample(picture, prompt, torch.zeros(base.vae.config.latent_channels, *sides), map_stride))
            if i % world.size != world.rank:
                continue
            if encodings is not None and (known := encodings.find(picture.image)):
                samples[-1].latents.copy_(draw(i, *known))
            else:
                if waiting and waiting[0][1].shape != picture.image.shape:
                    encode_waiting()
                waiting.append((samples[-1], picture.image, i))
                if len(waiting) >= at_once:
                    encode_waiting()
        if waiting:
            encode_waiting()
    world.barrier()
    world.all_reduce_sum([s.latents for s in samples])  # those encoded elsewhere are zeros here
    on_progress(total, total)
    return LatentCache(samples[:composites], samples[composites:])


def first_encode_batch(base: BaseModel) -> int:
    """How many images to encode at once, as long as memory lasts."""
    return ENCODE_BATCH if base.device.type == "cuda" else 1


def check_captions(training_set: TrainingSet, base: BaseModel, vectors: int) -> None:
    """Refuse a dataset folder with a caption that is too long for ``base``, before anything is done with it.

    ``vectors``: embedding vectors of each placeholder token. Raises CaptionError naming the file, TokenError.
    """
    if not isinstance(training_set, DatasetFolder):
        return
    vocabulary = Vocabulary(base.tokenizer, training_set.names, base.tokenizer_size, vectors)
    for path, caption in training_set.captions():
        try:
            vocabulary.tokenize(caption)
        except CaptionError as e:
            raise CaptionError(f"{path}: {e}") from e


@torch.no_grad()
def _encode(images: Sequence[Tensor], vae: nn.Module, on_smaller: Callable[[int], None]) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation [C, h, w] on the CPU of images [H, W, 3] of one size.

    ``on_smaller(size)``: no more than so many fit at once.
    """

    def encode(batch: range) -> list[tuple[Tensor, Tensor]]:
        pixels = torch.cat([images[i].permute(2, 0, 1)[None].to(vae.dtype) * 2 - 1 for i in batch])
        posterior = vae.encode(pixels.to(vae.device)).latent_dist
        return list(zip(posterior.mean.cpu(), posterior.std.cpu()))

    def encode_or_move(batch: range) -> list[tuple[Tensor, Tensor]]:
        return encode(batch) if len(batch) > 1 else with_less_memory(vae, lambda: encode(batch))

    return in_batches(encode_or_move, len(images), len(images), "images to encode", on_smaller)


def _sample(picture: Composite, prompt: TokenizedPrompt, latents: Tensor, map_stride: int) -> Sample:
    mentions = picture.mentions
    masks = torch.stack([m.mask for m in mentions]) if mentions else torch.zeros(0, *picture.image.shape[:2])
    cells = tuple(latents.shape[-2:])
    maps = tuple(-(-side // map_stride) for side in cells)
    select = [(average_tokens(prompt, m.spans.token), average_tokens(prompt, m.spans.noun)) for m in mentions]
    empty = torch.zeros(0, len(prompt.ids))
    return Sample(
        latents=latents,
        prompt=prompt,
        cell_masks=F.adaptive_avg_pool2d(masks, cells),
        map_masks=F.adaptive_avg_pool2d(masks, maps),
        token_select=torch.stack([s[0] for s in select]) if select else empty,
        noun_select=torch.stack([s[1] for s in select]) if select else empty,
    )


def average_tokens(prompt: TokenizedPrompt, span: tuple[int, int] | None) -> Tensor:
    """A row [length] of weights that averages over the tokens of ``span``; zeros without a span."""
    row = torch.zeros(len(prompt.ids))
    if span is not None:
        positions = prompt.positions(span)
        row[list(positions)] = 1 / len(positions)
    return row


def _shuffled(size: int, number: int, seed: int, stream: str) -> int:
    """The ``number``-th draw from ``size`` items: every item once per round, each round in its own order."""
    return int(_order(size, derive_seed(seed, f"{stream} order", number // size))[number % size])


@lru_cache(maxsize=8)
def _order(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
