"""Photos and their subjects: a folder of photos, a segment-anything model, and what it cuts out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.folders import describe_unread, list_photos, mask_path
from ..far_train.data.images import Photo, load_photo
from ..far_train.data.sam import load_sam
from ..far_train.data.settings import ExtractConfig
from ..far_train.data.subjects import Prompt, Subject, SubjectExtractor, subject_from_mask
from ..far_train.mini.shipped import SAM, small_sam
from ..far_train.utils.errors import FarError, PhotoError, SubjectError
from . import host_folders, host_memory, host_ui
from .pictures import HOW_TO_GET_MASKS, counted, doubts, match_masks, photo_labels, some_of, unroll_images, unroll_masks
from .previews import as_image, refusal_shown, shown, subject_sheet
from .prompts import BOX_FORMATS, read_prompts
from .sockets import BoundingBox, SamModel, check_choice, schema

MAX_SIDE = 8192
SMALL_SAM = "FaR mini SAM (built in)"
MASK_USES = ("as they are", "as hints for SAM")


class LoadPhotos(io.ComfyNode):
    """The photos of one subject, with the masks that they bring."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_LoadPhotos",
            display_name="FaR Load Photos",
            description="Load all photos of a folder as a list, in their own sizes, sorted by name, with EXIF rotation "
            "applied.",
            search_aliases=["load images from folder", "image folder", "batch load"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=host_folders.input_subfolders(),
                    tooltip="A folder in ComfyUI's input folder with photos of one subject. 4 to 20 photos in "
                    "different surroundings work well.",
                ),
                io.Int.Input(
                    "max_side",
                    display_name="longest side",
                    default=ExtractConfig.max_side,
                    min=0,
                    max=MAX_SIDE,
                    step=64,
                    tooltip="Larger photos are scaled down to this size, in pixels. 1024 suits training at 768. "
                    "0: original size, which needs a lot of memory.",
                ),
            ],
            outputs=[
                io.Image.Output("images", is_output_list=True, tooltip="The photos as a list, each in its own size."),
                io.Mask.Output(
                    "masks",
                    is_output_list=True,
                    tooltip="One mask per photo, of the same size, 1 = subject: from NAME.mask.png beside NAME.jpg, or "
                    "from the photo's transparency. All zeros if there is neither.",
                ),
                io.String.Output("names", is_output_list=True, tooltip="The file names without extension."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, folder: str) -> bool | str:
        if folder is None or folder in host_folders.input_subfolders():
            return True
        return (
            f"folder: there is no folder '{folder}' in {host_folders.input_folder()}; "
            "make one there and put the photos of a subject in it"
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, max_side: int) -> str:
        try:
            photos = list_photos(host_folders.input_folder() / folder)
        except (PhotoError, TypeError):
            return "none"
        return files_fingerprint([f for p in photos for f in (p, mask_path(p))])

    @classmethod
    def execute(cls, folder: str, max_side: int) -> io.NodeOutput:
        check_choice(cls.validate_inputs(folder or ""))
        photos, skipped = [], []
        paths = list_photos(host_folders.input_folder() / folder)
        unread = describe_unread(host_folders.input_folder() / folder)
        progress = host_ui.Progress(len(paths), cls.hidden.unique_id)
        for i, path in enumerate(paths):
            host_ui.stop_if_interrupted()
            try:
                photos.append(load_photo(path, max_side or None))
            except PhotoError as e:
                skipped.append(str(e))
            progress.update(i + 1)
        if not photos:
            raise PhotoError(
                f"{folder}: none of its {counted(len(paths), 'photo')} can be used:\n" + "\n".join(skipped[:5])
            )
        images = [p.image for p in photos]
        names = [p.name for p in photos]
        masked = sum(p.mask is not None for p in photos)
        text = f"{counted(len(photos), 'photo')}, {masked} of them with a mask"
        warnings = [f"skipped: {reason}" for reason in skipped]
        warnings += [note for photo in photos for note in photo.notes]
        warnings += [unread] if unread else []
        warnings += doubts(images, [p.mask for p in photos], names)
        sheet = subject_sheet(images, [p.mask for p in photos], names)
        # Zeros of the photo's own size, not of some other: whatever comes next may stack, scale or paste them.
        masks = [torch.zeros(p.image.shape[:2]) if p.mask is None else p.mask for p in photos]
        display = shown(cls, sheet, text, warnings)
        return io.NodeOutput([i[None] for i in images], [m[None] for m in masks], names, ui=display)


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
    def fingerprint_inputs(cls, model_name: str) -> str:
        try:
            return files_fingerprint([sam_path(model_name)])
        except (FileNotFoundError, TypeError, AttributeError):
            return "none"

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        check_choice(cls.validate_inputs(model_name or ""))
        # It rests on the CPU, and is on the compute device only while a node works with it.
        sam = small_sam() if model_name == SMALL_SAM else load_sam(sam_path(model_name))
        host_ui.log_and_show(f"{model_name} is loaded", cls.hidden.unique_id)
        return io.NodeOutput(sam)


def sam_path(name: str) -> Path:
    """The file behind a choice of FaR Load SAM. Raises FileNotFoundError."""
    return SAM if name == SMALL_SAM else host_folders.model_path("sams", name)


class ExtractSubject(io.ComfyNode):
    """Where the subject of each photo is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_ExtractSubject",
            display_name="FaR Extract Subject",
            description="Segment the subject of each photo with Segment Anything, from a box, points, or the center of "
            "the photo. Photos without a usable subject are skipped and listed in the report.",
            search_aliases=["segment", "sam", "sam2", "sam3", "rembg", "cut out", "remove background", "mask"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Photos of one subject, as a list (FaR Load Photos) or a batch."),
                SamModel.Input(
                    "sam_model",
                    optional=True,
                    tooltip="From FaR Load SAM or the SAM loader of another pack. Not needed if every photo has a mask."
                    "",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Existing masks, such as those of FaR Load Photos. SAM only segments photos whose mask is "
                    "empty.",
                ),
                io.MultiType.Input(
                    "box",
                    [io.BBOX, BoundingBox],
                    optional=True,
                    tooltip="A bounding box around the subject, in pixels: one for all photos, or a list with one per "
                    "photo. Of several detections, the one with the highest score is used.",
                ),
                io.String.Input(
                    "names",
                    optional=True,
                    force_input=True,
                    tooltip="The names of the photos, for the report and for 'points'. Connect FaR Load Photos.",
                ),
                io.Combo.Input(
                    "box_format",
                    options=list(BOX_FORMATS),
                    tooltip="What the four numbers of a box mean. Boxes with named sides don't need this.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="JSON, in pixels. Empty: the center of the photo. For all photos: [[x, y], [x, y, 0]], "
                    "where 0 marks background. For single photos, by number or name: "
                    '{"2": [[x, y]], "garden": {"box": [x0, y0, x1, y1]}}.',
                ),
                io.Float.Input(
                    "min_area",
                    display_name="minimum area",
                    default=ExtractConfig.min_area,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="A photo is skipped if its subject covers less than this fraction of it. Default: 0.03.",
                ),
                io.Combo.Input(
                    "use_masks",
                    options=list(MASK_USES),
                    optional=True,
                    tooltip=f"'{MASK_USES[0]}': keep the masks. '{MASK_USES[1]}': SAM refines the outline of roughly "
                    "painted masks, such as those of the mask editor.",
                ),
            ],
            outputs=[
                io.Image.Output("images", is_output_list=True, tooltip="The photos with a subject."),
                io.Mask.Output("masks", is_output_list=True, tooltip="Their masks, 1 = subject, in the same order."),
                io.String.Output("report", tooltip="One line per photo: SAM's score, or why it was skipped."),
                io.Image.Output("preview", tooltip="The subjects on a checkerboard, as one image."),
                io.String.Output("names", is_output_list=True, tooltip="The names of the photos with a subject."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor],
        box_format: Sequence[str],
        points: Sequence[str],
        min_area: Sequence[float],
        sam_model: Sequence[Any] = (),
        masks: Sequence[Tensor] = (),
        box: Sequence[Any] = (),
        names: Sequence[str] = (),
        use_masks: Sequence[str] = MASK_USES[:1],
    ) -> io.NodeOutput:
        pictures = unroll_images(images)
        labels = photo_labels(len(pictures), names)
        named = dict(zip(labels, names if len(names) == len(labels) else labels))
        given: list[Tensor | None] = [None] * len(pictures)
        if len(masks):
            given = match_masks(pictures, unroll_masks(masks), invert=None, labels=labels)
        prompts = read_prompts(len(pictures), box, box_format[0], points, names)
        photos = [Photo(label, p, m, Path(label)) for label, p, m in zip(labels, pictures, given)]
        progress = host_ui.Progress(len(photos), cls.hidden.unique_id)
        sam = sam_model[0] if len(sam_model) else None
        if sam is None and not all(m is not None for m in given):
            missing = labels[next(i for i, m in enumerate(given) if m is None)]
            raise SubjectError(f"{missing} has no mask; connect a sam_model to find its subject, or {HOW_TO_GET_MASKS}")
        subjects, report = [], []
        config = ExtractConfig(min_area=min_area[0], use_masks="hint" if use_masks[0] == MASK_USES[1] else "keep")
        for photo, subject in find_subjects(photos, sam, prompts, config):
            if isinstance(subject, FarError):
                report.append(f"skipped: {subject}")
            else:
                subjects.append(subject)
                report.append(
                    f"{photo.name}: " + ("own mask" if subject.score is None else f"score {subject.score:.2f}")
                )
            progress.update(len(report))
        if not subjects:
            raise SubjectError(f"none of the {len(photos)} photos shows a usable subject:\n" + "\n".join(report[:5]))
        found, cut = [s.image for s in subjects], [s.mask for s in subjects]
        sheet = subject_sheet(found, cut, [s.name for s in subjects])
        text = f"a subject in {len(subjects)} of {counted(len(photos), 'photo')}"
        warnings = [line for line in report if line.startswith("skipped")]
        guessed = [label for label, p, m in zip(labels, prompts, given) if m is None and p == Prompt()]
        if guessed and len(box):
            warnings.append(f"{some_of(guessed)}: no box was given; SAM looked in the middle of the photo")
        warnings += doubts(found, cut, [s.name for s in subjects])
        return io.NodeOutput(
            [i[None] for i in found],
            [m[None] for m in cut],
            "\n".join(report),
            as_image(sheet),
            [named[s.name] for s in subjects],
            ui=shown(cls, sheet, text, warnings),
        )


def find_subjects(
    photos: Sequence[Photo], sam: Any, prompts: Sequence[Prompt], config: ExtractConfig
) -> Iterator[tuple[Photo, Subject | FarError]]:
    """Yield each photo with its subject, or with the FarError that says why there is none. Stops on a cancel.

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
    if "HQ" in type(sam.mask_decoder).__name__:
        raise SubjectError(
            "this SAM_MODEL is HQ-SAM, which is called in another way; load an original SAM ViT-B, -L or -H"
        )
    with host_memory.on_compute_device(sam):
        for photo, prompt in zip(photos, prompts):
            host_ui.stop_if_interrupted()
            try:
                yield photo, extractor.extract(photo, prompt)
            except FarError as e:
                yield photo, e


def files_fingerprint(paths: Sequence[Path]) -> str:
    """Changes when a file of these changes, comes or goes: a digest of names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            continue
        digest.update(f"{path.name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


NODES = [LoadPhotos, LoadSam, ExtractSubject]
