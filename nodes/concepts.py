"""Concepts: what a subject is called, and its photos with their masks."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.captions import check_token
from ..far_train.data.concepts import Concept
from ..far_train.utils.errors import SubjectError, TokenError
from . import priors
from .pictures import (
    HOW_TO_GET_MASKS,
    INVERT_TOOLTIP,
    counted,
    doubts,
    match_masks,
    photo_labels,
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
            description="Name a subject and give it its photos. Chain several: one concept's output goes into the next "
            "one's 'concepts'.",
            search_aliases=["subject", "token", "dreambooth", "personalization"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="The subject's photos, as a list or a batch. 4 to 20 are a good number."
                ),
                io.Mask.Input(
                    "masks",
                    tooltip="One mask per photo, of its size, 1 = subject, from any node. Photos whose mask is empty "
                    "are left out and named.",
                ),
                FarConcepts.Input(
                    "concepts", optional=True, tooltip="The concepts before this one, if there are several."
                ),
                io.String.Input(
                    "token",
                    default="<corgi-dog>",
                    tooltip="The new word for this subject, as you will write it in prompts: lower-case letters, "
                    "digits and hyphens between < and >, such as <corgi-dog>.",
                ),
                io.String.Input(
                    "noun",
                    default="dog",
                    tooltip="What kind of thing it is, in a plain word that the model knows: dog, cat, person, "
                    "backpack. Look-alike subjects share their noun. Prompts say both: a <corgi-dog> dog.",
                ),
                io.Boolean.Input("invert_mask", default=False, tooltip=INVERT_TOOLTIP),
            ],
            outputs=[
                FarConcepts.Output("concepts", tooltip="All concepts so far: for FaR Concept Fusion or the next one.")
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
    ) -> io.NodeOutput:
        before = all_of("concepts", concepts, Concept, "FAR_CONCEPTS")
        if any(concept.token == token[0] for concept in before):
            raise TokenError(f"token: {token[0]} is the name of an earlier concept; give each its own")
        pictures = unroll_images(images)
        found = match_masks(pictures, unroll_masks(masks), invert=invert_mask[0])
        kept = [(picture, mask) for picture, mask in zip(pictures, found) if mask is not None]
        without = [label for label, mask in zip(photo_labels(len(pictures)), found) if mask is None]
        if not kept:
            some = "the photo's mask is" if len(pictures) == 1 else f"the masks of all {len(pictures)} photos are"
            raise SubjectError(f"concept {token[0]}: {some} empty; {HOW_TO_GET_MASKS}")
        concept = Concept(token[0], tidy_noun(noun[0]), tuple(p for p, _ in kept), tuple(m for _, m in kept))
        text = f"{concept.name.phrase}: {counted(len(kept), 'photo')}"
        warnings = [f"left out, since their masks are empty: {', '.join(without)}"] if without else []
        labels = [label for label, mask in zip(photo_labels(len(pictures)), found) if mask is not None]
        warnings += doubts(concept.images, concept.masks, labels)
        sheet = subject_sheet(concept.images, concept.masks)
        return io.NodeOutput(Carried((*before, concept)), ui=shown(cls, sheet, text, warnings))


NODES = [MakeConcept, *priors.NODES]
