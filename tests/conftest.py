"""Fixtures that many tests share: tiny bases of each family's shape, two synthetic concepts, a small dataset."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.base import BaseModel
from far_train.models.families import FAMILIES, Family
from far_train.models.loading import load_base

from .host.tally import HostTally

torch.set_num_threads(1)  # more only wait for each other on models this small
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(HostTally())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base (128 px, v-prediction) in diffusers' layout."""
    configs = tiny_configs()
    return write_folder(tmp_path_factory.mktemp("tiny"), configs, random_states(configs))


@pytest.fixture
def base(tiny_folder: Path) -> BaseModel:
    """The tiny base, loaded anew for each test."""
    return load_base(tiny_folder)


@pytest.fixture(scope="session", params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def family_folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base of the family (128 px) in diffusers' layout."""
    configs = tiny_configs(family=family)
    return write_folder(tmp_path_factory.mktemp(family.key), configs, random_states(configs, family=family))


@pytest.fixture
def family_base(family_folder: Path) -> BaseModel:
    """The family's tiny base, loaded anew for each test."""
    return load_base(family_folder)


def disc(size: int, colour: tuple[float, float, float], centre: tuple[float, float], radius: float):
    """A coloured disc on grey noise: picture [size, size, 3] and its mask [size, size]."""
    generator = torch.Generator().manual_seed(int(1000 * sum(colour) + size))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = ((x - centre[0] * size) ** 2 + (y - centre[1] * size) ** 2 < (radius * size) ** 2).float()
    noise = 0.5 + 0.1 * torch.randn(size, size, 3, generator=generator)
    return (mask[..., None] * torch.tensor(colour) + (1 - mask[..., None]) * noise).clamp(0, 1), mask


@pytest.fixture(scope="session")
def concepts() -> list[Concept]:
    """Two concepts of one class, red and blue, with two photos each."""
    reds = [disc(96, (0.9, 0.1, 0.1), (0.5, 0.5), 0.3), disc(128, (0.9, 0.1, 0.1), (0.4, 0.6), 0.25)]
    blues = [disc(96, (0.1, 0.1, 0.9), (0.5, 0.5), 0.3), disc(120, (0.1, 0.1, 0.9), (0.6, 0.5), 0.3)]
    return [
        Concept("<red-ball>", "ball", tuple(i for i, _ in reds), tuple(m for _, m in reds)),
        Concept("<blue-ball>", "ball", tuple(i for i, _ in blues), tuple(m for _, m in blues)),
    ]


@pytest.fixture(scope="session")
def fusion(concepts: list[Concept]) -> ConceptFusion:
    """Twelve composites of 128 px with four class pictures."""
    priors = [ClassPicture("ball", *disc(96, (0.1, 0.8, 0.1 * i), (0.5, 0.5), 0.3)) for i in range(4)]
    return ConceptFusion(concepts, priors, (), FusionConfig(size=128, count=12))
