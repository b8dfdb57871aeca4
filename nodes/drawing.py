"""Pictures that a node draws with the base model, kept on disk and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..far_train.data.images import load_photo, to_pil
from ..far_train.models.settings import SampleConfig
from ..far_train.training.run_folder import IdentifiedBase
from ..far_train.training.settings import TrainConfig
from ..far_train.utils.devices import choose_device
from ..far_train.utils.files import make_folder, write_json
from . import host_folders, host_memory, host_models, host_ui
from .known_files import remember_files
from .live_view import DrawingView


def sampling_inputs(seed: str) -> list[Any]:
    """How a node draws with the base, read by :func:`sampling`; ``seed`` names the input of the seed."""
    return [
        io.Int.Input(
            seed,
            display_name="seed",
            default=0,
            min=0,
            max=2**53 - 1,
            control_after_generate=False,
            tooltip="Seed of the images. With the same seed, images on disk are reused.",
        ),
        io.Int.Input(
            "steps",
            default=TrainConfig.class_image_steps,
            min=1,
            max=200,
            tooltip="Sampling steps (DPM-Solver++). 20 are enough.",
        ),
        io.Float.Input(
            "guidance",
            display_name="CFG",
            default=SampleConfig.guidance,
            min=1.0,
            max=20.0,
            step=0.5,
            tooltip="Classifier-free guidance scale. 6 to 7.5 work well.",
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=2048,
            step=64,
            tooltip="Width and height in pixels. 0: the native size of the base model (Stable Diffusion 1.5: 512, 2.1: "
            "768, XL: 1024).",
        ),
    ]


def sampling(seed: int, steps: int, guidance: float) -> SampleConfig:
    return SampleConfig(sample_seed=seed, sampler="dpm++", sampling_steps=steps, guidance=guidance, sample_batch=1)


def draw_once(
    kind: str,
    models: tuple[Any, Any, Any],
    config: SampleConfig,
    size: int,
    paths: Callable[[Path], Sequence[Path]],
    draw: Callable[..., object],
    view: DrawingView,
) -> tuple[Path, Sequence[Path]]:
    """The folder of pictures and their files, made by ``draw(base, folder, size=, on_progress=, on_step=)``.

    ``models``: MODEL, CLIP and VAE, of which a base is built only if one of ``paths(folder)`` is missing.
    """
    with host_memory.no_inference_mode():
        about = host_models.identify_base(*models)
        side = size or about.native_size
        folder = drawn_folder(kind, about, config, side)
        files = paths(folder)
        if not all(path.exists() for path in files):
            with host_models.freed_base(*models) as base:
                base.to(*choose_device(str(host_memory.compute_device())))
                draw(
                    base,
                    folder,
                    size=side,
                    on_progress=lambda done, total: _show_progress(view, folder, done, total),
                    on_step=lambda _done, _total: host_ui.stop_if_interrupted(),
                )
    remember_files(view.node_id, files)
    return folder, files


def _show_progress(view: DrawingView, folder: Path, done: int, total: int) -> None:
    """Report the pictures drawn so far and show the newest. What is drawn is on disk, so a cancel loses nothing."""
    host_ui.stop_if_interrupted()
    newest = max(folder.rglob("*[0-9][0-9][0-9][0-9].png"), key=lambda p: p.stat().st_mtime_ns, default=None)
    view.update(done, total, None if newest is None else to_pil(load_photo(newest).image))


def drawn_folder(kind: str, base: IdentifiedBase, config: SampleConfig, size: int) -> Path:
    """Where what this base draws with these settings is kept. The number of pictures doesn't matter: it may grow.

    A training keeps its own regularization images under another key (``class_images.prior_key``), although they may be
    the same: that key is of the base in the precision in which it draws, and here none is built while all pictures are
    on disk.
    """
    settings = {
        "base": base.fingerprint,
        "prediction_type": base.prediction_type,
        "size": size,
        "prior_seed": config.sample_seed,
        "sampler": config.sampler,
        "steps": config.sampling_steps,
        "guidance": config.guidance,
    }
    if base.zero_terminal_snr:
        settings["zero_terminal_snr"] = True
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = make_folder(host_folders.output_folder() / "far" / kind / key)
    write_json(folder / "settings.json", settings)
    return folder
