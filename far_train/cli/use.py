"""Commands that use trained weights: generate, export, inspect."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.settings import SampleConfig
from ..utils.errors import ConfigError
from ..utils.terminal import progress_bars
from .parsing import NUMBER, SWITCH, Argument, Command, Inputs, repeatable
from .shared import BASE, DEVICE, MAX_SHOWN, beside, device_name, open_base, picture_count, texts

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def generate(inputs: Inputs, config: SampleConfig) -> None:
    """Write pictures and their prompts, numbered on from those in the folder, with a sheet of them beside it.

    The seed goes by the number, so that the same command again draws other pictures.
    """
    from ..data.images import save_picture
    from ..evaluation.sheets import picture_grid, save_sheet
    from ..models.apply import apply_weights
    from ..models.conditioning import plain_vocabulary
    from ..models.sampling import draw_pictures
    from ..models.weights import FarWeights
    from ..utils.devices import choose_device
    from ..utils.files import make_folder, write_text

    out = Path(inputs["out"])
    each = picture_count(inputs, 1)
    prompts = [p for p in texts(inputs["prompt"]) for _ in range(each)]
    if not inputs.get("weights"):
        for name in ("strength", "concept_strength"):
            if getattr(config, name) != getattr(SampleConfig, name):
                raise ConfigError(f"{name}: changes nothing without FaR weights; give --weights, or leave it out")
    weights = FarWeights.load(Path(inputs["weights"])) if inputs.get("weights") else None
    base = open_base(inputs)
    device, dtype = choose_device(device_name(inputs))
    vocabulary = apply_weights(weights, base, config) if weights else plain_vocabulary(base)
    base.to(device, dtype)
    make_folder(out)  # now, since a place that can't be written should not show after an hour of drawing
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdecimal()), default=-1)
    shown: list[Tensor] = []
    with progress_bars() as bars:
        starts = range(0, len(prompts), config.sample_batch)
        for number, start in enumerate(starts):  # saved batch by batch, so that Ctrl-C loses little
            batch = prompts[start : start + config.sample_batch]
            pictures = draw_pictures(
                base,
                vocabulary,
                batch,
                config.replace(sample_seed=config.sample_seed + first + start),
                on_progress=lambda done, steps, n=number: bars("drawing", n * steps + done, len(starts) * steps),
            )
            for i, (picture, prompt) in enumerate(zip(pictures, batch), first + start):
                write_text(out / f"{i:04d}.txt", prompt + "\n")
                save_picture(out / f"{i:04d}.png", picture)
            shown += list(pictures)[: MAX_SHOWN - len(shown)]
    grid = beside(out, "grid.jpg")
    save_sheet(grid, picture_grid(shown, prompts[: len(shown)]))
    print(f"{len(prompts)} pictures → {out}; look at {grid}")


GENERATE = Command(
    "generate",
    "draw pictures with a base model, with or without FaR weights",
    (
        *BASE,
        Argument("weights", "FaR weights file"),
        Argument("prompt", "a prompt, with <tokens> of the weights; repeat for several", True, repeatable("TEXT")),
        Argument("count", "pictures per prompt (default: 1)", options=NUMBER),
        Argument(
            "out",
            "folder for the pictures; existing ones are kept, and numbering continues: picture N uses seed "
            "sample_seed + N",
            required=True,
        ),
        DEVICE,
    ),
    generate,
    SampleConfig,
)


def export(inputs: Inputs, _: None) -> None:
    """Write one LoRA file and one embedding file per token."""
    from ..models.export import export_embeddings, export_lora, file_stem
    from ..models.weights import FarWeights

    path, out, rank = Path(inputs["weights"]), Path(inputs["out"]), inputs.get("rank")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: {rank!r} is no rank; use 1 or more, or leave it out for the exact deltas")
    weights = FarWeights.load(path)
    default = path.parent.name if path.stem == "weights" else path.stem
    name = str(inputs.get("name") or default or "far")
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"name: {name!r} is no plain file name")
    lora = out / "loras" / f"{name}.safetensors"
    files = [lora, *(out / "embeddings" / f"{file_stem(t)}.safetensors" for t in weights.embeddings)]
    before = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    export_lora(weights, lora, rank)
    embeddings = export_embeddings(weights, out / "embeddings")
    if over := [str(path) for path, time in before.items() if path.stat().st_mtime_ns != time]:
        log.warning("Written over other files of these names: %s", ", ".join(over))
    print(f"changes of the model → {lora}")
    for token, embedding in zip(weights.embeddings, embeddings):
        print(f"{token} → {embedding}; write it as embedding:{embedding.stem}")


EXPORT = Command(
    "export",
    "write stock LoRA and embedding files from FaR weights",
    (
        Argument("weights", "FaR weights file", required=True),
        Argument("out", "folder for loras/ and embeddings/", required=True),
        Argument("name", "name of the LoRA file (default: that of the weights file or its run)"),
        Argument("rank", "reduce the LoRA to this rank (default: exact)", options=NUMBER),
    ),
    export,
)


def inspect(inputs: Inputs, _: None) -> None:
    """Print the concepts and the provenance of a weights file."""
    from ..models.weights import FarWeights, describe

    about = describe(FarWeights.load(Path(inputs["weights"])))
    if inputs.get("json"):
        print(json.dumps(about, indent=2))
        return
    for token, concept in about["concepts"].items():
        print(f"{token:24} {concept['noun']}, {concept['vectors']} vector(s)")
    if about["low_rank_deltas"]:
        print(f"{'LoRA layers':24} {about['low_rank_deltas']}\n{'LoRA rank':24} {about['rank']}")
    else:
        print(f"{'K/V layers':24} {about['kv_deltas']}")
    for key in ("parameters", "family", "prediction_type", "base_digest", "steps", "size", "far_version"):
        print(f"{key:24} {about[key]}")


INSPECT = Command(
    "inspect",
    "show what a FaR weights file holds",
    (
        Argument("weights", "FaR weights file", required=True),
        Argument("json", "print JSON", options=SWITCH),
    ),
    inspect,
)
