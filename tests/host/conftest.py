"""Fixtures of the host tests: find a ComfyUI, and start one for the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from far_train.models.weights import FarWeights

from ..tiny_sam import save_tiny, tiny_sam
from .comfy_server import ComfyServer
from .find_host import HOW_TO_GET_A_HOST, Host, find_host, find_python


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI to test on. Skips, and says how to get one, where there is none."""
    path = find_host()
    if path is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    return Host(path, find_python(path))


@pytest.fixture(scope="session")
def comfy(host: Host) -> Iterator[ComfyServer]:
    """One running host for all tests that need neither a restart nor an empty base directory."""
    with ComfyServer(host) as server:
        yield server


@pytest.fixture
def saved(comfy: ComfyServer, request: pytest.FixtureRequest) -> Callable[[FarWeights], str]:
    """Writes weights to models/far under a name of this test; returns the name."""

    def save(weights: FarWeights, suffix: str = "") -> str:
        name = f"{request.node.name.split('[')[0]}{suffix}.safetensors"
        weights.save(comfy.folder("models/far") / name)
        return name

    return save


@pytest.fixture
def template_files(comfy: ComfyServer) -> Iterator[None]:
    """Whatever the templates name, as empty files and folders: enough to open and to validate them."""
    names = {
        "checkpoints": (
            "v2-1_768-ema-pruned.safetensors",
            "sd_xl_base_1.0.safetensors",
            "sam3.1_multiplex_fp16.safetensors",
        ),
        "sams": ("sam_vit_b_01ec64.pth",),
        "far": ("two-dogs.safetensors", "two-dogs-sdxl.safetensors"),
    }
    made = [comfy.folder(f"models/{folder}") / name for folder, files in names.items() for name in files]
    datasets = [comfy.folder(f"output/far/datasets/{name}") for name in ("two-dogs", "two-dogs-sdxl")]
    made += [folder / "dataset.json" for folder in datasets]
    photos = [comfy.folder(f"input/{name}") for name in ("corgi", "chow", "husky")]
    made += [folder / "1.jpg" for folder in photos]  # an empty folder is refused
    folders = photos + [comfy.folder(f"output/far/datasets/{folder.name}/composites") for folder in datasets] + datasets
    for path in made:
        path.touch()
    yield
    for path in made:  # other tests share this host
        path.unlink()
    for folder in folders:
        folder.rmdir()


@pytest.fixture(scope="module")
def sam_file(comfy: ComfyServer) -> Path:
    """A small SAM with random weights in models/sams."""
    return save_tiny(comfy.folder("models/sams") / "tiny.safetensors", tiny_sam(3))
