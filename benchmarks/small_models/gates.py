"""What the small models must reach, measured: the oracle against the world, then the base against the oracle.

The oracle judges decoded pictures, so it is itself measured on held-out scenes that went through the autoencoder; its
confusion tables say how far its verdicts on other models can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from far_train.data.images import save_picture, to_pil
from far_train.evaluation.sheets import contact_sheet
from far_train.mini.identity import ATTRIBUTES, FIELDS, NOUNS, Identity, article, describe, sample_identity, vary
from far_train.mini.oracle import Detection, Oracle, Reading, read_pictures
from far_train.mini.scenery import BACKGROUNDS, PLACES
from far_train.mini.verdicts import ENOUGH_ATTRIBUTES, matching_fields
from far_train.mini.world import render_scene
from far_train.models.base import BaseModel
from far_train.models.conditioning import plain_vocabulary
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig

from .autoencoder import EVAL_SEED, round_trip
from .learning import write_figures
from .scene_pool import label_map
from .small_sam import mask_iou

ORACLE_GATE = 0.99
PROMPT_KINDS = ("class", "two_colours", "two_same_class")
BASE_GATES = {
    "class": 0.99,
    "two_colours": 0.99,
    "two_same_class": 0.94,
    "two_same_class_all_attributes": 0.65,
    "background": 0.99,
}
LEAST_IOU = 0.3  # a detection that covers less of a sprite isn't a detection of it
SHOWN = 48

Confusion = dict[str, dict[str, dict[str, int]]]
Progress = Callable[[int, int], None]


def confusion_tables(pairs: Sequence[tuple[Identity, Identity]]) -> Confusion:
    """Field → true value → value read → count, of (true, read) identities. Shapes count where the class is right."""
    tables: Confusion = {field: {} for field in FIELDS}
    for true, read in pairs:
        for field in FIELDS:
            if field == "shape" and true.noun != read.noun:
                continue
            prefix = f"{true.noun} " if field == "shape" else ""
            row = tables[field].setdefault(prefix + getattr(true, field), {})
            said = prefix + getattr(read, field)
            row[said] = row.get(said, 0) + 1
    return tables


def match_masks(true: Sequence[torch.Tensor], found: Sequence[Detection]) -> list[tuple[int, int]]:
    """Pairs (true, found) that overlap, each used once, with the largest IoU in all; masks bool [S, S]."""
    if not true or not found:
        return []
    overlap = np.array([[float(mask_iou(f.mask, t)) for f in found] for t in true])
    return [(i, j) for i, j in zip(*map(list, linear_sum_assignment(-overlap))) if overlap[i, j] >= LEAST_IOU]


@torch.no_grad()
def measure_oracle(
    oracle: Oracle,
    autoencoder: Any,
    folder: Path | None,
    *,
    count: int = 1024,
    size: int = 128,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Accuracy on held-out scenes, through the autoencoder if there is one: shares of all sprites (one that isn't found
    is wrong in everything), by field, with confusion tables of those found."""
    sprites, extra, places, pairs = 0, 0, 0, []
    for start in range(0, count, 64):
        scenes = [render_scene(EVAL_SEED, i, size) for i in range(start, min(start + 64, count))]
        pictures = torch.stack([s.image for s in scenes])
        if autoencoder is not None:
            device = next(autoencoder.parameters()).device
            tripped = round_trip(autoencoder, pictures.permute(0, 3, 1, 2).to(device) * 2 - 1)
            pictures = (tripped / 2 + 0.5).permute(0, 2, 3, 1).cpu()
        for scene, reading in zip(scenes, read_pictures(oracle, pictures)):
            labels = label_map(scene)
            matches = match_masks([labels == i + 1 for i in range(len(scene.sprites))], reading.subjects)
            pairs += [(scene.sprites[i].identity, reading.subjects[j].identity) for i, j in matches]
            sprites += len(scene.sprites)
            extra += len(reading.subjects) - len(matches)
            places += reading.background == scene.background
        on_progress(start + len(scenes), count)
    right = {
        field: sum(getattr(a, field) == getattr(b, field) and a.noun == b.noun for a, b in pairs) for field in FIELDS
    }
    shares = {field: round(n / sprites, 4) for field, n in right.items()}
    attributes = float(np.mean([shares[name] for name in ATTRIBUTES]))
    figures = {
        "scenes": count,
        "sprites": sprites,
        "round_trips": autoencoder is not None,
        "missed": round((sprites - len(pairs)) / sprites, 4),
        "extra": round(extra / sprites, 4),
        "background": round(places / count, 4),
        "class": shares["noun"],
        "attributes": round(attributes, 4),
        "by_attribute": {name: shares[name] for name in ATTRIBUTES},
        "gate": ORACLE_GATE,
        "reached": shares["noun"] >= ORACLE_GATE and attributes >= ORACLE_GATE,
        "parameters": sum(p.numel() for p in oracle.parameters()),
        "confusion": confusion_tables(pairs),
    }
    if folder:
        write_figures(folder, figures)
    return figures


# ---- the base


def base_prompts(kind: str, count: int, seed: int = 0) -> list[tuple[str, tuple[Identity, ...], str]]:
    """Prompts of one gate: (prompt, the subjects that it names from first to last, the place).

    ``class``: one subject by its class; ``two_colours``: two classes, each with a colour; ``two_same_class``: two of a
    class, described in full, that differ in one to five attributes.
    """
    prompts = []
    for index in range(count):
        rng = np.random.default_rng([seed, PROMPT_KINDS.index(kind), index])
        place = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        first = sample_identity(rng)
        if kind == "class":
            cast, words = (first,), f"{article(first.noun)} {first.noun}"
        elif kind == "two_colours":
            nouns = [n for n in NOUNS if n != first.noun]
            second = sample_identity(rng, nouns[int(rng.integers(len(nouns)))])
            while second.body == first.body:
                second = sample_identity(rng, second.noun)
            cast, words = (first, second), " and ".join(describe(i, ("body",)) for i in (first, second))
        else:
            second = vary(first, rng, 1 + int(rng.integers(len(ATTRIBUTES))))
            cast, words = (first, second), f"{describe(first)} and {describe(second)}"
        prompts.append((f"a photo of {words}, {PLACES[place][0]}", cast, place))
    return prompts


def judge(kind: str, wanted: Sequence[Identity], reading: Reading) -> dict[str, bool]:
    """The oracle's verdict on one picture; each needs exactly the subjects that were named."""
    found = [s.identity for s in reading.subjects]
    fields = matching_fields(wanted, found)
    there = len(found) == len(wanted) and all("noun" in s for s in fields)
    if kind == "class":
        return {"class": there}
    coloured = there and all("body" in s for s in fields)
    if kind == "two_colours":
        return {"two_colours": coloured}
    right = [len(s - {"noun"}) for s in fields]
    return {
        "two_same_class": there and min(right) >= ENOUGH_ATTRIBUTES,
        "two_same_class_all_attributes": there and min(right) == len(ATTRIBUTES),
        "two_same_class_colours": coloured,
    }


def measure_base(
    base: BaseModel,
    oracle: Oracle,
    folder: Path | None,
    *,
    count: int = 512,
    config: SampleConfig | None = None,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The base's gates, ``count`` pictures each; the background's is measured on all of them.

    Writes the figures and, of each gate, its first pictures with the oracle's verdict to ``folder``.
    """
    config = config or SampleConfig(sample_batch=64)
    vocabulary = plain_vocabulary(base)
    verdicts: dict[str, list[bool]] = {"background": []}
    for number, kind in enumerate(PROMPT_KINDS):
        shown = []
        for start in range(0, count, config.sample_batch):
            part = base_prompts(kind, count)[start : start + config.sample_batch]
            prompts = [prompt for prompt, _, _ in part]
            seeds = [1000 * number + config.sample_seed + start + i for i in range(len(part))]
            pictures = draw_pictures(base, vocabulary, prompts, config, seeds=seeds)
            for (prompt, wanted, place), picture, reading in zip(part, pictures, read_pictures(oracle, pictures)):
                verdict = judge(kind, wanted, reading)
                for name, right in {**verdict, "background": reading.background == place}.items():
                    verdicts.setdefault(name, []).append(bool(right))
                shown.append((picture, f"{'right' if verdict[kind] else 'WRONG'}: {prompt}"))
            on_progress(number * count + start + len(part), len(PROMPT_KINDS) * count)
        if folder:
            pictures, captions = zip(*shown[:SHOWN])
            sheet = contact_sheet([to_pil(p) for p in pictures], captions, columns=8, cell=192)
            sheet_tensor = torch.from_numpy(np.asarray(sheet.convert("RGB"), dtype=np.float32) / 255)
            save_picture(folder / f"gate-{kind}.png", sheet_tensor)
    shares = {name: round(float(np.mean(values)), 4) for name, values in verdicts.items()}
    figures = {
        "pictures_each": count,
        **shares,
        "gates": BASE_GATES,
        "reached": all(shares[name] >= gate for name, gate in BASE_GATES.items()),
        "sampling_steps": config.sampling_steps,
        "guidance": config.guidance,
        "parameters": {
            part: sum(p.numel() for p in base.parts[part].parameters()) for part in ("unet", "text_encoder")
        },
    }
    if folder:
        write_figures(folder, figures)
    return figures
