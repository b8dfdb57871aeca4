"""A small SAM, trained on the world with boxes and points (Kirillov et al. 2023, arXiv 2304.02643).

Built by :func:`far_train.data.sam.build_sam` from segment-anything's own classes, so that everything which takes a SAM
takes this one. Losses as published: focal and dice at 20 : 1, the best of three masks learns, each mask's IoU is
predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from far_train.data.sam import build_sam
from far_train.mini.world import render_scene
from far_train.utils.files import load_state

from .autoencoder import EVAL_SEED
from .learning import (
    LearnConfig,
    OnStep,
    draw_rows,
    fit,
    seeded,
    step_generator,
    weights_digest,
    write_figures,
    write_module,
)
from .scene_pool import ScenePool, label_map

SPEC: dict[str, Any] = {
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "global_attn_indexes": [2, 5],
    "window_size": 8,
    "image_size": 128,
    "patch_size": 8,
    "mlp_dim": 320,
    "prompt_dim": 96,
    "decoder_heads": 4,
    "decoder_mlp_dim": 256,
    "iou_dim": 96,
}
FILE = "sam.safetensors"
POINT_COUNTS = (1, 2, 3, 5)  # 5: what FaR asks with where nobody says where the subject is
BOX_GATE, POINT_GATE = 0.92, 0.85
FOCAL_WEIGHT = 20.0


def draw_targets(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One sprite of each scene at random: its mask, bool [n, S, S], and which scenes show any, bool [n].

    Here and below, ``generator`` is on the device of the first argument.
    """
    counts = labels.flatten(1).amax(1)
    chosen = 1 + torch.floor(_random(torch.rand, counts.shape, generator) * counts).clamp(max=counts - 1)
    masks = labels == chosen[:, None, None]
    return masks, masks.flatten(1).any(1)


def _random(draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return draw(tuple(shape), generator=generator, device=generator.device)


def draw_boxes(masks: Tensor, generator: torch.Generator, jitter: float = 0.05) -> Tensor:
    """Boxes around masks [n, S, S], float [n, 4] as x0, y0, x1, y1; each edge is off by about ``jitter`` sides."""
    size = masks.shape[-1]
    boxes = []
    for axis in (1, 2):  # x: any over rows; y: any over columns
        seen = masks.any(axis)
        low = seen.float().argmax(1)
        boxes.append((low, size - seen.flip(1).float().argmax(1)))
    (x0, x1), (y0, y1) = boxes
    box = torch.stack([x0, y0, x1, y1], 1).float()
    sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    noise = _random(torch.randn, box.shape, generator).clamp(-2, 2)
    return (box + jitter * sides * noise).clamp(0, size)


def draw_points(masks: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (x, y in whole pixels) float [n, count, 2] and labels int [n, count]: the first on the subject, a quarter
    of the others off it (label 0)."""
    size = masks.shape[-1]
    labels = (_random(torch.rand, (len(masks), count), generator) < 0.75).long()
    labels[:, 0] = 1
    inside = masks.flatten(1)
    odds = _random(torch.rand, (len(masks), count, size * size), generator)
    # The largest of independent random numbers among the allowed pixels is a uniform choice.
    allowed = torch.where(labels[..., None] == 1, inside[:, None], ~inside[:, None])
    pixel = (odds * allowed).argmax(-1)
    return torch.stack([pixel % size, pixel // size], -1).float(), labels


def predict(
    sam: Any,
    embeddings: Tensor,
    points: tuple[Tensor, Tensor] | None = None,
    boxes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All four masks (logits [n, 4, h, w]; the first is the single-mask one) and IoU estimates [n, 4], one prompt to an
    image.

    As ``MaskDecoder.predict_masks``, which takes one image with n prompts; a batch of images would be repeated n times.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # places of points are too fine for bf16
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        positions = sam.prompt_encoder.get_dense_pe().expand(len(sparse), -1, -1, -1)
    decoder = sam.mask_decoder
    queries = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([queries.expand(len(sparse), -1, -1), sparse], 1)
    states, source = decoder.transformer(embeddings + dense, positions, tokens)
    source = decoder.output_upscaling(source.transpose(1, 2).reshape(embeddings.shape))
    heads = [mlp(states[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    masks = torch.einsum("nkc,nchw->nkhw", torch.stack(heads, 1), source)
    return masks, decoder.iou_prediction_head(states[:, 0])


def embed(sam: Any, images: Tensor) -> Tensor:
    """Image embeddings [n, C, h, w] of uint8 pictures [n, S, S, 3] of the model's own size."""
    return sam.image_encoder((images.permute(0, 3, 1, 2).float() - sam.pixel_mean) / sam.pixel_std)


def mask_losses(logits: Tensor, estimates: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Losses of :func:`predict`'s masks against ``target`` [n, H, W] (bool), each a mean over the batch.

    ``mask``: 20 · focal (Lin et al. 2017, γ 2, α 0.25) + dice, of the single mask and of the best of the other three;
    ``iou``: squared error of all four IoU estimates.
    """
    logits = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    wanted = target[:, None].float().expand_as(logits)
    share = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = 1 - torch.where(target[:, None], share, 1 - share)
    balance = torch.where(target[:, None], 0.25, 0.75)
    focal = (balance * missed.square() * entropy).mean((-2, -1))
    overlap = (share * wanted).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (share.sum((-2, -1)) + wanted.sum((-2, -1)) + 1)
    each = FOCAL_WEIGHT * focal + dice
    with torch.no_grad():
        true_iou = mask_iou(logits > 0, target[:, None])
    iou = (estimates.float() - true_iou).square().mean()
    return {"mask": (each[:, 0] + each[:, 1:].amin(1)).mean(), "iou": iou}


def mask_iou(found: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of bool masks over the last two dimensions."""
    both, either = (found & wanted).sum((-2, -1)), (found | wanted).sum((-2, -1))
    return both / either.clamp(min=1)


def learn_sam(
    pool: ScenePool,
    folder: Path,
    config: LearnConfig,
    *,
    spec: Mapping[str, Any] = SPEC,
    start: Path | None = None,
    on_step: OnStep = lambda step, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """Train on a pool, or go on with it; writes ``folder``/sam.safetensors when done and returns the model.

    In each step one half of the scenes is asked with boxes, the other with 1, 2, 3 or 5 points.
    """
    sam = seeded(config.learn_seed, lambda: build_sam(spec))
    if start:
        load_state(sam, load_file(start), start)

    def step_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw_rows(config.learn_seed, step, config.batch_size, len(pool))
        pool.hold(sam.device)
        choices = step_generator(config.learn_seed, step, sam.device)
        points_each = POINT_COUNTS[int(draw_rows(config.learn_seed + 1, step, 1, len(POINT_COUNTS)))]
        images, labels = pool.take("images", rows), pool.take("labels", rows)
        masks, shows = draw_targets(labels, choices)
        images, masks = images[shows], masks[shows]
        flipped = (_random(torch.rand, (len(images),), choices) < 0.5)[:, None, None]
        masks = torch.where(flipped, masks.flip(2), masks)
        images = torch.where(flipped[..., None], images.flip(2), images)
        embeddings, half = embed(sam, images), len(images) // 2
        points = draw_points(masks[half:], points_each, choices)
        asked = {
            "box": (slice(None, half), {"boxes": draw_boxes(masks[:half], choices)}),
            "point": (slice(half, None), {"points": points}),
        }
        loss, figures = torch.zeros((), device=images.device), {}
        for name, (part, prompt) in asked.items():
            if len(masks[part]):
                losses = mask_losses(*predict(sam, embeddings[part], **prompt), masks[part])
                loss = loss + losses["mask"] + losses["iou"]
                figures |= {f"{name}_{k}": v for k, v in losses.items()}
        return loss, figures

    about = {"model": "sam", "spec": dict(spec), "pool_seed": pool.config.pool_seed}
    about |= {"start": weights_digest(start)}
    sam = fit(sam, step_loss, config, folder, about, on_step=on_step, should_stop=should_stop)
    write_sam(folder / FILE, sam, spec)
    return sam


def write_sam(path: Path, sam: nn.Module, spec: Mapping[str, Any], *, half: bool = False) -> None:
    """Write a SAM as :func:`far_train.data.sam.load_sam` reads it: the number of heads can't be told from tensors."""
    stated = {"decoder_heads": spec.get("decoder_heads", 8), "num_heads": spec["num_heads"]}
    write_module(path, sam, {"far_sam": json.dumps(stated)}, half=half)


@torch.no_grad()
def measure_sam(sam: Any, folder: Path | None, count: int = 256) -> dict[str, Any]:
    """Mean IoU over every sprite of held-out scenes, asked as the product asks: through segment-anything's predictor,
    the best-scored of three masks, with a box (sides off by about 5 %) and with one point anywhere on the subject."""
    from segment_anything import SamPredictor

    predictor, choices = SamPredictor(sam), torch.Generator().manual_seed(EVAL_SEED)
    found: dict[str, list[float]] = {"box": [], "point": []}
    for index in range(count):
        scene = render_scene(EVAL_SEED, index, sam.image_encoder.img_size)
        labels = label_map(scene)
        predictor.set_image((scene.image * 255).round().byte().numpy())
        for i in range(len(scene.sprites)):
            mask = labels == i + 1
            if not mask.any():
                continue
            box = draw_boxes(mask[None], choices)[0].numpy()
            points, marks = (t[0].numpy() for t in draw_points(mask[None], 1, choices))
            for name, prompt in (("box", {"box": box}), ("point", {"point_coords": points, "point_labels": marks})):
                masks, scores, _ = predictor.predict(**prompt)
                found[name].append(float(mask_iou(torch.from_numpy(masks[scores.argmax()]), mask)))
    means = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    figures = {
        "sprites": len(found["box"]),
        "iou_box": means["box"],
        "iou_box_gate": BOX_GATE,
        "iou_point": means["point"],
        "iou_point_gate": POINT_GATE,
        "reached": means["box"] >= BOX_GATE and means["point"] >= POINT_GATE,
        "parameters": sum(p.numel() for p in sam.parameters()),
    }
    if folder:
        write_figures(folder, figures)
    return figures
