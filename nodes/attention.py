"""Heat maps: where a model looks for each concept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.data.images import to_pil
from ..far_train.evaluation.attention_focus import Focus, focus, heat_over, stretched
from ..far_train.evaluation.sheets import contact_sheet
from ..far_train.training.settings import TrainConfig
from ..far_train.utils.errors import CaptionError, ConfigError, SubjectError
from . import host_attention, host_models, host_ui
from .pictures import counted, unroll_images, unroll_masks
from .previews import MAX_SHOWN, shown
from .sockets import Vae, base_inputs, check_sockets, schema

DEFAULT_WHEN = "0.4, 0.5, 0.6"


class AttentionProbe(io.ComfyNode):
    """A stateless extra pass that shows which cells look at which words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_AttentionProbe",
            display_name="FaR Attention Probe",
            description="Show the cross-attention of each concept as heat maps over an image. With masks, the report "
            "also says how much attention falls inside each concept's own region. Sampling is not affected.",
            search_aliases=["heat map", "cross attention", "daam", "attention map"],
            is_output_node=True,
            inputs=[
                *base_inputs(
                    model="The model to inspect, from FaR Apply Weights. It is not changed.",
                    clip="The CLIP from FaR Apply Weights.",
                    vae=None,
                ),
                io.Latent.Input("latent", tooltip="The image to inspect, from a sampler or VAE Encode."),
                io.String.Input(
                    "text",
                    display_name="prompt",
                    multiline=True,
                    default="a photo of a <corgi-dog> dog and a <chow-dog> dog",
                    tooltip="The prompt of the image, with your placeholder tokens.",
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The words to show, one per line, as they are written in the prompt: <corgi-dog>, dog, "
                    "beach. Empty: every placeholder token in the prompt.",
                ),
                io.String.Input(
                    "when",
                    display_name="denoising progress",
                    default=DEFAULT_WHEN,
                    optional=True,
                    tooltip="At which points of the denoising to read the maps, from 0 (pure noise) to 1 (finished "
                    "image). The maps of several points are averaged.",
                ),
                io.Int.Input(
                    "probe_seed",
                    display_name="seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    optional=True,
                    control_after_generate=False,
                    tooltip="Seed of the noise that is added to the image.",
                ),
                io.Int.Input(
                    "cells",
                    display_name="map size",
                    default=TrainConfig.attention_cells,
                    min=2,
                    max=256,
                    optional=True,
                    tooltip="Use the layers with the smallest attention maps of at least this many cells per side. "
                    "16: the layers that the training supervises. 32 or 64: finer, but less meaningful maps. Stable "
                    "Diffusion XL: always its supervised layers.",
                    extra_dict={"advanced": True},
                ),
                io.Image.Input("image", optional=True, tooltip="The image to draw the maps on."),
                Vae.Input(
                    "vae", optional=True, tooltip="Decodes the latent to draw the maps on, if no image is connected."
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="The region of each concept, in the order of the concepts, or one mask for all. The report "
                    "then compares the attention inside and outside.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels to use instead of 'denoising progress'. 0 is ignored.",
                ),
            ],
            outputs=[
                io.Image.Output("heat", tooltip="The maps drawn on the image: one image per concept."),
                io.Mask.Output("maps", tooltip="The maps as masks, each scaled to its own maximum."),
                io.String.Output("report", tooltip="Attention per concept, as a table."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        latent: Mapping[str, Tensor],
        text: str,
        concepts: str = "",
        when: str = DEFAULT_WHEN,
        probe_seed: int = 0,
        cells: int = 16,
        image: Tensor | None = None,
        vae: Any = None,
        masks: Tensor | None = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        host_models.check_family(model, clip)
        latents = _latents(latent)
        phrases = _phrases(concepts) or [t for t in host_attention.applied_tokens(clip) if t in text.lower()]
        if not phrases:
            raise CaptionError(
                "concepts: the text holds none of the tokens that CLIP knows; write the words to look for, one a line, "
                "or connect the CLIP of FaR Apply Weights"
            )
        levels = host_attention.sigmas_at(model, parse_shares(when)) if sigmas is None else _levels(sigmas)
        backdrops = _backdrops(image, vae, latents)
        regions = _regions(masks, len(phrases), len(latents))
        progress = host_ui.Progress(len(levels), cls.hidden.unique_id)

        def on_pass(done: int) -> None:
            progress.update(done)
            host_ui.stop_if_interrupted()

        maps = host_attention.attention_maps(
            model, clip, text, latents, phrases, levels, cells=cells, noise_seed=probe_seed, on_pass=on_pass
        )
        heats, shares, labels, rows = [], [], [], []
        for i, (backdrop, of_picture) in enumerate(zip(backdrops, maps)):
            for k, (phrase, heat) in enumerate(zip(phrases, of_picture)):
                found = [focus(heat, region) for region in regions[i]] if regions else []
                heats.append(heat_over(backdrop, heat))
                shares.append(stretched(heat, tuple(backdrop.shape[:2])))
                rows.append([str(i + 1), phrase, *_figures(heat, found, k)])
                labels.append(f"{phrase}: {found[k].ratio:.1f} times denser inside" if found else phrase)
        report = _table(phrases if regions else (), rows)
        sheet = contact_sheet([to_pil(h) for h in heats[:MAX_SHOWN]], labels[:MAX_SHOWN], columns=len(phrases))
        return io.NodeOutput(torch.stack(heats), torch.stack(shares), report, ui=shown(cls, sheet))


def parse_shares(text: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas or spaces. Raises ConfigError."""
    try:
        shares = [float(part) for part in re.split(r"[\s,;]+", text) if part]
    except ValueError as e:
        raise ConfigError(f"when: {text!r} can't be read; write numbers from 0 to 1, such as {DEFAULT_WHEN}") from e
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"when: {text!r} must hold numbers from 0 (noise) to 1 (picture), such as {DEFAULT_WHEN}")
    return shares


def _phrases(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\n,;]", text) if line.strip()]


def _latents(latent: Any) -> Tensor:
    """The pictures [n, 4, h, w] of a LATENT. Raises ConfigError."""
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4:
        raise ConfigError("latent: expected a LATENT of pictures; connect a sampler or VAE Encode")
    if samples.shape[1] != 4:
        raise ConfigError(f"latent: has {samples.shape[1]} channels, not 4; connect a LATENT of this MODEL and its VAE")
    return samples


def _levels(sigmas: Any) -> Tensor:
    """The noise levels of a SIGMAS, without the 0 at its end. Raises ConfigError."""
    check_sockets(sigmas=(sigmas, Tensor, "SIGMAS"))
    levels = sigmas[sigmas > 0].cpu()
    if not len(levels):
        raise ConfigError("sigmas: there is none above 0; connect a scheduler, or leave it open and use when")
    return levels


def _backdrops(image: Tensor | None, vae: Any, latents: Tensor) -> list[Tensor]:
    """What the maps are laid over: a picture [H, W, 3] for each latent. Raises SubjectError."""
    if image is None and vae is not None:
        if not hasattr(vae, "decode"):
            raise ConfigError(f"vae: expected a VAE of another node, got {type(vae).__name__}; connect one")
        image = vae.decode(latents)
    if image is None:
        height, width = (8 * side for side in latents.shape[-2:])
        return [torch.full((height, width, 3), 0.5)] * len(latents)
    pictures = unroll_images([image])
    if len(pictures) not in (1, len(latents)):
        raise SubjectError(
            f"image: got {counted(len(pictures), 'picture')} for {counted(len(latents), 'latent')}; connect the "
            "pictures that belong to LATENT"
        )
    return pictures if len(pictures) == len(latents) else pictures * len(latents)


def _regions(masks: Tensor | None, concepts: int, pictures: int) -> list[list[Tensor]]:
    """The masks of each picture's concepts; nothing without masks. Raises SubjectError."""
    if masks is None:
        return []
    each = unroll_masks([masks])
    if len(each) == 1:
        each *= concepts
    if len(each) == concepts:
        each *= pictures
    if len(each) != concepts * pictures:
        raise SubjectError(
            f"masks: got {counted(len(each), 'mask')} for {counted(concepts, 'concept')} on "
            f"{counted(pictures, 'picture')}; send one for all, one for each concept, or one for each concept of each "
            "picture, in this order"
        )
    for mask in each:
        if not 0 < float(mask.mean()) < 1:
            raise SubjectError("masks: a mask that is all 0 or all 1 has no inside or no outside; draw the region")
    return [each[i * concepts : (i + 1) * concepts] for i in range(pictures)]


def _figures(heat: Tensor, found: Sequence[Focus], own: int) -> list[str]:
    """A map's line in the report; ``found`` has its attention on each concept's region, of which one is its ``own``."""
    line = [_percent(heat.mean()), _percent(heat.max())]
    if found:
        mine = found[own]
        line += [_percent(mine.inside), _percent(mine.outside), f"{mine.ratio:.2f}"]
        line += ["yes" if mine.hottest_inside else "no"]
    return line + ([_percent(other.inside) for other in found] if len(found) > 1 else [])


def _percent(share: Tensor | float) -> str:
    return f"{100 * float(share):.2f}"


def _table(regions: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; attention in percent of a cell's whole attention."""
    head = ["picture", "concept", "mean %", "peak %"]
    if regions:
        head += ["inside %", "outside %", "inside / outside", "hottest cell inside"]
        head += [f"on {phrase} %" for phrase in regions] if len(regions) > 1 else []
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


NODES: list[type[io.ComfyNode]] = [AttentionProbe]
