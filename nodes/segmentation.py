"""Segment-anything models in the graph: load them, share them, and find subjects with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io

from ..far_train.data.images import Photo
from ..far_train.data.sam import load_sam
from ..far_train.data.settings import ExtractConfig
from ..far_train.data.subjects import Prompt, Subject, SubjectExtractor, subject_from_mask
from ..far_train.mini.shipped import SAM, small_sam
from ..far_train.utils.errors import FarError, SubjectError
from . import host_folders, host_memory, host_ui
from .previews import refusal_shown
from .sockets import SamModel, check_choice, schema, unknown_choice

SMALL_SAM = "FaR mini SAM (built in)"

# By file and its fingerprint. The host runs a loader once for each place in the graph, also with equal inputs.
_loaded: WeakValueDictionary[str, Any] = WeakValueDictionary()


class LoadSam(io.ComfyNode):
    """A segment-anything model, the same object that other packs pass as SAM_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_LoadSAM",
            display_name="FaR Load SAM",
            description="Load a Segment Anything model (ViT-B, ViT-L or ViT-H) from models/sams. Files are read "
            "without running pickled code.",
            search_aliases=["segment anything", "segment", "sam", "SAMLoader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*host_folders.model_files("sams"), SMALL_SAM],
                    tooltip="A Segment Anything file in models/sams. sam_vit_b (375 MB) is enough for clear photos; "
                    "sam_vit_h (2.6 GB) finds finer outlines. SAM 2 and HQ-SAM are not supported. "
                    f"'{SMALL_SAM}' comes with the pack and only knows the drawn subjects of FaR Mini Photos.",
                )
            ],
            outputs=[
                SamModel.Output("sam_model", tooltip="For FaR Extract Subject or any node that takes a SAM_MODEL.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, model_name: str) -> bool | str:
        if model_name in (None, SMALL_SAM) or model_name in host_folders.model_files("sams"):
            return True
        return (
            f"model_name: there is no '{model_name}' in models/sams; put a segment-anything file there, such as "
            "sam_vit_b_01ec64.pth from https://github.com/facebookresearch/segment-anything"
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None) -> str | float:
        if model_name is None:
            return unknown_choice()
        try:
            return host_folders.files_fingerprint([sam_path(model_name)])
        except (FileNotFoundError, TypeError, AttributeError):
            return "none"

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        check_choice(cls.validate_inputs(model_name or ""))
        sam = shared_sam(model_name)
        host_ui.log_and_show(f"{model_name} is loaded", cls.hidden.unique_id)
        return io.NodeOutput(sam)


def sam_path(name: str) -> Path:
    """The file behind a choice of FaR Load SAM. Raises FileNotFoundError."""
    return SAM if name == SMALL_SAM else host_folders.model_path("sams", name)


def shared_sam(name: str) -> Any:
    """The model behind a choice of FaR Load SAM, on the CPU, in one instance for all nodes.

    It is freed when the last node drops it, and on the compute device only while a node works with it.
    Raises BaseModelError, FileNotFoundError, SubjectError.
    """
    path = sam_path(name)
    key = f"{path}\0{host_folders.files_fingerprint([path])}"
    sam = _loaded.get(key)
    if sam is None:
        sam = _loaded[key] = small_sam() if name == SMALL_SAM else load_sam(path)
    return sam


def find_subjects(
    photos: Sequence[Photo], sam: Any, prompts: Sequence[Prompt], config: ExtractConfig
) -> Iterator[tuple[Photo, Subject | FarError]]:
    """Yield each photo with its subject, or with the FarError that says why there is none. Stops on a cancel.

    Close it (``contextlib.closing``), so that the model leaves the compute device at once if the caller fails.
    ``sam``: may be None if every photo has a mask. Raises SubjectError if it is no segment-anything model.
    """
    if sam is None:
        for photo in photos:
            try:
                yield photo, subject_from_mask(photo, config)
            except SubjectError as e:
                yield photo, e
        return
    extractor = SubjectExtractor(sam, config)
    with host_memory.on_compute_device(sam):
        for photo, prompt in zip(photos, prompts):
            host_ui.stop_if_interrupted()
            try:
                yield photo, extractor.extract(photo, prompt)
            except FarError as e:
                yield photo, e
