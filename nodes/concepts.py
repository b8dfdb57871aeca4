"""Concepts: what a subject is called, and its photos with their masks."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.captions import check_token
from ..far_train.data.concepts import Concept
from ..far_train.utils.errors import SubjectError, TokenError
from .pictures import (
    HOW_TO_GET_MASKS,
    INVERT_TOOLTIP,
    counted,
    doubts,
    match_masks,
    name_photos,
    tidy_noun,
    unroll_images,
    unroll_masks,
)
from .previews import refusal_shown, shown, subject_sheet
from .sockets import Carried, FarConcepts, all_of, schema


class MakeConcept(io.ComfyNode):
    """A subject to be learned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_Concept",
            display_name="FaR Concept",
            description="Define a subject to train: its photos, masks, placeholder token and class noun. For several "
            "subjects, connect one node's output to the next node's 'concepts'.",
            search_aliases=["subject", "character", "token", "dreambooth", "personalization"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Photos of the subject, as a list or a batch. 4 to 20 work well."),
                io.Mask.Input(
                    "masks",
                    tooltip="One mask per photo, of the same size, 1 = subject, from any node. Photos with an empty "
                    "mask are skipped and listed on the node.",
                ),
                FarConcepts.Input("concepts", optional=True, tooltip="Other concepts to train together with this one."),
                io.String.Input(
                    "token",
                    display_name="placeholder token",
                    default="<corgi-dog>",
                    tooltip="The new word that stands for this subject in prompts: lower-case letters, digits and "
                    "hyphens between < and >, such as <corgi-dog>.",
                ),
                io.String.Input(
                    "noun",
                    display_name="class noun",
                    default="dog",
                    tooltip="The class of the subject, in a common word that the model knows: dog, cat, person, "
                    "backpack. Use the same noun for look-alikes. Prompts contain both: a <corgi-dog> dog.",
                ),
                io.Boolean.Input("invert_mask", default=False, tooltip=INVERT_TOOLTIP),
                io.String.Input(
                    "names",
                    optional=True,
                    force_input=True,
                    tooltip="The names of the photos, for messages. Connect the names of the node that sends the "
                    "images.",
                ),
            ],
            outputs=[
                FarConcepts.Output(
                    "concepts", tooltip="All concepts so far, for FaR Concept Fusion or the next FaR Concept."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, token: Sequence[str | None]) -> bool | str:
        try:
            return all(check_token(t) for t in token if t is not None)
        except TokenError as e:
            return str(e)

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        token: Sequence[str],
        noun: Sequence[str],
        invert_mask: Sequence[bool],
        concepts: Sequence[Sequence[Concept]] = (),
        names: Sequence[str] = (),
    ) -> io.NodeOutput:
        before = all_of("concepts", concepts, Concept, "FAR_CONCEPTS")
        if any(concept.token == token[0] for concept in before):
            raise TokenError(f"token: {token[0]} is the name of an earlier concept; give each its own")
        pictures = unroll_images(images)
        labels, warnings = name_photos(len(pictures), names)
        found = match_masks(pictures, unroll_masks(masks), invert=invert_mask[0], labels=labels)
        kept = [(picture, mask, label) for picture, mask, label in zip(pictures, found, labels) if mask is not None]
        without = [label for label, mask in zip(labels, found) if mask is None]
        if not kept:
            some = "the photo's mask is" if len(pictures) == 1 else f"the masks of all {len(pictures)} photos are"
            raise SubjectError(f"concept {token[0]}: {some} empty; {HOW_TO_GET_MASKS}")
        concept = Concept(token[0], tidy_noun(noun[0]), *zip(*kept))
        text = f"{concept.name.phrase}: {counted(len(kept), 'photo')}"
        warnings += [f"skipped, since their masks are empty: {', '.join(without)}"] if without else []
        warnings += doubts(concept.images, concept.masks, concept.labels)
        sheet = subject_sheet(concept.images, concept.masks)
        return io.NodeOutput(Carried((*before, concept)), ui=shown(cls, sheet, text, warnings))


NODES = [MakeConcept]
