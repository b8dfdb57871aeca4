"""Concept Fusion in the graph: concepts, class pictures and backgrounds become a dataset; datasets become folders."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import Background, ClassPicture, Concept
from ..far_train.data.fusion import ConceptFusion
from ..far_train.data.settings import LAYOUT_SHARES, LAYOUTS, MANY_CONCEPTS, FusionConfig
from ..far_train.evaluation.sheets import dataset_sheet
from ..far_train.utils.errors import ConfigError
from .datasets import NODES as DATASET_NODES
from .datasets import build_previews, describe, overlays
from .pictures import unroll_images
from .previews import shown
from .sockets import FarConcepts, FarDataset, FarPrior, ReportsMemory, all_of, schema

AUTOMATIC = -1.0

LAYOUT_TOOLTIPS = {
    "original": "Share of the photos as they are.",
    "solo": "Share of one subject alone on another background.",
    "pair": "Share of two of your subjects together: this is what keeps look-alikes apart.",
    "triple": "Share of three of your subjects together.",
    "beside_prior": "Share of one subject beside another member of its class; needs class pictures with masks.",
}


class Fusion(ReportsMemory, ConceptFusion):
    """A lazy dataset in a socket."""


class FuseConcepts(io.ComfyNode):
    """Recombines subjects into training pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shares = [
            io.Float.Input(
                layout,
                default=AUTOMATIC,
                min=AUTOMATIC,
                max=1.0,
                step=0.05,
                tooltip=f"{LAYOUT_TOOLTIPS[layout]} -1: as the number of concepts wants it; 0: never.",
                extra_dict={"advanced": True},
            )
            for layout in LAYOUTS
        ]
        return schema(
            node_id="FaR_ConceptFusion",
            display_name="FaR Concept Fusion",
            description="Recombine your subjects, class pictures and backgrounds into training pictures with their "
            "captions and masks. Nothing is built before it is needed; the preview shows the first sixteen.",
            search_aliases=["dataset", "composite", "collage", "augmentation"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FarConcepts.Input("concepts", tooltip="One or more subjects, from FaR Concept."),
                FarPrior.Input(
                    "prior",
                    optional=True,
                    tooltip="Class pictures, from FaR Class Prior or FaR Prior From Images. Strongly advised: they "
                    "keep the class noun's meaning, and beside them a subject learns what is its own.",
                ),
                io.Image.Input(
                    "backgrounds",
                    optional=True,
                    tooltip="Empty scenes without any such subject, from FaR Empty Scenes or as a list or batch of "
                    "your own. Ten or more are a good number; without them, the photos' own surroundings and plain "
                    "colours serve.",
                ),
                io.String.Input(
                    "background_captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The captions of FaR Empty Scenes, or one line per background, in their order: words that "
                    "a caption can end with, such as 'in a garden'. An empty line says nothing about it; empty "
                    "altogether is fine.",
                ),
                io.Int.Input(
                    "size",
                    default=768,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the training pictures in pixels: the base's own, 768 for Stable Diffusion 2.1.",
                ),
                io.Int.Input(
                    "count",
                    default=400,
                    min=1,
                    max=100_000,
                    tooltip="How many training pictures. 200 per concept are a good number.",
                ),
                io.Int.Input(
                    "fusion_seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Every picture is made from this seed and its number. Another seed makes another dataset.",
                ),
                io.Float.Input(
                    "flip",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of mirrored subjects. 0 for subjects whose sides differ: writing, a parting, one "
                    "dark eye.",
                ),
                *shares,
                io.Float.Input(
                    "shadow",
                    default=FusionConfig.shadow,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How dark the soft shadow at a pasted subject's foot is. 0 for subjects that don't stand "
                    "on ground, such as birds in the air, and for photos from above.",
                    extra_dict={"advanced": True},
                ),
                io.Float.Input(
                    "min_area",
                    default=FusionConfig.min_area,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    optional=True,
                    tooltip="A photo whose mask marks less than this share of it is left out, and named in the report. "
                    "0.03 by default. Lower it together with min_area of FaR Extract Subject.",
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[
                FarDataset.Output("dataset", tooltip="For FaR Train or FaR Save Dataset."),
                io.Image.Output("previews", tooltip="The first sixteen pictures with each subject's mask tinted."),
                io.String.Output(
                    "report", tooltip="What the dataset is made of, and what was left out for want of input."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        concepts: Sequence[Sequence[Concept]],
        size: Sequence[int],
        count: Sequence[int],
        fusion_seed: Sequence[int],
        flip: Sequence[float],
        original: Sequence[float],
        solo: Sequence[float],
        pair: Sequence[float],
        triple: Sequence[float],
        beside_prior: Sequence[float],
        prior: Sequence[Sequence[ClassPicture]] = (),
        backgrounds: Sequence[Tensor] = (),
        background_captions: Sequence[str] = (),
        shadow: Sequence[float] = (FusionConfig.shadow,),
        min_area: Sequence[float] = (FusionConfig.min_area,),
    ) -> io.NodeOutput:
        named = all_of("concepts", concepts, Concept, "FAR_CONCEPTS")
        weights = layout_weights(
            len(named), dict(zip(LAYOUTS, (original[0], solo[0], pair[0], triple[0], beside_prior[0])))
        )
        config = FusionConfig(
            size=size[0],
            count=count[0],
            fusion_seed=fusion_seed[0],
            flip=flip[0],
            shadow=shadow[0],
            min_area=min_area[0],
            layout_weights=weights,
        )
        pictures = all_of("prior", prior, ClassPicture, "FAR_PRIOR")
        scenes = with_phrases(unroll_images(backgrounds, "background"), background_captions)
        fusion = Fusion(named, pictures, scenes, config)
        composites = build_previews(fusion, cls.hidden.unique_id)
        report = describe(fusion, fusion.notes)
        sheet = dataset_sheet(composites, fusion.names)
        return io.NodeOutput(fusion, overlays(composites, fusion), report, ui=shown(cls, sheet, report))


def layout_weights(concepts: int, chosen: dict[str, float]) -> dict[str, float] | None:
    """The shares of the layouts: those chosen, and the method's own where a share is below 0. None if all are."""
    if all(share < 0 for share in chosen.values()):
        return None
    usual = LAYOUT_SHARES.get(concepts, MANY_CONCEPTS)
    return {layout: usual[layout] if share < 0 else share for layout, share in chosen.items()}


def with_phrases(scenes: Sequence[Tensor], captions: Sequence[str]) -> list[Background]:
    """Backgrounds with their phrases: lines of one text, or one text per scene. Raises ConfigError."""
    lines = captions[0].split("\n") if len(captions) == 1 else list(captions)
    lines = [" ".join(line.split()) for line in lines]
    if not any(lines):
        return [Background(scene) for scene in scenes]
    while len(lines) > len(scenes) and not lines[-1]:
        lines.pop()
    if len(lines) != len(scenes):
        raise ConfigError(
            f"background_captions: there are {len(lines)} lines for {len(scenes)} backgrounds; "
            "write one line for each, empty where there is nothing to say"
        )
    return [Background(scene, line) for scene, line in zip(scenes, lines)]


NODES = [FuseConcepts, *DATASET_NODES]
