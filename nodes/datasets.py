"""Datasets as folders that people can look at and edit, as the command line's ``fuse`` makes them; and their doctor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import Composite, Concept, TrainingSet
from ..far_train.data.dataset import DatasetFolder, find_datasets, write_dataset
from ..far_train.data.doctor import examine_concepts, examine_dataset, sort_findings
from ..far_train.data.images import from_pil
from ..far_train.evaluation.sheets import dataset_sheet, overlay, save_sheet
from ..far_train.utils.errors import ConfigError
from ..far_train.utils.files import parse_json
from . import host_folders, host_ui
from .known_files import files_generation, remember_files
from .naming import file_name
from .pictures import counted
from .previews import refusal_shown, shown
from .sockets import FarConcepts, FarDataset, all_of, check_choice, check_sockets, schema, unknown_choice

PREVIEWS = 16
MAX_SIZE = 2048  # of composites, in pixels
PREVIEW_SIDE = 512


class SaveDataset(io.ComfyNode):
    """Writes a dataset as a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_SaveDataset",
            display_name="FaR Save Dataset",
            description="Save a dataset as a folder of images, masks and captions. You can edit it and load it again "
            "with FaR Load Dataset or the command line. Nothing is overwritten.",
            search_aliases=["training set", "dataset"],
            is_output_node=True,
            inputs=[
                FarDataset.Input("dataset", tooltip="From FaR Concept Fusion."),
                io.String.Input(
                    "name",
                    default="dataset",
                    tooltip="Name of the folder in output/far/datasets. A number is added if another dataset has that "
                    "name. The same dataset is not written twice.",
                ),
            ],
            outputs=[
                FarDataset.Output("dataset", tooltip="The saved dataset."),
                io.String.Output("folder", tooltip="The folder's path."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return files_generation(cls.hidden.unique_id)

    @classmethod
    def execute(cls, dataset: TrainingSet, name: str) -> io.NodeOutput:
        check_sockets(dataset=(dataset, TrainingSet, "FAR_DATASET"))
        digest = dataset.digest()
        folder = free_folder(datasets_folder(), file_name(name, "dataset"), digest)
        if folder.exists():
            saved = DatasetFolder(folder)
            text = f"{folder} holds this dataset already; it is used as it is"
        else:
            saved = save(dataset, folder, digest, cls.hidden.unique_id)
            text = f"written to {folder}"
        remember_files(cls.hidden.unique_id, [folder, *folder.rglob("*")])  # of folders, what was added
        sheet = dataset_sheet(build_previews(saved, None), saved.names)
        return io.NodeOutput(saved, str(folder), ui=shown(cls, sheet, text))


def save(dataset: TrainingSet, folder: Path, digest: str, node_id: str | None) -> DatasetFolder:
    """Write a dataset with its contact sheet, and the digest by which :func:`free_folder` knows it again."""
    progress = host_ui.Progress(dataset.composite_count() + dataset.prior_count(), node_id)

    def on_progress(done: int, total: int) -> None:
        host_ui.stop_if_interrupted()
        progress.update(done, total)

    settings = getattr(dataset, "config", None)
    about = {"source_digest": digest} | ({"fusion": settings.to_dict()} if settings is not None else {})
    saved = write_dataset(dataset, folder, about=about, on_progress=on_progress)
    save_sheet(folder / "contact-sheet.jpg", dataset_sheet(build_previews(saved, None), saved.names))
    return saved


class LoadDataset(io.ComfyNode):
    """Reads a dataset folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_LoadDataset",
            display_name="FaR Load Dataset",
            description="Load a dataset folder made by FaR Save Dataset or by 'fuse' on the command line, including "
            "your edits.",
            search_aliases=["training set", "dataset"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(dataset_folders()),
                    tooltip="Names that start with datasets/ are in ComfyUI's datasets folder, those with input/ in "
                    "its input folder, all others in output/far/datasets.",
                )
            ],
            outputs=[
                FarDataset.Output("dataset", tooltip="For FaR Train."),
                io.Image.Output("previews", tooltip="The first 16 images, with the subjects' masks tinted."),
                io.String.Output("report", tooltip="What the dataset contains."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, folder: str) -> bool | str:
        if folder is None or folder in list(dataset_folders()):  # a queue may send what can't be a key
            return True
        places = ", ".join(str(place) for _, place in dataset_places())
        return f"folder: there is no dataset '{folder}' in {places}; make one with FaR Save Dataset"

    @classmethod
    def fingerprint_inputs(cls, folder: str | None) -> str | float:
        if folder is None:
            return unknown_choice()
        path = dataset_folders().get(folder)
        if path is None:
            return "none"
        return host_folders.files_fingerprint(sorted(p for p in path.glob("**/*") if p.is_file()))

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        check_choice(cls.validate_inputs(folder or ""))
        dataset = DatasetFolder(dataset_folders()[folder])
        composites = build_previews(dataset, cls.hidden.unique_id)
        report = describe(dataset, dataset.notes)
        sheet = dataset_sheet(composites, dataset.names)
        return io.NodeOutput(dataset, overlays(composites, dataset), report, ui=shown(cls, sheet, report))


class DatasetDoctor(io.ComfyNode):
    """Examines concepts and datasets before they are trained on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_DatasetDoctor",
            display_name="FaR Dataset Doctor",
            description="Examine concepts and datasets for what will spoil a training: near-duplicate photos, one "
            "place in all of them, cropped subjects, wrong masks, words that the captions of one concept share. Each "
            "finding comes with its fix.",
            search_aliases=["check dataset", "validate", "lint", "warnings"],
            is_output_node=True,
            inputs=[
                FarConcepts.Input("concepts", optional=True, tooltip="Concepts to examine, from FaR Concept."),
                FarDataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="A dataset to examine, best from FaR Load Dataset or FaR Save Dataset. All its images are "
                    "read; those of FaR Concept Fusion are composed for it.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=MAX_SIZE,
                    step=64,
                    optional=True,
                    tooltip="The native size of the base model, to find photos and subjects that are smaller: Stable "
                    "Diffusion 1.5: 512, 2.1: 768, XL: 1024. 0: sizes are not examined.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="One line per finding, warnings first.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, concepts: Sequence[Concept] | None = None, dataset: TrainingSet | None = None, size: int = 0
    ) -> io.NodeOutput:
        if concepts is None and dataset is None:
            raise ConfigError("concepts, dataset: neither is connected; connect what shall be examined")
        findings = []
        if concepts is not None:
            findings += examine_concepts(all_of("concepts", [concepts], Concept, "FAR_CONCEPTS"), size or None)
        if dataset is not None:
            check_sockets(dataset=(dataset, TrainingSet, "FAR_DATASET"))
            progress = host_ui.Progress(dataset.composite_count() + dataset.prior_count(), cls.hidden.unique_id)

            def on_progress(done: int, total: int) -> None:
                host_ui.stop_if_interrupted()
                progress.update(done, total)

            findings += examine_dataset(dataset, size or None, on_progress)
        report = "\n".join(finding.line for finding in sort_findings(findings)) or "no findings"
        host_ui.log_and_show(report, cls.hidden.unique_id)
        return io.NodeOutput(report, ui={"text": (report,)})


def datasets_folder() -> Path:
    """Where datasets are written."""
    return host_folders.output_folder() / "far" / "datasets"


def dataset_places() -> list[tuple[str, Path]]:
    """Where FaR Load Dataset looks for datasets, each place with what the names of its datasets begin with."""
    roots = host_folders.dataset_roots()
    return [("", datasets_folder()), *(("datasets/", root) for root in roots), ("input/", host_folders.input_folder())]


def dataset_folders() -> dict[str, Path]:
    """Every dataset by the name that FaR Load Dataset shows.

    The host may have several datasets folders: of two datasets with one name the first counts, as for its models.
    """
    found: dict[str, Path] = {}
    for prefix, place in dataset_places():
        for name in find_datasets(place):
            found.setdefault(prefix + name, place / name)
    return found


def free_folder(parent: Path, name: str, digest: str) -> Path:
    """``parent``/``name``, or with the first number behind it that is free or whose dataset has this digest.

    A link counts as taken: it may lead anywhere.
    """
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        taken = os.path.lexists(folder)
        if not taken or (not folder.is_symlink() and _source_digest(folder) == digest):
            return folder
        number += 1


def _source_digest(folder: Path) -> str | None:
    try:
        return parse_json((folder / "dataset.json").read_text(encoding="utf-8"))["about"]["source_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(dataset: TrainingSet, notes: Sequence[str] = ()) -> str:
    """What a dataset holds, in words, ``notes`` first."""
    names = ", ".join(name.phrase for name in dataset.names)
    lines = [
        f"{counted(len(dataset.names), 'concept')}: {names}",
        f"{counted(dataset.composite_count(), 'picture')} of {dataset.size} px, "
        f"{counted(dataset.prior_count(), 'regularization image')}",
    ]
    for title in ("layouts", "background_kinds"):
        shares = getattr(dataset, title, None)
        if shares:
            lines.append(f"{title.replace('_kinds', 's')}: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return "\n".join([*notes, *lines])


def build_previews(dataset: TrainingSet, node_id: str | None) -> list[Composite]:
    """The first composites of a dataset. Stops on a cancel."""
    number = min(PREVIEWS, dataset.composite_count())
    progress = host_ui.Progress(number, node_id)
    composites = []
    for i in range(number):
        host_ui.stop_if_interrupted()
        composites.append(dataset.composite(i))
        progress.update(i + 1)
    return composites


def overlays(composites: Sequence[Composite], dataset: TrainingSet) -> Tensor:
    """Composites with tinted masks as an IMAGE [n,S,S,3], large ones scaled down."""
    pictures = [overlay(c, dataset.names) for c in composites]
    for picture in pictures:
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return torch.stack([from_pil(p) for p in pictures])


NODES = [SaveDataset, LoadDataset, DatasetDoctor]
