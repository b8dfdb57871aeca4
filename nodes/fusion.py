"""Concept Fusion in the graph: concepts, regularization images and backgrounds become a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import Background, ClassPicture, Concept
from ..far_train.data.fusion import ConceptFusion
from ..far_train.data.settings import BACKGROUND_SHARES, LAYOUT_SHARES, LAYOUTS, MANY_CONCEPTS, FusionConfig
from ..far_train.evaluation.sheets import dataset_sheet
from ..far_train.utils.errors import ConfigError
from .datasets import NODES as DATASET_NODES
from .datasets import build_previews, describe, overlays
from .pictures import unroll_images
from .previews import refusal_shown, shown
from .sockets import FarConcepts, FarDataset, FarPrior, ReportsMemory, all_of, schema

AUTOMATIC = -1.0

# Label and tooltip of a layout's share.
LAYOUT_TEXTS = {
    "original": ("original photos", "Share of the unchanged photos."),
    "solo": ("one subject", "Share of one subject on another background."),
    "pair": ("two subjects", "Share of two of your subjects together. They keep look-alikes apart."),
    "triple": ("three subjects", "Share of three of your subjects together."),
    "beside_prior": (
        "subject beside its class",
        "Share of one subject beside another member of its class. Needs regularization images with masks.",
    ),
}
# Label and tooltip of a background's share.
BACKGROUNDS = {
    "scene": ("connected backgrounds", "Share of the images connected to 'backgrounds'."),
    "infilled": ("filled-in photos", "Share of your photos with the subject filled in."),
    "prior": ("filled-in regularization images", "Share of regularization images with the subject filled in."),
    "plain": ("plain colors", "Share of plain colors."),
}
# Settings whose inputs a graph of an earlier version may lack.
OPTIONAL = ("shadow", "min_area", "rotation", "brightness", "row_probability", "collage_caption_probability")


class Fusion(ReportsMemory, ConceptFusion):
    """A lazy dataset in a socket."""


class FuseConcepts(io.ComfyNode):
    """Recombines subjects into training pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        layouts = [_share_input(name, *LAYOUT_TEXTS[name], "by the number of concepts") for name in LAYOUTS]
        backgrounds = [
            _share_input(f"background_{name}", label, tooltip, f"{BACKGROUND_SHARES[name]:g}", optional=True)
            for name, (label, tooltip) in BACKGROUNDS.items()
        ]
        return schema(
            node_id="FaR_ConceptFusion",
            display_name="FaR Concept Fusion",
            description="Compose training images with captions and masks from your subjects, regularization images and "
            "backgrounds. They are composed when needed; the preview shows the first 16.",
            search_aliases=["dataset", "training set", "composite", "collage", "augmentation"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FarConcepts.Input("concepts", tooltip="One or more concepts, from FaR Concept."),
                FarPrior.Input(
                    "prior",
                    display_name="regularization images",
                    optional=True,
                    tooltip="From FaR Regularization Images, generated or own. Recommended: they keep the meaning of "
                    "the class noun, and the model learns what sets your subject apart from its class.",
                ),
                io.Image.Input(
                    "backgrounds",
                    optional=True,
                    tooltip="Background images without subjects, from FaR Empty Scenes or your own. Ten or more work "
                    "well. Without them, filled-in photos and plain colors are used.",
                ),
                io.String.Input(
                    "background_captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The captions of FaR Empty Scenes, or one line per background, in the same order: a phrase "
                    "that ends the caption, such as 'in a garden'. Lines may be empty.",
                ),
                io.Int.Input(
                    "size",
                    default=FusionConfig.size,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Width and height of the training images. Set the native size of the base model: Stable "
                    "Diffusion 1.5: 512, 2.1: 768, XL: 1024.",
                ),
                io.Int.Input(
                    "count",
                    default=FusionConfig.count,
                    min=1,
                    max=100_000,
                    tooltip="Number of training images. 200 per concept work well.",
                ),
                io.Int.Input(
                    "fusion_seed",
                    display_name="seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Another seed makes another dataset.",
                ),
                io.Float.Input(
                    "flip",
                    display_name="flip probability",
                    default=FusionConfig.flip,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Probability that a subject is flipped horizontally. Use 0 for asymmetric subjects, for "
                    "example with text.",
                ),
                *layouts,
                _setting(
                    "shadow",
                    "Strength of the shadow under a pasted subject. Use 0 for subjects that don't stand on the "
                    "ground and for photos from above.",
                ),
                _setting(
                    "min_area",
                    "A photo is skipped if its mask covers less than this fraction of it. Default: 0.03. Lower "
                    "it together with that of FaR Extract Subject.",
                    label="minimum area",
                    high=0.9,
                    step=0.01,
                ),
                _setting("rotation", "Subjects are rotated by up to this many degrees.", high=180.0, step=1.0),
                _setting(
                    "brightness",
                    "The brightness of subjects is changed by up to this fraction.",
                    label="brightness jitter",
                    high=0.9,
                ),
                _setting(
                    "row_probability",
                    "Probability that several subjects stand close together in a row, at the same size.",
                ),
                _setting(
                    "collage_caption_probability",
                    "Probability that the caption calls the image a collage, so that the model ties pasting "
                    "artifacts to that word.",
                ),
                *backgrounds,
            ],
            outputs=[
                FarDataset.Output("dataset", tooltip="For FaR Train or FaR Save Dataset."),
                io.Image.Output("previews", tooltip="The first 16 images, with the subjects' masks tinted."),
                io.String.Output("report", tooltip="What the dataset is made of, and what was skipped."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, size: Sequence[int | None]) -> bool | str:
        try:
            for side in size:
                FusionConfig(size=FusionConfig.size if side is None else side)  # None: it comes over a link
        except ConfigError as e:
            return str(e)
        return True

    @classmethod
    def execute(
        cls,
        concepts: Sequence[Sequence[Concept]],
        size: Sequence[int],
        count: Sequence[int],
        fusion_seed: Sequence[int],
        flip: Sequence[float],
        prior: Sequence[Sequence[ClassPicture]] = (),
        backgrounds: Sequence[Tensor] = (),
        background_captions: Sequence[str] = (),
        **others: Sequence[float],
    ) -> io.NodeOutput:
        named = all_of("concepts", concepts, Concept, "FAR_CONCEPTS")
        layouts = {name: others.get(name, (AUTOMATIC,))[0] for name in LAYOUTS}
        backdrops = {name: others.get(f"background_{name}", (AUTOMATIC,))[0] for name in BACKGROUNDS}
        config = FusionConfig(
            size=size[0],
            count=count[0],
            fusion_seed=fusion_seed[0],
            flip=flip[0],
            layout_weights=shares(layouts, LAYOUT_SHARES.get(len(named), MANY_CONCEPTS)),
            background_weights=shares(backdrops, BACKGROUND_SHARES),
            **{name: others[name][0] for name in OPTIONAL if name in others},
        )
        pictures = all_of("prior", prior, ClassPicture, "FAR_PRIOR")
        scenes = with_phrases(unroll_images(backgrounds, "background"), background_captions)
        fusion = Fusion(named, pictures, scenes, config)
        composites = build_previews(fusion, cls.hidden.unique_id)
        report = describe(fusion, fusion.notes)
        sheet = dataset_sheet(composites, fusion.names)
        return io.NodeOutput(fusion, overlays(composites, fusion), report, ui=shown(cls, sheet, report))


def shares(chosen: Mapping[str, float], defaults: Mapping[str, float]) -> dict[str, float] | None:
    """The chosen shares, with the default where one is below 0. None if all are."""
    if all(share < 0 for share in chosen.values()):
        return None
    return {name: defaults[name] if share < 0 else share for name, share in chosen.items()}


def _setting(name: str, tooltip: str, *, label: str | None = None, high: float = 1.0, step: float = 0.05) -> io.Input:
    """A setting that a graph may leave out: one of ``OPTIONAL``."""
    return io.Float.Input(
        name,
        display_name=label,
        default=getattr(FusionConfig, name),
        min=0.0,
        max=high,
        step=step,
        optional=True,
        tooltip=tooltip,
        extra_dict={"advanced": True},
    )


def _share_input(name: str, label: str, tooltip: str, default: str, optional: bool = False) -> io.Input:
    """A share of the training images; ``default`` says what -1 stands for."""
    return io.Float.Input(
        name,
        display_name=f"{label} (share)",
        default=AUTOMATIC,
        min=AUTOMATIC,
        max=1.0,
        step=0.05,
        optional=optional,
        tooltip=f"{tooltip} -1: {default}; 0: never.",
        extra_dict={"advanced": True},
    )


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
