"""Commands that make and examine training data: extract, fuse, doctor, scenes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import ExtractConfig, FusionConfig
from ..models.settings import DrawConfig
from ..utils.config import read_settings
from ..utils.errors import ConfigError, SubjectError
from ..utils.terminal import progress_bars
from .parsing import NUMBER, SWITCH, Argument, Command, Inputs, repeatable
from .shared import BASE, DEVICE, MAX_SHOWN, beside, device_name, open_base, picture_count, texts

if TYPE_CHECKING:
    from ..data.subjects import Prompt

log = logging.getLogger(__name__)


# ---- extract


def extract(inputs: Inputs, config: ExtractConfig) -> None:
    """Write the subjects of a folder of photos with their masks, and a sheet of them beside the folder."""
    from ..data.folders import list_photos
    from ..data.images import load_photo
    from ..data.sam import load_sam
    from ..data.subjects import SubjectExtractor, extract_folder
    from ..evaluation.sheets import checkerboard, contact_sheet, save_sheet
    from ..utils.devices import choose_device

    out, extractor = Path(inputs["out"]), None
    if inputs.get("sam"):
        device, _ = choose_device(device_name(inputs))
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
    photos = (load_photo(path, 512) for path in list_photos(out))
    subjects = [p for p in photos if p.mask is not None][:MAX_SHOWN]
    preview = beside(out, "preview.jpg")
    save_sheet(preview, contact_sheet([checkerboard(p.image, p.mask) for p in subjects], [p.name for p in subjects]))
    kept = sum(line.status == "ok" for line in report)
    print(f"{kept} of {len(report)} photos → {out}; look at {preview}")


def _read_prompts(inputs: Inputs) -> Prompt | dict[str, Prompt] | None:
    given = [name for name in ("box", "points", "prompts") if inputs.get(name)]
    if "prompts" in given:
        if len(given) > 1:
            raise ConfigError(f"prompts: can't stand beside {given[0]}; give one of them")
        entries = inputs["prompts"]
        if not isinstance(entries, Mapping):
            entries = read_settings(Path(entries), "prompts")
        return {str(name): _prompt(f"prompts, {name}", entry) for name, entry in entries.items()}
    return _prompt("box, points", {name: inputs[name] for name in given}) if given else None


def _prompt(where: str, entry: Any) -> Prompt:
    """A prompt from a mapping of lists, or from the command line's words."""
    from ..data.subjects import Prompt

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
    except SubjectError as e:
        raise SubjectError(f"{where}: {e}") from e
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}; write a box as X0,Y0,X1,Y1 and points as 'X,Y,1 X,Y,0'") from e


EXTRACT = Command(
    "extract",
    "cut the subjects out of a folder of photos",
    (
        Argument("photos", "folder of photos; NAME.mask.png or an alpha channel is taken as the mask", required=True),
        Argument("out", "folder for NAME.png and NAME.mask.png", required=True),
        Argument("sam", "Segment Anything weights, .safetensors or .pth; needed for photos without a mask"),
        Argument(
            "box",
            "the subject's box in pixels of the original photo, the same in each photo: X0,Y0,X1,Y1",
            structured=True,
        ),
        Argument(
            "points",
            "points in pixels of the original photo, 1 on the subject, 0 off it: 'X,Y,1 X,Y,0'",
            structured=True,
        ),
        Argument("prompts", "JSON or YAML file: photo name → {box: [x0,y0,x1,y1], points: [[x,y,1]]}", structured=True),
        Argument(
            "keep_others",
            "allow an output folder that holds pictures of other photos; they are used for training as well",
            options=SWITCH,
        ),
        DEVICE,
    ),
    extract,
    ExtractConfig,
)


# ---- fuse


def fuse(inputs: Inputs, config: FusionConfig) -> None:
    """Write a dataset folder of composites, with a contact sheet in it."""
    from ..data.concepts import ClassPicture
    from ..data.dataset import write_dataset
    from ..data.folder_inputs import read_backgrounds, read_concept, read_photos
    from ..data.fusion import ConceptFusion
    from ..evaluation.sheets import dataset_sheet, save_sheet

    out = Path(inputs["out"])
    side = 4 * config.size  # a small subject of a large photo still has pixels enough; whole cameras' worth is too many
    concepts = [read_concept(token, noun, Path(folder), side) for token, noun, folder in concept_entries(inputs)]
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
    images = f"{dataset.composite_count()} composites and {dataset.prior_count()} regularization images"
    print(f"{images} → {out}; look at {sheet}")


def concept_entries(inputs: Inputs) -> list[list[str]]:
    """Token, noun and folder of each concept. Raises ConfigError."""
    return _entries(inputs, "concept", ("token", "noun", "folder"))


def _entries(inputs: Inputs, name: str, keys: Sequence[str]) -> list[list[str]]:
    """Repeated flags as lists; a settings file may hold mappings instead."""
    entries = []
    for entry in inputs.get(name) or ():
        values = [entry.get(k) for k in keys] if isinstance(entry, Mapping) else entry
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(keys) or None in values:
            raise ConfigError(f"{name}: expected {', '.join(keys)} in each entry, got {entry!r}")
        entries.append([str(v) for v in values])
    return entries


FUSE = Command(
    "fuse",
    "Concept Fusion: make a dataset folder of composites",
    (
        Argument(
            "concept",
            "a concept: its placeholder token, class noun and folder of subjects; repeat for each",
            True,
            repeatable(("TOKEN", "NOUN", "FOLDER"), 3),
        ),
        Argument(
            "prior",
            "regularization images, preferably with masks: class noun and folder; repeat for each",
            False,
            repeatable(("NOUN", "FOLDER"), 2),
        ),
        Argument("backgrounds", "folder of empty scenes; NAME.txt may hold the words for one ('in a garden')"),
        Argument("out", "the dataset folder to make", required=True),
    ),
    fuse,
    FusionConfig,
)


# ---- doctor


def doctor(inputs: Inputs, _: None) -> None:
    """Print what will spoil a training with these photos, concepts or dataset: a line for each, warnings first."""
    from ..data.dataset import DatasetFolder
    from ..data.doctor import examine_concepts, examine_dataset, examine_photos, sort_findings
    from ..data.folder_inputs import read_concept, read_photos

    folders = texts(inputs.get("photos"))
    entries = concept_entries(inputs)
    if not folders and not entries and not inputs.get("dataset"):
        raise ConfigError("photos, concept, dataset: none given; give at least one of them to examine")
    size = inputs.get("size")
    if size is not None and size < 1:
        raise ConfigError(f"size: {size!r} is no size in pixels; use 1 or more, such as 768")
    side = 4 * size if size else ExtractConfig.max_side  # with a size, photos as 'fuse' reads them
    findings = []
    for folder in folders:
        findings += examine_photos(read_photos(Path(folder), side), size, folder)
    concepts = [read_concept(token, noun, Path(folder), side) for token, noun, folder in entries]
    findings += examine_concepts(concepts, size)
    if inputs.get("dataset"):
        dataset = DatasetFolder(Path(inputs["dataset"]))
        for note in dataset.notes:
            log.warning("%s", note)
        with progress_bars() as bars:
            findings += examine_dataset(dataset, size, bars.phase("examining"))
    for finding in sort_findings(findings):
        print(finding.line)
    if not findings:
        print("no findings")


DOCTOR = Command(
    "doctor",
    "examine photos, concepts or a dataset for what will spoil a training",
    (
        Argument("photos", "folder of photos of one subject; repeat for several", options=repeatable("FOLDER")),
        Argument(
            "concept",
            "a concept: its placeholder token, class noun and folder of subjects; repeat for each",
            False,
            repeatable(("TOKEN", "NOUN", "FOLDER"), 3),
        ),
        Argument("dataset", "dataset folder, made by 'fuse'; every picture of it is read"),
        Argument(
            "size",
            "the base's native size in pixels, to find photos and subjects that are smaller: SD 1.5 512, 2.1 768, "
            "XL 1024 (default: sizes are not examined)",
            options=NUMBER,
        ),
    ),
    doctor,
)


# ---- scenes


def scenes(inputs: Inputs, config: DrawConfig) -> None:
    """Write pictures of empty scenes and the words for each, with a sheet of them beside the folder."""
    from ..evaluation.sheets import picture_grid, save_sheet
    from ..training.class_images import EVERYDAY_SCENES, draw_empty_scenes, parse_scenes, scene_path
    from ..utils.devices import choose_device
    from ..utils.files import make_folder, write_text

    out, each = Path(inputs["out"]), picture_count(inputs, 2)
    wanted = parse_scenes(texts(inputs.get("scene") or EVERYDAY_SCENES.splitlines()))
    base = open_base(inputs)
    base.to(*choose_device(device_name(inputs)))
    make_folder(out)
    with progress_bars() as bars:
        drawn = draw_empty_scenes(base, wanted, each, out, config, on_progress=bars.phase("drawing"))
    for scene in wanted:
        for i in range(each):
            write_text(scene_path(out, scene.prompt, i).with_suffix(".txt"), scene.phrase + "\n")
    sheet = beside(out, "grid.jpg")
    save_sheet(sheet, picture_grid([s.image for s in drawn[:MAX_SHOWN]], [s.phrase for s in drawn[:MAX_SHOWN]]))
    print(f"{len(drawn)} empty scenes → {out}; look at {sheet}")


SCENES = Command(
    "scenes",
    "draw empty scenes, the backgrounds that fuse takes",
    (
        *BASE,
        Argument(
            "scene",
            "what to draw, optionally followed by the words for captions: 'an empty beach | on the beach'; repeat for "
            "several (default: a dozen everyday places)",
            False,
            repeatable("TEXT"),
        ),
        Argument("count", "pictures of each scene (default: 2)", options=NUMBER),
        Argument("out", "folder for the pictures and their words; existing pictures are kept", required=True),
        DEVICE,
    ),
    scenes,
    DrawConfig,
)
