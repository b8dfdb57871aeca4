"""Photos and their subjects: a folder of photos, and what is cut out of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.folders import describe_unread, list_photos, mask_path
from ..far_train.data.images import Photo, load_photo
from ..far_train.data.settings import ExtractConfig
from ..far_train.data.subjects import Prompt, Subject
from ..far_train.utils.errors import PhotoError, SubjectError
from . import host_folders, host_ui
from .instances import group_masks, own_masks
from .pictures import HOW_TO_GET_MASKS, counted, doubts, photo_labels, some_of, unroll_images
from .previews import as_image, refusal_shown, shown, subject_sheet
from .prompts import BOX_FORMATS, boxes_by_photo, cut_at_edges, read_prompts, unscored
from .segmentation import LoadSam, find_subjects
from .sockets import BoundingBox, SamModel, check_choice, schema, unknown_choice

MAX_SIDE = 8192
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
        if folder is None:
            return True
        if folder in host_folders.input_subfolders():
            try:
                return bool(list_photos(host_folders.input_folder() / folder))
            except PhotoError as e:
                return f"folder: {e}"
        return (
            f"folder: there is no folder '{folder}' in {host_folders.input_folder()}; "
            "make one there and put the photos of a subject in it"
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, max_side: int) -> str | float:
        if folder is None:
            return unknown_choice()
        try:
            photos = list_photos(host_folders.input_folder() / folder)
        except (PhotoError, TypeError):
            return "none"
        return host_folders.files_fingerprint([f for p in photos for f in (p, mask_path(p))])

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
                    tooltip="Existing masks, such as those of FaR Load Photos or SAM3 Detect. SAM only segments photos "
                    "whose mask is empty. Of several masks for a photo, 'subject number', box or points choose one, "
                    "else the largest is used.",
                ),
                io.MultiType.Input(
                    "box",
                    [io.BBOX, BoundingBox],
                    optional=True,
                    tooltip="A bounding box around the subject, in pixels: one for all photos, or a list with one per "
                    "photo. Of several in a photo, 'subject number' chooses, else the highest score or the largest.",
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
                io.String.Input(
                    "negative_points",
                    optional=True,
                    force_input=True,
                    tooltip="Points on the background as JSON, such as the negative points of a points editor: "
                    '[{"x": 5, "y": 9}]. For all photos, or one text per photo.',
                ),
                io.Int.Input(
                    "index",
                    display_name="subject number",
                    default=0,
                    min=0,
                    max=999,
                    optional=True,
                    tooltip="For several masks or boxes in a photo: which one to use, in the order in which they are "
                    "sent, from 1. For several subjects in one photo, use one FaR Extract Subject each: 1, 2, … "
                    "0: choose by box and points, or else the largest mask.",
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
        negative_points: Sequence[str] = (),
        index: Sequence[int] = (0,),
    ) -> io.NodeOutput:
        pictures = unroll_images(images)
        labels = photo_labels(len(pictures), names)
        prompts = read_prompts(len(pictures), box, box_format[0], points, names, negative_points, index[0])
        prompts = [cut_at_edges(p, image.shape[1], image.shape[0]) for p, image in zip(prompts, pictures)]
        boxes = boxes_by_photo(box, len(pictures))
        sam = sam_model[0] if len(sam_model) else None
        if sam is None and use_masks[0] == MASK_USES[1]:
            raise SubjectError(
                f"use_masks: '{use_masks[0]}' needs a sam_model; connect FaR Load SAM, or choose '{MASK_USES[0]}'"
            )
        given: list[Tensor | SubjectError | None] = [None] * len(pictures)
        groups: list[list[Tensor]] = []
        if len(masks):
            batches = [len(image) if image.ndim == 4 else 1 for image in images]
            groups = group_masks(batches, masks, [len(frame) for frame in boxes])
            given = own_masks(pictures, groups, prompts, index[0], labels, sam is not None)
        if index[0]:  # without its box, SAM would look in the middle of the photo
            for i, frame in enumerate(boxes):
                if given[i] is None and len(frame) < index[0]:
                    given[i] = SubjectError(f"{labels[i]}: index: there is no box {index[0]} of {len(frame)}")
        if sam is None and any(m is None for m in given):
            missing = labels[next(i for i, m in enumerate(given) if m is None)]
            raise SubjectError(f"{missing} has no mask; connect a sam_model to find its subject, or {HOW_TO_GET_MASKS}")
        usable = [i for i, m in enumerate(given) if not isinstance(m, SubjectError)]
        photos = [Photo(labels[i], pictures[i], given[i], Path(labels[i])) for i in usable]
        outcomes: list[Subject | str] = [str(m) for m in given]
        progress = host_ui.Progress(len(photos), cls.hidden.unique_id)
        config = ExtractConfig(min_area=min_area[0], use_masks="hint" if use_masks[0] == MASK_USES[1] else "keep")
        with closing(find_subjects(photos, sam, [prompts[i] for i in usable], config)) as found:
            for done, (i, (_, outcome)) in enumerate(zip(usable, found), 1):
                outcomes[i] = outcome if isinstance(outcome, Subject) else str(outcome)
                progress.update(done)
        subjects = [outcome for outcome in outcomes if isinstance(outcome, Subject)]
        report = [_report_line(outcome) for outcome in outcomes]
        if not subjects:
            raise SubjectError(f"none of the {len(outcomes)} photos shows a usable subject:\n" + "\n".join(report[:5]))
        cutouts, cut = [s.image for s in subjects], [s.mask for s in subjects]
        sheet = subject_sheet(cutouts, cut, [s.name for s in subjects])
        text = f"a subject in {len(subjects)} of {counted(len(outcomes), 'photo')}"
        warnings = [line for line in report if line.startswith("skipped")]
        unmasked = [i for i in usable if given[i] is None]
        guessed = [labels[i] for i in unmasked if prompts[i] == Prompt()]
        if guessed and len(box):
            warnings.append(f"{some_of(guessed)}: no box was given; SAM looked in the middle of the photo")
        if not index[0]:
            several = [labels[i] for i, group in enumerate(groups) if len(group) > 1 and prompts[i] == Prompt()]
            rivals = [labels[i] for i in unscored(boxes) if i in unmasked]
            chosen = ((several, "masks"), (rivals, "boxes without scores"))
            warnings += [
                f"{some_of(which)}: of several {what} the largest is used; 'subject number' takes another"
                for which, what in chosen
                if which
            ]
        warnings += doubts(cutouts, cut, [s.name for s in subjects])
        called = names if len(names) == len(labels) else labels
        return io.NodeOutput(
            [i[None] for i in cutouts],
            [m[None] for m in cut],
            "\n".join(report),
            as_image(sheet),
            [called[i] for i, outcome in enumerate(outcomes) if isinstance(outcome, Subject)],
            ui=shown(cls, sheet, text, warnings),
        )


def _report_line(outcome: Subject | str) -> str:
    if isinstance(outcome, str):
        return f"skipped: {outcome}"
    return f"{outcome.name}: " + ("own mask" if outcome.score is None else f"score {outcome.score:.2f}")


NODES = [LoadPhotos, LoadSam, ExtractSubject]
