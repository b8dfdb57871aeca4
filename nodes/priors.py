"""Class pictures and empty scenes, drawn by the base; or class pictures that the user brings."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.concepts import ClassPicture, Concept
from ..far_train.data.folders import mask_path
from ..far_train.data.images import load_mask, load_photo, save_mask, to_pil
from ..far_train.data.settings import ExtractConfig
from ..far_train.data.subjects import Prompt, SubjectExtractor
from ..far_train.models.base import BaseModel
from ..far_train.models.settings import SampleConfig
from ..far_train.training.class_images import (
    EVERYDAY_SCENES,
    draw_class_images,
    draw_empty_scenes,
    parse_scenes,
    picture_path,
    scene_path,
)
from ..far_train.utils.devices import choose_device
from ..far_train.utils.errors import FarError
from ..far_train.utils.files import make_folder, write_json
from . import host, host_ui
from .photos import find_subjects
from .pictures import INVERT_TOOLTIP, counted, doubts, match_masks, photo_labels, tidy_noun, unroll_images, unroll_masks
from .previews import MAX_SHOWN, as_image, shown, subject_sheet
from .sockets import Carried, Clip, FarConcepts, FarPrior, Model, SamModel, Vae, all_of, schema

Drawn = TypeVar("Drawn")


class ClassPrior(io.ComfyNode):
    """Class pictures that the base draws itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_ClassPrior",
            display_name="FaR Class Prior",
            description="Let the base model draw pictures of each concept's class ('a photo of a dog'), so that "
            "training keeps what the word means. They are kept in output/far/priors and never drawn twice.",
            search_aliases=["regularization images", "prior preservation", "class images"],
            inputs=[
                *base_inputs(),
                FarConcepts.Input("concepts", tooltip="The concepts, whose nouns say what is drawn."),
                SamModel.Input(
                    "sam_model",
                    optional=True,
                    tooltip="Finds the subject of each class picture, so that Concept Fusion can put it beside yours. "
                    "Strongly advised: without it, one layout falls away.",
                ),
                io.Int.Input(
                    "count",
                    default=50,
                    min=1,
                    max=2000,
                    tooltip="Pictures per noun. 50 to 100 are a good number; 12 are enough for a first try. More can "
                    "be added later: those that are there stay.",
                ),
                *sampling_inputs("prior_seed"),
            ],
            outputs=[
                FarPrior.Output("prior", tooltip="For FaR Concept Fusion."),
                io.Image.Output("preview", tooltip="The first of them with their masks, as one picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        concepts: Sequence[Concept],
        count: int,
        prior_seed: int,
        steps: int,
        guidance: float,
        size: int,
        sam_model: Any = None,
    ) -> io.NodeOutput:
        nouns = sorted({concept.noun for concept in all_of("concepts", [concepts], Concept, "FAR_CONCEPTS")})
        if sam_model is not None:
            SubjectExtractor(sam_model)  # so that a wrong one is refused before the pictures are drawn
        wanted = [(noun, i) for noun in nouns for i in range(count)]
        progress = host_ui.Progress(len(wanted), cls.hidden.unique_id)
        config = sampling(prior_seed, steps, guidance)
        pictures, folder = draw_once(
            "priors",
            (model, clip, vae),
            config,
            size,
            lambda folder: [picture_path(folder, *w) for w in wanted],
            lambda base, folder, **on: draw_class_images(base, nouns, count, folder, config, size=size or None, **on),
            progress,
        )
        if sam_model is not None:
            pictures = with_masks(pictures, [picture_path(folder, *w) for w in wanted], sam_model, progress)
        masked = sum(p.mask is not None for p in pictures)
        text = f"{counted(len(pictures), 'class picture')}, {masked} of them with a mask, in {folder}"
        return prior_output(cls, pictures, text)


class EmptyScenes(io.ComfyNode):
    """Backgrounds that the base draws itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_EmptyScenes",
            display_name="FaR Empty Scenes",
            description="Let the base model draw empty places for Concept Fusion to put your subjects into. They are "
            "what keeps a subject from being tied to the place of its photos. They are kept in output/far/scenes and "
            "never drawn twice.",
            search_aliases=["backgrounds", "background images", "background generator"],
            inputs=[
                *base_inputs(),
                io.String.Input(
                    "scenes",
                    default=EVERYDAY_SCENES,
                    multiline=True,
                    tooltip="One place a line: what to draw, a bar, and what captions say of it, such as 'an empty "
                    "beach | on the beach'. Ask for places that fit your subjects and hold none like them. Eight or "
                    "more are a good number.",
                ),
                io.Int.Input(
                    "each",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="Pictures of every place. 2 to 4 are a good number; 1 is enough for a first try.",
                ),
                *sampling_inputs("scene_seed"),
            ],
            outputs=[
                io.Image.Output(
                    "backgrounds", is_output_list=True, tooltip="For the backgrounds of FaR Concept Fusion."
                ),
                io.String.Output(
                    "captions",
                    is_output_list=True,
                    tooltip="What captions say of each, for background_captions of FaR Concept Fusion.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        scenes: str,
        each: int,
        scene_seed: int,
        steps: int,
        guidance: float,
        size: int,
    ) -> io.NodeOutput:
        places = parse_scenes(scenes.splitlines())
        progress = host_ui.Progress(len(places) * each, cls.hidden.unique_id)
        config = sampling(scene_seed, steps, guidance)
        drawn, folder = draw_once(
            "scenes",
            (model, clip, vae),
            config,
            size,
            lambda folder: [scene_path(folder, place.prompt, i) for place in places for i in range(each)],
            lambda base, folder, **on: draw_empty_scenes(base, places, each, folder, config, size=size or None, **on),
            progress,
        )
        some = drawn[:MAX_SHOWN]
        sheet = subject_sheet([b.image for b in some], [None] * len(some), [b.phrase for b in some])
        text = f"{counted(len(drawn), 'empty scene')} in {folder}"
        return io.NodeOutput([b.image[None] for b in drawn], [b.phrase for b in drawn], ui=shown(cls, sheet, text))


def base_inputs() -> list[Any]:
    """The sockets of the base that a node draws with."""
    return [
        Model.Input("model", tooltip="The base that will be trained: Stable Diffusion 2.1."),
        Clip.Input("clip", tooltip="Its text encoder."),
        Vae.Input("vae", tooltip="Its VAE."),
    ]


def sampling_inputs(seed: str) -> list[Any]:
    """How a node draws with the base, read by :func:`sampling`; ``seed`` names the input of the seed."""
    return [
        io.Int.Input(
            seed,
            default=0,
            min=0,
            max=2**53 - 1,
            control_after_generate=False,
            tooltip="Seed of the pictures. Keep it, and they are found again on disk.",
        ),
        io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps of a picture. 20 are enough."),
        io.Float.Input(
            "guidance", default=7.0, min=1.0, max=20.0, step=0.5, tooltip="Classifier-free guidance. 6 to 7.5."
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=2048,
            step=64,
            tooltip="Side of the pictures in pixels; 0 is the base's own (768 for Stable Diffusion 2.1).",
        ),
    ]


def sampling(seed: int, steps: int, guidance: float) -> SampleConfig:
    return SampleConfig(sample_seed=seed, sampler="dpm++", sampling_steps=steps, guidance=guidance, sample_batch=1)


def draw_once(
    kind: str,
    models: tuple[Any, Any, Any],
    config: SampleConfig,
    size: int,
    paths: Callable[[Path], Sequence[Path]],
    draw: Callable[..., list[Drawn]],
    progress: host_ui.Progress,
) -> tuple[list[Drawn], Path]:
    """What ``draw(base, folder, on_progress=, on_step=)`` gives, and the folder in which it keeps the pictures.

    ``models``: MODEL, CLIP and VAE. The base goes to the device only if one of ``paths(folder)`` is missing.
    """
    with host.no_inference_mode():
        base = host.read_base(*models)
        folder = drawn_folder(kind, base, config, size or base.native_size)
        try:
            if not all(path.exists() for path in paths(folder)):
                host.free_everything()
                base.to(*choose_device(str(host.compute_device())))
            drawn = draw(
                base,
                folder,
                on_progress=lambda done, total: _show_progress(progress, folder, done, total),
                on_step=lambda _done, _total: host_ui.stop_if_interrupted(),
            )
        finally:
            del base
            gc.collect()
            host.free_everything()
    return drawn, folder


def _show_progress(progress: host_ui.Progress, folder: Path, done: int, total: int) -> None:
    """Report the pictures drawn so far and show the newest. What is drawn is on disk, so a cancel loses nothing."""
    host_ui.stop_if_interrupted()
    newest = max(folder.rglob("*[0-9][0-9][0-9][0-9].png"), key=lambda p: p.stat().st_mtime_ns, default=None)
    progress.update(done, total, None if newest is None else to_pil(load_photo(newest).image))


def drawn_folder(kind: str, base: BaseModel, config: SampleConfig, size: int) -> Path:
    """Where what this base draws with these settings is kept. The number of pictures doesn't matter: it may grow."""
    settings = {
        "base": base.fingerprint,
        "prediction_type": base.prediction_type,
        "size": size,
        "prior_seed": config.sample_seed,
        "sampler": config.sampler,
        "steps": config.sampling_steps,
        "guidance": config.guidance,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = make_folder(host.output_folder() / "far" / kind / key)
    write_json(folder / "settings.json", settings)
    return folder


def with_masks(
    pictures: Sequence[ClassPicture], paths: Sequence[Path], sam: Any, progress: host_ui.Progress
) -> list[ClassPicture]:
    """The pictures with their subjects' masks, made once and kept beside them, where people can mend them."""
    masks = [load_mask(mask_path(p)) if mask_path(p).exists() else None for p in paths]
    missing = [i for i, mask in enumerate(masks) if mask is None]
    photos = [load_photo(paths[i]) for i in missing]
    found = find_subjects(photos, sam, [Prompt()] * len(photos), ExtractConfig())
    for done, (i, (_, subject)) in enumerate(zip(missing, found)):
        if not isinstance(subject, FarError):
            save_mask(mask_path(paths[i]), subject.mask)
            masks[i] = subject.mask
        progress.update(done + 1, len(missing))
    return [ClassPicture(p.noun, p.image, mask) for p, mask in zip(pictures, masks)]


class PriorFromImages(io.ComfyNode):
    """Class pictures that the user brings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_PriorFromImages",
            display_name="FaR Prior From Images",
            description="Use your own pictures of a class: other dogs than yours, generated or photographed.",
            search_aliases=["regularization images", "prior preservation", "class images"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of members of the class that are not your subjects."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per picture, 1 = subject. Pictures with a mask can stand beside your subjects; "
                    "those with an empty mask only keep the word's meaning.",
                ),
                FarPrior.Input("prior", optional=True, tooltip="Class pictures to add these to."),
                io.String.Input("noun", default="dog", tooltip="Their class noun, the same word as in FaR Concept."),
                io.Boolean.Input("invert_mask", default=False, tooltip=INVERT_TOOLTIP),
            ],
            outputs=[
                FarPrior.Output("prior", tooltip="For FaR Concept Fusion."),
                io.Image.Output("preview", tooltip="The first of them with their masks, as one picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images: Sequence[Tensor],
        noun: Sequence[str],
        invert_mask: Sequence[bool],
        masks: Sequence[Tensor] = (),
        prior: Sequence[Sequence[ClassPicture]] = (),
    ) -> io.NodeOutput:
        word = tidy_noun(noun[0])
        pictures = unroll_images(images)
        found: Sequence[Tensor | None] = [None] * len(pictures)
        if len(masks):
            found = match_masks(pictures, unroll_masks(masks), invert=invert_mask[0])
        own = [ClassPicture(word, picture, mask) for picture, mask in zip(pictures, found)]
        masked = sum(p.mask is not None for p in own)
        everything = [*all_of("prior", prior, ClassPicture, "FAR_PRIOR"), *own]
        text = f"{counted(len(own), 'picture')} of a {word}, {masked} of them with a mask"
        return prior_output(cls, everything, text, doubts(pictures, found, photo_labels(len(pictures))))


def prior_output(
    cls: type[io.ComfyNode], pictures: Sequence[ClassPicture], text: str, warnings: Sequence[str] = ()
) -> io.NodeOutput:
    """Class pictures as a node's output, with a sheet of the newest."""
    some = pictures[-MAX_SHOWN:]
    sheet = subject_sheet([p.image for p in some], [p.mask for p in some], [p.noun for p in some])
    return io.NodeOutput(Carried(pictures), as_image(sheet), ui=shown(cls, sheet, text, warnings))


NODES = [ClassPrior, PriorFromImages, EmptyScenes]
