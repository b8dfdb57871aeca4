"""The work that the speed benchmark measures in all modes: pictures of two concepts, on a base of any size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from far_train.data.captions import Name, join_phrases
from far_train.data.concepts import Composite, Concept, TrainingSet
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner, plain_vocabulary
from far_train.models.families import SD21, Family
from far_train.models.loading import build_parts, load_tokenizer
from far_train.training.recipe import TrainingRun
from far_train.training.settings import TrainConfig

from .counting import Counts, counting
from .reference import CustomDiffusion

NAMES = tuple(Name("dog", f"<{which}-dog>") for which in ("first", "second", "third", "fourth"))
CONCEPTS = 2
POOL = 2  # pictures of each half; their number doesn't change the cost of a step


class RandomPictures:
    """A training set of noise: ``count`` composites of all concepts, side by side, and as many class pictures."""

    def __init__(self, size: int, count: int = POOL, concepts: int = CONCEPTS):
        self.names, self.size, self._count = NAMES[:concepts], size, count

    def digest(self) -> str:
        return f"random {self.size} {self._count} {len(self.names)}"

    def composite_count(self) -> int:
        return self._count

    def prior_count(self) -> int:
        return self._count

    def composite(self, index: int) -> Composite:
        columns = torch.arange(self.size) * len(self.names) // self.size
        subjects = [(n, (columns == i).float().expand(self.size, -1)) for i, n in enumerate(self.names)]
        return Composite.build(self._noise(index), f"a photo of {join_phrases(self.names)}", subjects, "pair")

    def prior(self, index: int) -> Composite:
        return Composite(self._noise(self._count + index), "a photo of a dog", (), "prior")

    def _noise(self, seed: int) -> Tensor:
        return torch.rand(self.size, self.size, 3, generator=torch.Generator().manual_seed(seed))


def random_concepts(size: int, photos: int) -> list[Concept]:
    """Both concepts with ``photos`` pictures each, and a disc as mask."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 3) ** 2).float()
    return [
        Concept(n.token or "", n.noun, tuple(torch.rand(size, size, 3) for _ in range(photos)), (disc,) * photos)
        for n in NAMES[:CONCEPTS]
    ]


def random_base(
    configs: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32, family: Family = SD21
) -> BaseModel:
    """A base of these configs with random weights: as fast as a trained one.

    UNet and text encoders are in ``dtype``, the VAE in fp32.
    """
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        parts = build_parts(family, configs, device)
    finally:
        torch.set_default_dtype(before)
    if dtype != torch.float32:
        with torch.device(device):
            parts["vae"] = type(parts["vae"]).from_config(configs["vae"])
    for part in parts.values():
        part.requires_grad_(False).eval()
    side = configs["unet"]["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return _Built(
        family=family,
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoders=tuple(parts[spec.part] for spec in family.text_encoders),
        tokenizer=load_tokenizer(configs["tokenizer"]),
        scheduler=configs["scheduler"],
        prediction_type=configs["scheduler"]["prediction_type"],
        native_size=side,
        digest="random",
    )


class _Built(BaseModel):
    """A base that stays on its device. Fake weights can't be moved, and have no values for a fingerprint."""

    fingerprint = "random"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        return self


# Modes of a step: settings that change what it computes, or what it keeps for the backward pass.
STEP_MODES: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast"},
    "preserving": {"memory": "fast", "output_preservation": True},
    "lean": {"memory": "lean"},
}


def work_config(batch: int, **settings: Any) -> TrainConfig:
    """A training with ``batch`` samples per step, half of them class pictures; a single sample is a composite.

    By default it learns the images alone, as the reference does.
    """
    settings = {"output_preservation": False} | settings
    return TrainConfig(steps=10**6, batch_size=batch - batch // 2, prior_batch_size=batch // 2, **settings)


@contextmanager
def our_run(
    base: BaseModel, size: int, config: TrainConfig, pictures: TrainingSet | None = None
) -> Iterator[TrainingRun]:
    """A FaR training, set up and ready to take steps; by default on random pictures."""
    with tempfile.TemporaryDirectory() as folder:
        with TrainingRun(base, pictures or RandomPictures(size), config, Path(folder) / "run") as run:
            yield run


@contextmanager
def reference_run(base: BaseModel, size: int, batch: int) -> Iterator[CustomDiffusion]:
    """The same training by the reference."""
    pictures = RandomPictures(size)
    halves = [pictures.composite(i) for i in range(batch - batch // 2)] + [pictures.prior(i) for i in range(batch // 2)]
    reference = CustomDiffusion(base, pictures.names, halves, batch // 2)
    try:
        yield reference
    finally:
        reference.remove()


def count_steps(configs: dict[str, Any], size: int, batch: int, dtype: torch.dtype) -> dict[str, Counts]:
    """Counts of one step of each mode, and of the parts of a run, on fake tensors: nothing is computed.

    Modes are ``reference`` and those of ``STEP_MODES``. Parts, for one sample: ``unet forward``, ``text encoder``,
    ``vae encode``, ``vae decode``.
    """
    counted = {}
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = random_base(configs, dtype=dtype)
        constants: list[Tensor] = []
        for part in base.parts.values():
            constants += [*part.parameters(), *part.buffers()]
        for mode, settings in STEP_MODES.items():
            config = work_config(batch, device="cpu", precision=precision, **settings)
            with our_run(base, size, config) as run:
                run.take_step()
                with counting(constants) as counts:
                    run.take_step()
                counted[mode] = counts
        with reference_run(base, size, batch) as reference:
            with counting():
                reference.take_step()  # the first makes the optimizer's state
            on_host = [state["step"] for state in reference.optimizer.state.values()]
            with counting(constants, on_host) as counts:
                reference.take_step()
            counted["reference"] = counts
        counted |= _count_parts(base, size, constants)
    return counted


@torch.no_grad()
def _count_parts(base: BaseModel, size: int, constants: list[Tensor]) -> dict[str, Counts]:
    vocabulary = plain_vocabulary(base)
    prompts = [vocabulary.tokenize("a photo of a dog")]
    conditioning = TextConditioner(base).encode(prompts, (size, size))
    side = size // base.downscale
    latents = torch.zeros(1, base.unet.config.in_channels, side, side)
    time = torch.zeros(1, dtype=torch.long)
    works = {
        "unet forward": lambda: base.unet(
            latents.to(conditioning.context.dtype), time, conditioning.context, **conditioning.unet_kwargs()
        ),
        "text encoder": lambda: TextConditioner(base).encode(prompts, (size, size)),
        "vae encode": lambda: base.vae.encode(torch.zeros(1, 3, size, size)),
        "vae decode": lambda: base.vae.decode(latents),
    }
    counted = {}
    for name, work in works.items():
        with counting(constants) as counted[name]:
            work()
    return counted
