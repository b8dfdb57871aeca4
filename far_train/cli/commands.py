"""What each command of the command line does: read the inputs, call the library, say what was written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.concepts import ClassPicture
from ..data.dataset import DatasetFolder, write_dataset
from ..data.folder_inputs import read_backgrounds, read_concept, read_photos
from ..data.folders import list_photos
from ..data.fusion import ConceptFusion
from ..data.images import load_photo, save_picture
from ..data.subjects import Prompt, SubjectExtractor, extract_folder
from ..evaluation.sheets import checkerboard, contact_sheet, dataset_sheet, loss_curves, picture_grid, save_sheet
from ..models.apply import apply_weights
from ..models.base import BaseModel
from ..models.conditioning import plain_vocabulary
from ..models.export import export_embeddings, export_lora, file_stem
from ..models.loading import load_base
from ..models.sampling import draw_pictures
from ..models.weights import FarWeights, describe
from ..training.class_images import EVERYDAY_SCENES, draw_empty_scenes, parse_scenes, scene_path
from ..training.distributed import joined
from ..training.estimate import measure_cost
from ..training.latent_cache import check_captions
from ..training.recipe import Callbacks
from ..training.recipe import train as train_recipe
from ..training.run_folder import METRICS_FILE, read_metrics
from ..utils.config import ExtractConfig, FusionConfig, SampleConfig, TrainConfig, read_settings
from ..utils.devices import choose_device
from ..utils.errors import CheckpointError, ConfigError
from ..utils.files import make_folder, write_json, write_text
from ..utils.terminal import progress_bars, stop_on_interrupt
from .comfy_client import DEFAULT_HOST, RunningHost, read_workflow, run_workflow, set_inputs
from .comfy_grid import GridRunner, Run, collect, finished, plan, read_axis

log = logging.getLogger(__name__)

DATASET_FILES = "dataset-files.json"  # in a run folder: what it learns from, to name what changed
SHOWN = 96  # pictures on a contact sheet; JPEG ends at 65,535 pixels a side

Inputs = Mapping[str, Any]


# ---- extract


def extract(inputs: Inputs, config: ExtractConfig) -> None:
    out = Path(inputs["out"])
    extractor = None
    if inputs.get("sam"):
        from ..data.sam import load_sam

        device, _ = choose_device(str(inputs.get("device", "auto")))
        extractor = SubjectExtractor(load_sam(Path(inputs["sam"]), device), config)
    with progress_bars() as bars:
        report = extract_folder(
            Path(inputs["photos"]),
            out,
            extractor,
            _read_prompts(inputs),
            config,
            bars.phase("extracting"),
            keep_others=bool(inputs.get("keep_others")),
        )
    for line in report:
        if line.status == "skipped":
            log.warning("skipped: %s", line.detail)
    subjects = [p for p in (load_photo(path, 512) for path in list_photos(out)) if p.mask is not None][:SHOWN]
    preview = _beside(out, "preview.jpg")
    save_sheet(preview, contact_sheet([checkerboard(p.image, p.mask) for p in subjects], [p.name for p in subjects]))
    kept = sum(line.status == "ok" for line in report)
    print(f"{kept} of {len(report)} photos → {out}; look at {preview}")


def _beside(folder: Path, suffix: str) -> Path:
    """FOLDER.suffix: a sheet inside the folder would be taken for one of its pictures."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.{suffix}")


def _read_prompts(inputs: Inputs) -> Prompt | dict[str, Prompt] | None:
    given = [name for name in ("box", "points", "prompts") if inputs.get(name)]
    if "prompts" in given:
        if len(given) > 1:
            raise ConfigError(f"prompts: can't stand beside {given[0]}; give one of them")
        entries = inputs["prompts"]
        if not isinstance(entries, Mapping):
            entries = read_settings(Path(entries))
        return {str(name): _prompt(f"prompts, {name}", entry) for name, entry in entries.items()}
    return _prompt("box, points", {name: inputs[name] for name in given}) if given else None


def _prompt(where: str, entry: Any) -> Prompt:
    """A prompt from a mapping of lists, or from the command line's words."""
    if not isinstance(entry, Mapping) or set(entry) - {"box", "points"}:
        raise ConfigError(f"{where}: expected {{box: [x0, y0, x1, y1], points: [[x, y, 1], …]}}")
    try:
        box, points = entry.get("box"), entry.get("points") or ()
        if isinstance(box, str):
            box = [float(v) for v in box.split(",")]
        if isinstance(points, str):
            points = [p.split(",") for p in points.split()]
        return Prompt(
            box=tuple(float(v) for v in box) if box else None,
            points=tuple((float(x), float(y), int(label)) for x, y, label in points),
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}; write a box as X0,Y0,X1,Y1 and points as 'X,Y,1 X,Y,0'") from e


# ---- fuse


def _entries(inputs: Inputs, name: str, keys: Sequence[str]) -> list[list[str]]:
    """Repeated flags as lists; a settings file may hold mappings instead."""
    entries = []
    for entry in inputs.get(name) or ():
        values = [entry.get(k) for k in keys] if isinstance(entry, Mapping) else entry
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(keys) or None in values:
            raise ConfigError(f"{name}: expected {', '.join(keys)} in each entry, got {entry!r}")
        entries.append([str(v) for v in values])
    return entries


def fuse(inputs: Inputs, config: FusionConfig) -> None:
    out = Path(inputs["out"])
    side = 4 * config.size  # a small subject of a large photo still has pixels enough; whole cameras' worth is too many
    concepts = [
        read_concept(token, noun, Path(folder), side)
        for token, noun, folder in _entries(inputs, "concept", ("token", "noun", "folder"))
    ]
    priors = [
        ClassPicture(noun, photo.image, photo.mask, str(photo.path))
        for noun, folder in _entries(inputs, "prior", ("noun", "folder"))
        for photo in read_photos(Path(folder), side)
    ]
    backgrounds = read_backgrounds(Path(inputs["backgrounds"]), side) if inputs.get("backgrounds") else []
    fusion = ConceptFusion(concepts, priors, backgrounds, config)
    for note in fusion.notes:
        log.warning("%s", note)
    with progress_bars() as bars:
        dataset = write_dataset(fusion, out, about={"fusion": config.to_dict()}, on_progress=bars.phase("fusing"))
    sheet = out / "contact-sheet.jpg"
    shown = [dataset.composite(i) for i in range(min(24, dataset.composite_count()))]
    save_sheet(sheet, dataset_sheet(shown, dataset.names, columns=6))
    print(f"{dataset.composite_count()} composites and {dataset.prior_count()} class pictures → {out}; look at {sheet}")


# ---- train, generate


def _open_base(inputs: Inputs) -> BaseModel:
    return load_base(inputs["base"], prediction_type=inputs.get("prediction_type"), config=inputs.get("base_config"))


def train(inputs: Inputs, config: TrainConfig) -> None:
    out = Path(inputs["out"])
    dataset = DatasetFolder(Path(inputs["dataset"]))
    for note in dataset.notes:
        log.warning("%s", note)
    base = _open_base(inputs)
    check_captions(dataset, base, config.vectors_per_token)
    start = FarWeights.load(Path(inputs["continue_from"])) if inputs.get("continue_from") else None
    steps, kept = config.steps_for(len(dataset.names)), out / DATASET_FILES
    if inputs.get("dry_run"):
        done = read_metrics(out / METRICS_FILE) if (out / METRICS_FILE).exists() else []
        print(measure_cost(base, dataset, config, start=start, steps_done=len(done)).words)
        return
    with joined(config.device) as world, progress_bars() as bars, stop_on_interrupt() as should_stop:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bars("training", step, steps)
            bars.note(loss=f"{metrics['loss']:.4f}", refinement=f"{metrics['refinement']:.4f}")

        def on_phase(phase: str, done: int, total: int) -> None:
            if not kept.exists():  # the run is begun or found equal: these are its files
                write_json(kept, dataset.file_digests())
            bars(phase, done, total)

        callbacks = Callbacks(on_phase=on_phase, on_step=on_step, should_stop=should_stop)
        if not world.writes:
            callbacks = Callbacks(should_stop=should_stop)
        resume = bool(inputs.get("resume"))
        try:
            train_recipe(base, dataset, config, out, start=start, resume=resume, keep_base=False, callbacks=callbacks)
        except CheckpointError as e:
            changes = dataset.describe_changes(kept)
            raise CheckpointError(f"{e}. In {dataset.folder}: {changes}" if changes else str(e)) from e
    if not world.writes:
        return
    save_sheet(out / "curves.png", loss_curves(read_metrics(out / METRICS_FILE)))
    print(f"{steps} steps → {out / 'weights.safetensors'}; look at {out / 'curves.png'} and {out / 'samples'}")


def generate(inputs: Inputs, config: SampleConfig) -> None:
    out = Path(inputs["out"])
    prompts, count = _texts(inputs["prompt"]), _count(inputs, 1)
    weights = FarWeights.load(Path(inputs["weights"])) if inputs.get("weights") else None
    base = _open_base(inputs)
    device, dtype = choose_device(str(inputs.get("device", "auto")))
    vocabulary = apply_weights(weights, base, config) if weights else plain_vocabulary(base)
    base.to(device, dtype)
    make_folder(out)  # now, since a place that can't be written should not show after an hour of drawing
    texts = [p for p in prompts for _ in range(count)]
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdecimal()), default=-1)
    shown: list[Tensor] = []
    with progress_bars() as bars:
        starts = range(0, len(texts), config.sample_batch)
        for number, start in enumerate(starts):  # saved batch by batch, so that Ctrl-C loses little
            batch = texts[start : start + config.sample_batch]
            pictures = draw_pictures(
                base,
                vocabulary,
                batch,
                config.replace(sample_seed=config.sample_seed + start),
                on_progress=lambda done, steps, n=number: bars("drawing", n * steps + done, len(starts) * steps),
            )
            for i, (picture, text) in enumerate(zip(pictures, batch), first + start):
                write_text(out / f"{i:04d}.txt", text + "\n")
                save_picture(out / f"{i:04d}.png", picture)
            shown += list(pictures)[: SHOWN - len(shown)]
    grid = _beside(out, "grid.jpg")
    save_sheet(grid, picture_grid(shown, texts[: len(shown)]))
    print(f"{len(texts)} pictures → {out}; look at {grid}")


def scenes(inputs: Inputs, config: SampleConfig) -> None:
    out, each = Path(inputs["out"]), _count(inputs, 2)
    wanted = parse_scenes(_texts(inputs.get("scene") or EVERYDAY_SCENES.splitlines()))
    base = _open_base(inputs)
    base.to(*choose_device(str(inputs.get("device", "auto"))))
    make_folder(out)
    with progress_bars() as bars:
        drawn = draw_empty_scenes(base, wanted, each, out, config, on_progress=bars.phase("drawing"))
    for scene in wanted:
        for i in range(each):
            write_text(scene_path(out, scene.prompt, i).with_suffix(".txt"), scene.phrase + "\n")
    sheet = _beside(out, "grid.jpg")
    save_sheet(sheet, picture_grid([s.image for s in drawn[:SHOWN]], [s.phrase for s in drawn[:SHOWN]]))
    print(f"{len(drawn)} empty scenes → {out}; look at {sheet}")


def _texts(given: str | Sequence[Any]) -> list[str]:
    return [given] if isinstance(given, str) else [str(text) for text in given]


def _count(inputs: Inputs, default: int) -> int:
    count = inputs.get("count", default)
    if count < 1:
        raise ConfigError(f"count: {count!r} is no number of pictures; use 1 or more")
    return count


# ---- weights


def export(inputs: Inputs, _config: None) -> None:
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


def inspect(inputs: Inputs, _config: None) -> None:
    about = describe(FarWeights.load(Path(inputs["weights"])))
    if inputs.get("json"):
        print(json.dumps(about, indent=2))
        return
    for token, concept in about["concepts"].items():
        print(f"{token:24} {concept['noun']}, {concept['vectors']} vector(s)")
    deltas = "low_rank_deltas" if about["low_rank_deltas"] else "kv_deltas"
    for key in (deltas, "parameters", "family", "prediction_type", "base_digest", "steps", "size", "far_version"):
        print(f"{key:24} {about[key]}")


def queue(inputs: Inputs, _config: None) -> None:
    workflow = set_inputs(read_workflow(Path(inputs["workflow"])), _listed(inputs.get("set")))
    axes = [read_axis(workflow, text) for text in _listed(inputs.get("grid"))]
    hosts = [RunningHost(url) for url in _listed(inputs.get("host")) or [DEFAULT_HOST]]
    out = Path(inputs["out"]) if inputs.get("out") else None
    if axes:
        _queue_grid(plan(workflow, axes), len(axes[-1].values), hosts, out, bool(inputs.get("dry_run")))
        return
    if len(hosts) > 1:
        raise ConfigError("host: several hosts share the runs of a --grid; without one, name a single host")
    if inputs.get("dry_run"):
        print("1 run; nothing was queued")
        return
    files = run_workflow(workflow, hosts[0], out, _say)
    if out is not None:
        print(f"{len(files)} {'file' if len(files) == 1 else 'files'} → {out}")


def _queue_grid(runs: list[Run], columns: int, hosts: list[RunningHost], out: Path | None, dry_run: bool) -> None:
    if out is None:
        raise ConfigError("out: a --grid needs a folder; it keeps there what is done, and goes on where it stopped")
    if dry_run:
        for run in runs:
            print(f"{'done' if finished(run, out) else 'to do'}: {run.label}")
        print(f"{len(runs)} runs; nothing was queued")
        return
    make_folder(out)
    try:
        GridRunner(runs, hosts, out, _say).run()
    finally:
        done = [run for run in runs if finished(run, out)]
        if done:
            written = collect(runs, out, columns)
            print(f"{len(done)} of {len(runs)} runs → {out}; look at {written[-1]}")


def _listed(value: Any) -> list[str]:
    """What may be repeated: a settings file may hold one text in the place of a list."""
    return [value] if isinstance(value, str) else [str(v) for v in value or ()]


def _say(text: str) -> None:
    print(text, flush=True)


def demo(inputs: Inputs, _config: None) -> None:
    from ..mini.demo import run_demo

    with progress_bars() as bars:
        page = run_demo(Path(inputs.get("out") or "outputs/demo"), str(inputs.get("device") or "auto"), bars)
    print(f"Every stage's pictures → {page}")
