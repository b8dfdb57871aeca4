"""Judging pictures: is every concept there, like its photos, and unmixed?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy_api.latest import io
from scipy import ndimage
from torch import Tensor

from ..far_train.data.concepts import Concept
from ..far_train.data.images import from_pil
from ..far_train.data.subjects import SubjectExtractor
from ..far_train.evaluation.detect_and_compare import (
    Comparison,
    Evaluation,
    compare_picture,
    propose_masks,
    read_references,
)
from ..far_train.evaluation.image_encoders import HOW_TO_GET_ONE, Encoder, FolderEncoder
from ..far_train.evaluation.sheets import contact_sheet, evaluation_plot, tinted
from ..far_train.utils.errors import EncoderError, SubjectError
from . import host_folders, host_memory, host_ui, host_vision
from .pictures import counted, unroll_images, unroll_masks
from .previews import MAX_SHOWN, as_image, shown
from .sockets import FarConcepts, SamModel, all_of, schema

AUTOMATIC = "automatic"
MINI_ORACLE = "FaR mini oracle (built in)"
LEAST_PART = 0.01  # of the frame: smaller pieces of a mask are specks


class Evaluate(io.ComfyNode):
    """Detect-and-Compare with an encoder that is on this computer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_Evaluate",
            display_name="FaR Evaluate",
            description="Compare the subjects of generated images with the photos of the concepts: similarity, "
            "presence, and attribute leakage between concepts (Detect-and-Compare).",
            search_aliases=["metric", "similarity", "dino score", "clip score", "detect and compare"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to evaluate, as a list or a batch."),
                FarConcepts.Input("concepts", tooltip="The concepts with their photos and masks, from FaR Concept."),
                io.Combo.Input(
                    "encoder",
                    options=[AUTOMATIC, *(p.name for p in host_folders.model_subfolders("clip_vision")), MINI_ORACLE],
                    tooltip="The image encoder that measures similarity. automatic: the connected CLIP_VISION, else "
                    "the first folder in models/clip_vision (DINOv2 is best). The mini oracle only knows the drawn "
                    "subjects of FaR Mini Photos.",
                ),
                io.Float.Input(
                    "presence",
                    display_name="presence threshold",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="A subject counts as present if its similarity to the photos is at least this multiple of "
                    "the photos' similarity to each other.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="An image encoder from Load CLIP Vision: CLIP, SigLIP or DINOv2.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="The subjects in each image: one mask whose separate regions are the subjects, or a batch "
                    "with one mask per subject.",
                ),
                SamModel.Input(
                    "sam_model",
                    optional=True,
                    tooltip="Proposes subjects if no masks are connected. Surplus subjects are not counted then.",
                ),
            ],
            outputs=[
                io.String.Output("table", tooltip="Similarity, presence and leakage of each concept."),
                io.Image.Output("plot", tooltip="The same as an image, with the similarity matrices."),
                io.Image.Output(
                    "seen", is_output_list=True, tooltip="The images, each subject tinted in its concept's color."
                ),
                io.Float.Output("score", tooltip="Mean Detect-and-Compare score; 1 is best."),
                io.Mask.Output(
                    "subject_masks",
                    is_output_list=True,
                    tooltip="For each image one mask per concept, in their order, for detailers and regional prompts. "
                    "Empty where the concept is missing.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor],
        concepts: Sequence[Sequence[Concept]],
        encoder: Sequence[str],
        presence: Sequence[float],
        clip_vision: Sequence[Any] = (),
        masks: Sequence[Tensor] = (),
        sam_model: Sequence[Any] = (),
    ) -> io.NodeOutput:
        pictures = unroll_images(images)
        known = all_of("concepts", concepts, Concept, "FAR_CONCEPTS")
        chosen = choose_encoder(encoder[0], clip_vision[0] if len(clip_vision) else None)
        given = sort_masks(masks, pictures) if len(masks) else None
        sam = SubjectExtractor(sam_model[0]).sam if len(sam_model) else None
        detect = getattr(chosen, "detect", None)
        proposing = given is None and detect is None
        if proposing and sam is None:
            raise SubjectError(
                "masks: where are the subjects? Connect masks of any segmenter, or a sam_model that proposes them"
            )
        progress = host_ui.Progress(len(pictures), cls.hidden.unique_id)
        compared, seen, regions = [], [], []
        with placed(chosen), host_memory.on_compute_device(sam) if proposing else nullcontext():
            references = read_references(known, chosen)
            for i, picture in enumerate(pictures):
                host_ui.stop_if_interrupted()
                if given is not None:
                    found = given[i]
                elif detect is not None:
                    found = detect(picture)
                else:
                    found = propose_masks(sam, picture)
                features = chosen.features(picture, found)
                compared.append(compare_picture(features, references, presence=presence[0], counts_extra=not proposing))
                seen.append(tinted(picture, *_coloured(found, compared[-1], proposing)))
                regions.append(_concept_masks(picture, found, compared[-1]))
                progress.update(i + 1)
        host_memory.empty_cache()
        whole = Evaluation(references.names, references.similarity, tuple(compared))
        words = [c.words(whole.names) for c in compared]
        sheet = contact_sheet(seen[:MAX_SHOWN], words[:MAX_SHOWN])
        display = shown(cls, sheet, whole.words)
        return io.NodeOutput(
            whole.table(),
            as_image(evaluation_plot(whole)),
            [from_pil(p)[None] for p in seen],
            whole.score,
            regions,
            ui=display,
        )


def _concept_masks(picture: Tensor, found: Sequence[Tensor], comparison: Comparison) -> Tensor:
    """Where each concept is in a picture [H, W, 3]: masks [concepts, H, W], all 0 where it is missing."""
    nowhere = torch.zeros(picture.shape[:2])
    here = [m.index if m is not None and m.present else None for m in comparison.matches]
    return torch.stack([nowhere if i is None else found[i].float().cpu() for i in here])


def choose_encoder(name: str, clip_vision: Any = None) -> Encoder:
    """The encoder behind a choice of the node; use it in :func:`placed`. Raises EncoderError: how to get one."""
    if name == MINI_ORACLE:
        from ..far_train.mini.likeness import OracleEncoder
        from ..far_train.mini.shipped import small_oracle

        return OracleEncoder(small_oracle())
    if name == AUTOMATIC and clip_vision is not None:
        if not hasattr(clip_vision, "encode_image"):
            what = type(clip_vision).__name__
            raise EncoderError(f"clip_vision: expected a CLIP_VISION of another node, got {what}; connect one")
        return host_vision.ClipVisionEncoder(clip_vision)
    folders = {path.name: path for path in host_folders.model_subfolders("clip_vision")}
    if name == AUTOMATIC and folders:
        name = next(iter(folders))
    if name not in folders:
        raise EncoderError(
            f"encoder: there is no image encoder in models/clip_vision: {HOW_TO_GET_ONE}. Or connect Load CLIP Vision. "
            f"For the drawn subjects of the small world choose '{MINI_ORACLE}'"
        )
    return FolderEncoder(folders[name])


def placed(encoder: Encoder) -> AbstractContextManager[Any]:
    """Have an encoder from a folder on the compute device for a while; the others need no help."""
    if isinstance(encoder, FolderEncoder):
        return host_memory.on_compute_device(encoder.model)
    return nullcontext()


def sort_masks(masks: Sequence[Tensor], pictures: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each picture's subjects [H, W]. A list with an item per picture, or one batch with a mask per picture.

    A picture's only mask may show several subjects: its separate pieces. Raises SubjectError.
    """
    each = [unroll_masks([value]) for value in masks]
    if len(each) == 1 and len(each[0]) == len(pictures) > 1:
        each = [[mask] for mask in each[0]]
    if len(each) != len(pictures):
        raise SubjectError(
            f"masks: got {counted(sum(map(len, each)), 'mask')} for {counted(len(pictures), 'picture')}; connect a "
            "list with one entry for each picture, or a batch with one mask for each"
        )
    for i, (own, picture) in enumerate(zip(each, pictures)):
        if any(mask.shape != picture.shape[:2] for mask in own):
            raise SubjectError(
                f"masks: those of picture {i + 1} have another size than the picture; scale them to "
                f"{picture.shape[1]}×{picture.shape[0]}"
            )
    return [_pieces(own[0]) if len(own) == 1 else [m for m in own if bool((m > 0.5).any())] for own in each]


def _pieces(mask: Tensor) -> list[Tensor]:
    labels, count = ndimage.label(mask.numpy() > 0.5)
    parts = [torch.from_numpy(labels == i + 1).float() for i in range(count)]
    return [part for part in parts if float(part.mean()) >= LEAST_PART]


def _coloured(found: Sequence[Tensor], comparison: Comparison, proposed: bool) -> tuple[list[Tensor], list[int | None]]:
    """The masks to show with their concepts' numbers; proposals that were taken for no subject are left out."""
    owners = {match.index: i for i, match in enumerate(comparison.matches) if match is not None}
    kept = [j for j in range(len(found)) if j in owners or not proposed]
    return [found[j] for j in kept], [owners.get(j) for j in kept]


NODES: list[type[io.ComfyNode]] = [Evaluate]
