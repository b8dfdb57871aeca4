"""Extract subjects from photos, by their own masks or by segment-anything with a box, points or an automatic prompt.

SAM is Kirillov et al., "Segment Anything" (arXiv 2304.02643); its own ``SamPredictor`` and module classes are used.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.errors import OutputError, PhotoError, SubjectError
from ..utils.files import make_folder
from .folders import describe_unread, list_photos, mask_path
from .images import Photo, load_photo, save_pair, to_uint8
from .masks import check_own_mask, clean_mask, mask_box
from .sam import segment_anything
from .settings import ExtractConfig

__all__ = [
    "Extracted",
    "Prompt",
    "Subject",
    "SubjectExtractor",
    "choose_mask",
    "clean_mask",
    "extract_folder",
    "subject_from_mask",
]

log = logging.getLogger(__name__)

LEFTOVERS = "leftovers"

# A cross of foreground points around the centre, as fractions of width and height: one point alone often asks for
# a part of the subject (an ear, a collar) rather than the whole.
AUTOMATIC_POINTS = ((0.5, 0.5), (0.4, 0.5), (0.6, 0.5), (0.5, 0.4), (0.5, 0.6))


@dataclass(frozen=True, eq=False)
class Subject:
    """A photo and where its subject is.

    ``image``: [H,W,3] float32 0..1. ``mask``: [H,W] float32 0..1, 1 = subject. ``score``: SAM's own estimate of the
    mask's IoU, None for a mask that came with the photo.
    """

    name: str
    image: torch.Tensor
    mask: torch.Tensor
    score: float | None


@dataclass(frozen=True)
class Prompt:
    """Where the subject is, in pixels of the upright photo at its full size (x to the right, y down).

    ``box``: x0, y0, x1, y1. ``points``: (x, y, 1 = subject or 0 = background). With neither, a small cross of points
    at the centre stands for the subject. Raises SubjectError if malformed.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.box is not None:
            if not _are_numbers(self.box, 4):
                raise SubjectError(f"box: {self.box} must be four numbers x0, y0, x1, y1 in pixels")
            x0, y0, x1, y1 = self.box
            if x0 >= x1 or y0 >= y1:
                raise SubjectError(f"box: {self.box} must have x0 < x1 and y0 < y1 (x0, y0, x1, y1 in pixels)")
        for point in self.points:
            if not _are_numbers(point, 3) or point[2] not in (0, 1):
                raise SubjectError(f"points: {point} must be x, y in pixels and 1 (subject) or 0 (background)")
        if self.points and self.box is None and not any(label == 1 for _, _, label in self.points):
            raise SubjectError("points: all mark background; add a box or a point on the subject (x, y, 1)")

    def check_inside(self, width: int, height: int) -> None:
        """Raise SubjectError if the box or a point lies outside a photo of this size in pixels."""
        frame = f"the photo, which is {width}x{height} px"
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
                raise SubjectError(f"box: {self.box} reaches outside {frame}; give x0, y0, x1, y1 in its pixels")
        for x, y, _ in self.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise SubjectError(f"points: ({x:g}, {y:g}) lies outside {frame}; give x, y in its pixels")

    def scaled(self, x: float, y: float) -> Prompt:
        """The same prompt for a photo scaled by the factors x and y."""
        box = self.box and (self.box[0] * x, self.box[1] * y, self.box[2] * x, self.box[3] * y)
        return Prompt(box, tuple((px * x, py * y, label) for px, py, label in self.points))


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, Real) and math.isfinite(v) for v in values)
    )


def choose_mask(
    masks: torch.Tensor, scores: torch.Tensor, config: ExtractConfig | None = None
) -> tuple[torch.Tensor, float]:
    """Of SAM's masks [N,H,W] (bool) and scores [N], the best-scored usable one.

    Usable is what :func:`clean_mask` accepts: neither the whole frame nor too small. Returns that mask, cleaned,
    [H,W] float32, and its score. Raises SubjectError saying why each was refused.
    """
    refused = []
    for i in torch.nan_to_num(scores.float(), nan=-math.inf).argsort(descending=True, stable=True).tolist():
        try:
            return clean_mask(masks[i], config), float(scores[i])
        except SubjectError as e:
            refused.append(f"score {float(scores[i]):.2f}: {e}")
    raise SubjectError(f"no usable mask ({'; '.join(refused)}); give a box or points on the subject")


def subject_from_mask(photo: Photo, config: ExtractConfig | None = None) -> Subject:
    """The subject of a photo that brings its own mask, soft values kept.

    Raises SubjectError if there is none, or none that :func:`far_train.data.masks.check_own_mask` accepts.
    """
    if photo.mask is None:
        raise _no_mask(photo)
    if photo.mask.shape != photo.image.shape[:2]:
        raise SubjectError(
            f"{photo.path}: the mask is {photo.mask.shape[1]}x{photo.mask.shape[0]} px, the photo "
            f"{photo.image.shape[1]}x{photo.image.shape[0]} px; give a mask of the photo's size"
        )
    try:
        check_own_mask(photo.mask, config)
    except SubjectError as e:
        raise SubjectError(f"{photo.path}: {e}") from e
    return Subject(photo.name, photo.image, photo.mask.float(), None)


def _no_mask(photo: Photo) -> SubjectError:
    return SubjectError(
        f"{photo.path}: has no mask; put one beside it ({mask_path(photo.path).name}, white = subject, or an alpha "
        "channel in the photo itself), or give a segment-anything model to find the subject"
    )


class SubjectExtractor:
    """Finds the subject of a photo with a segment-anything model (``Sam``, on any device).

    Raises SubjectError if the model isn't one.
    """

    def __init__(self, sam: Any, config: ExtractConfig | None = None) -> None:
        missing = [n for n in ("image_encoder", "prompt_encoder", "mask_decoder", "preprocess") if not hasattr(sam, n)]
        if missing:
            raise SubjectError(
                f"sam_model: this {type(sam).__name__} is not a segment-anything model (it has no {', '.join(missing)})"
                "; load a SAM ViT-B, ViT-L or ViT-H"
            )
        if "HQ" in type(sam.mask_decoder).__name__:
            raise SubjectError(
                "sam_model: this is HQ-SAM, which is called in another way; load an original SAM ViT-B, ViT-L or ViT-H"
            )
        self.sam = sam
        self.config = config or ExtractConfig()
        self._hints = self.config.replace(min_area=0)

    def predict(self, image: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's three masks [3,H,W] bool and scores [3] for an image [H,W,3]; the prompt is in the image's pixels."""
        height, width = image.shape[:2]
        points = prompt.points
        if prompt.box is None and not points:
            points = tuple((fx * width, fy * height, 1) for fx, fy in AUTOMATIC_POINTS)
        # A predictor holds the photo it works on: one for each call keeps the extractor usable from several threads.
        predictor = segment_anything().SamPredictor(self.sam)
        predictor.set_image(to_uint8(image))
        masks, scores, _ = predictor.predict(
            point_coords=np.array([p[:2] for p in points], dtype=np.float64) if points else None,
            point_labels=np.array([p[2] for p in points], dtype=np.int64) if points else None,
            box=np.array(prompt.box, dtype=np.float64) if prompt.box is not None else None,
        )
        return torch.from_numpy(masks), torch.from_numpy(scores)

    def extract(self, photo: Photo, prompt: Prompt | None = None) -> Subject:
        """The subject of a photo. Raises SubjectError.

        A photo that brings a mask keeps it as it is; with ``use_masks`` "hint", SAM looks within the box around it.
        """
        hint = self.config.use_masks == "hint"
        # A hint may be a few strokes, so that only what SAM makes of it has to have min_area.
        own = None if photo.mask is None else subject_from_mask(photo, self._hints if hint else self.config)
        if own is not None and not hint:
            return own
        prompt = prompt or Prompt()
        height, width = photo.image.shape[:2]
        full_height, full_width = photo.full_size or (height, width)
        try:
            prompt.check_inside(full_width, full_height)
            prompt = prompt.scaled(width / full_width, height / full_height)
            if own is not None:
                prompt = Prompt(mask_box(own.mask), prompt.points)
            masks, scores = self.predict(photo.image, prompt)
            mask, score = choose_mask(masks, scores, self.config)
        except SubjectError as e:
            raise SubjectError(f"{photo.path}: {e}") from e
        return Subject(photo.name, photo.image, mask, score)


class Extracted(NamedTuple):
    """One line of a report. ``photo``: file name. ``status``: ``ok`` or ``skipped``. ``detail``: SAM's score, the
    words "own mask", or why the photo was skipped."""

    photo: str
    status: str
    detail: float | str


def extract_folder(
    folder: Path,
    out: Path,
    extractor: SubjectExtractor | None = None,
    prompts: Mapping[str, Prompt] | Prompt | None = None,
    config: ExtractConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_others: bool = False,
) -> list[Extracted]:
    """Write the picture and mask of each photo's subject as ``out/NAME.png`` and ``out/NAME.mask.png``.

    ``prompts``: one for all photos, or by file name (with or without suffix); others are prompted automatically.
    ``config``: sets ``max_side``; by default the extractor's. ``progress(done, total)`` is called after each photo.
    Photos that can't be read or show no usable subject are skipped and named in the report; pictures of an earlier
    run in ``out`` are replaced, and moved to ``out/leftovers`` where their photo is skipped now. ``out`` may hold
    pictures of other photos only with ``keep_others``. Raises PhotoError for the folder, OutputError for ``out``, and
    SubjectError if a photo has no mask or its mask is but a hint and there is no extractor, or if no photo is left.
    """
    folder, out = Path(folder), Path(out)
    config = config or (extractor.config if extractor is not None else ExtractConfig())
    if extractor is None and config.use_masks == "hint":
        raise SubjectError("use_masks: 'hint' needs a segment-anything model; give its weights as sam, or use 'keep'")
    paths = list_photos(folder)
    if out.resolve() == folder.resolve():
        raise OutputError(f"{out}: is the folder of the photos; choose another one for the subjects")
    if isinstance(prompts, Mapping):
        _check_prompt_names(prompts, paths)
    if unread := describe_unread(folder, (out,)):
        log.warning("%s", unread)
    names = _output_names(paths)
    if not keep_others:
        _refuse_others(folder, out, {out / f"{name}.png" for name in names.values()})
    report: list[Extracted] = []
    notes: list[str] = []
    stale: list[Path] = []
    replaced: list[str] = []
    for path in paths:
        subject = _subject_or_reason(path, extractor, _prompt_for(path, prompts), config, notes)
        target = out / f"{names[path]}.png"
        if isinstance(subject, Subject):
            before = _bytes(mask_path(target))
            save_pair(target, subject.image, subject.mask)
            replaced += [target.name] if before not in (None, _bytes(mask_path(target))) else []
            report.append(Extracted(path.name, "ok", "own mask" if subject.score is None else subject.score))
        else:
            stale += [target] if target.exists() else []
            report.append(Extracted(path.name, "skipped", subject))
        if progress is not None:
            progress(len(report), len(paths))
    for note in notes:
        log.warning("%s", note)
    if all(line.status == "skipped" for line in report):
        reasons = "\n".join(f"  {line.detail}" for line in report[:5])
        raise SubjectError(f"{folder}: none of its {len(report)} photos shows a usable subject:\n{reasons}")
    if replaced:
        log.warning("%s: these masks of an earlier run were replaced by different ones: %s", out, ", ".join(replaced))
    for picture in stale:
        _set_aside(picture)
    return report


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _refuse_others(folder: Path, out: Path, own: set[Path]) -> None:
    """Raise OutputError if ``out`` holds masked pictures of other photos: they would be learned as well."""
    try:
        others = [p for p in list_photos(out) if p not in own] if out.is_dir() else []
    except PhotoError:  # it holds none
        return
    if others := [p.name for p in others if _is_masked(p)]:
        raise OutputError(
            f"{out}: holds {', '.join(others)}, which belong to no photo in {folder}; delete them with their masks, "
            "choose another folder, or give --keep-others to learn them as well"
        )


def _is_masked(path: Path) -> bool:
    try:
        return load_photo(path, 64).mask is not None
    except PhotoError:
        return mask_path(path).exists()


def _set_aside(picture: Path) -> None:
    """Move a pair that an earlier run made to ``leftovers``, where nothing reads it."""
    place = make_folder(picture.parent / LEFTOVERS)
    log.warning("%s: is from an earlier run, but its photo is now skipped; moved to %s", picture, place)
    for path in (picture, mask_path(picture)):
        if path.exists():
            os.replace(path, place / path.name)


def _subject_or_reason(
    path: Path, extractor: SubjectExtractor | None, prompt: Prompt, config: ExtractConfig, notes: list[str]
) -> Subject | str:
    """The subject of one photo of a batch, or why it is skipped. Raises SubjectError if there is no way to find any."""
    try:
        photo = load_photo(path, config.max_side)
    except PhotoError as e:
        return str(e)
    notes += photo.notes
    if photo.mask is None and extractor is None:
        raise _no_mask(photo)
    try:
        return subject_from_mask(photo, config) if extractor is None else extractor.extract(photo, prompt)
    except SubjectError as e:
        return str(e)


def _prompt_for(path: Path, prompts: Mapping[str, Prompt] | Prompt | None) -> Prompt:
    if isinstance(prompts, Mapping):
        prompts = prompts.get(path.name, prompts.get(path.stem))
    return prompts or Prompt()


def _check_prompt_names(prompts: Mapping[str, Prompt], paths: list[Path]) -> None:
    known = {p.name for p in paths} | {p.stem for p in paths}
    for name in prompts:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise SubjectError(f"prompts: there is no photo '{name}' in {paths[0].parent}{hint}")


def _output_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each photo's pair, so that none overwrites another where a.jpg, A.jpg and a.png stand together."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        stem = path.stem
        if stem.lower().endswith(".mask"):  # x.mask.jpg would write its picture where the mask of x belongs
            stem = stem[: -len(".mask")] + "_mask"
        name, number = stem, 1
        while name.casefold() in taken:
            suffix = path.suffix[1:].lower()
            name = f"{stem}_{suffix}" if number == 1 else f"{stem}_{suffix}{number}"
            number += 1
        taken.add(name.casefold())
        names[path] = name
    return names
