"""Run a benchmark: train each arm on each group, draw pictures, let the oracle read them, write a row of figures.

OUT/materials/                        class pictures and empty scenes drawn by the base, the same for all arms
OUT/runs/ARM/GROUP-sSEED/row.json     the figures; a run that has it is finished
                         seen.jsonl   what the oracle read in every picture
                         sheet.jpg    the first pictures, uncurated, with a verdict on each
                         training/    metrics.jsonl, weights.safetensors
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from far_train.data.captions import Name, join_phrases, with_article
from far_train.data.concepts import Background, ClassPicture, Concept, TrainingSet
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.data.subjects import SubjectExtractor
from far_train.evaluation.attention_focus import attention_maps, focus
from far_train.evaluation.sheets import picture_grid, save_sheet
from far_train.mini.identity import describe
from far_train.mini.materials import cut_class_pictures, draw_places
from far_train.mini.oracle import Oracle, Reading, picture_features, read_pictures
from far_train.mini.scenery import BACKGROUNDS, PLACES
from far_train.mini.shipped import DRAWING, EMPTY_PLACES, SIZE
from far_train.mini.verdicts import judge_subjects
from far_train.mini.world import reference_photos, render_scene
from far_train.models.apply import apply_weights
from far_train.models.base import BaseModel
from far_train.models.conditioning import plain_vocabulary
from far_train.models.loading import load_base
from far_train.models.sampling import draw_pictures
from far_train.models.tokens import Vocabulary
from far_train.training.class_images import WithClassImages
from far_train.training.recipe import Callbacks, train
from far_train.training.run_folder import CHECKPOINTS
from far_train.training.settings import TrainConfig
from far_train.utils.errors import CheckpointError, Interrupted
from far_train.utils.files import write_json, write_tensors, write_text

from .arms import FUSION, PHOTOS, Arm
from .groups import Group
from .measures import Observation, binding_figures, corrected_leakage, joint_figures, prior_figures, solo_figures
from .overfitting import SubjectRuler, kernel_distance, overfitting_figures, subject_rulers
from .plans import Plan
from .rivals import ResizedPhotos, SegMix, ShuffledMasks, TruePairs, TrueScenes, degrade, refine_masks

EMPTY_SCENES = 4
SHOWN = 16
PROBES = 16  # held-out renders on which attention is measured
PROBE_SEED = 91_000

OnProgress = Callable[[str, int, int], None]
Asked = tuple[str, str, str | None, int | None]  # kind, prompt, place, which subject alone


class Bench:
    """All runs of a plan below ``out``. ``base_folder``: the base in diffusers' layout; ``confusion``: the oracle's own
    mistakes (attribute → true → read → count), by which leakage is corrected; ``changes`` of every arm's training."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        base_folder: Path,
        sam: Any,
        oracle: Oracle,
        confusion: Mapping[str, Any],
        *,
        changes: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        on_progress: OnProgress = lambda phase, done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.out, self.plan, self.base_folder = out, plan, base_folder
        self.extractor, self.oracle, self.confusion = SubjectExtractor(sam), oracle, confusion
        self.changes, self.device = dict(changes or {}), device
        self.on_progress, self.should_stop = on_progress, should_stop
        self._priors: dict[tuple[Any, ...], list[ClassPicture]] = {}
        self._rulers_of: dict[str, list[SubjectRuler]] = {}

    def run(self) -> list[dict[str, Any]]:
        """Make the runs that are missing and return all rows. Raises Interrupted, CheckpointError if a row is of other
        settings."""
        rows, runs = [], self.plan.runs()
        for number, (arm, group, seed) in enumerate(runs):
            if self.should_stop():
                raise Interrupted(f"stopped after {number} of {len(runs)} runs, which are saved; start again to resume")
            self.on_progress("runs", number, len(runs))
            rows.append(self.row(arm, group, seed))
        self.on_progress("runs", len(runs), len(runs))
        return rows

    def row(self, arm: Arm, group: Group, seed: int) -> dict[str, Any]:
        """The figures of one run, made now or found on disk."""
        folder = self.out / "runs" / arm.name / f"{group.key}-s{seed}"
        about = self._identity(arm, group, seed)
        if (folder / "row.json").exists():
            row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
            if row["about"] != about:
                raise CheckpointError(
                    f"{folder / 'row.json'}: was measured with other settings or another base; choose another --out"
                )
            return row
        started = time.monotonic()
        base, vocabulary = load_base(self.base_folder).to(self.device), None
        if arm.learns:
            training_set = WithClassImages(self.training_set(arm, group, seed), self._class_pictures(arm, group))
            config = self.train_config(arm, group, seed)
            vocabulary = self._train(base, training_set, config, arm.title, folder / "training")
        trained = time.monotonic()
        figures, observed, pictures = self._judge(base, vocabulary, arm, group, seed)
        if vocabulary is not None:
            figures |= attention_figures(base, vocabulary, group)
        row = {
            "arm": arm.name,
            "group": group.key,
            "kind": group.kind,
            "seed": seed,
            "figures": {name: round(float(value), 4) for name, value in figures.items() if np.isfinite(value)},
            "training_seconds": round(trained - started, 1),
            "about": about,
        }
        self._write(folder, row, group, observed, pictures)
        return row

    def _identity(self, arm: Arm, group: Group, seed: int) -> dict[str, Any]:
        """Everything that a row depends on, as JSON types."""
        about = {
            "arm": asdict(arm)
            | {"training": TrainConfig.first_names(arm.training), "fusion": FusionConfig.first_names(arm.fusion)},
            "training": self.train_config(arm, group, seed).result_shaping(),
            "fusion": FusionConfig.first_names(arm.fusion_config(seed).to_dict()),
            "class_drawing": arm.class_config().to_dict(),
            "scenes": EMPTY_PLACES.to_dict() | {"each": EMPTY_SCENES},
            "group": [asdict(i) for i in group.identities],
            "pictures": dict(self.plan.pictures),
            "base": self._base.digest,
        }
        return json.loads(json.dumps(about))

    def train_config(self, arm: Arm, group: Group, seed: int) -> TrainConfig:
        """An arm's training with the benchmark's changes. Rates of 0 stay: the arm doesn't learn those weights.

        An arm's steps are those of up to two subjects; more take more, in proportion, as in the product.
        """
        own = arm.train_config(seed)
        own = own.replace(steps=own.steps * max(len(group.identities), 2) // 2)
        changes = {k: v for k, v in self.changes.items() if getattr(own, k) != 0}
        return own.replace(**changes)

    # ---- training data

    @cached_property
    def _base(self) -> BaseModel:
        """The base as it is; trainings take fresh ones."""
        return load_base(self.base_folder).to(self.device)

    @cached_property
    def _scenes(self) -> list[Background]:
        folder = self.out / "materials" / f"scenes-guidance-{EMPTY_PLACES.guidance:g}"
        return draw_places(self._base, EMPTY_SCENES, folder, self._phase("empty scenes"))

    def _phase(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_progress(name, done, total)

    def _class_pictures(self, arm: Arm, group: Group) -> list[ClassPicture]:
        nouns = sorted({identity.noun for identity in group.identities})
        return list(chain.from_iterable(self._prior(arm, noun) for noun in nouns))

    def _prior(self, arm: Arm, noun: str) -> list[ClassPicture]:
        config = arm.class_config()
        key = (noun, arm.class_pictures, config.sampler, config.sampling_steps)
        if key not in self._priors:
            self._priors[key] = cut_class_pictures(
                self._base,
                self.extractor,
                [noun],
                arm.class_pictures,
                self.out / "materials" / f"class-{config.sampler}-{config.sampling_steps}",
                config,
                self._phase("class pictures"),
            )
        return self._priors[key]

    def training_set(self, arm: Arm, group: Group, seed: int) -> TrainingSet:
        """What an arm learns from, without the prior half."""
        found = concepts(group, arm.photos)
        if arm.masks in ("degraded", "sam_refined"):
            found = [degrade(c, group.seed + i) for i, c in enumerate(found)]
        if arm.masks == "sam_refined":
            found = [refine_masks(c, self.extractor.sam) for c in found]
        if arm.data == "resized":
            return ResizedPhotos(found, SIZE, FUSION.count, seed)
        if arm.data == "seg_mix":
            return SegMix(found, SIZE, FUSION.count, seed)
        scenes = TrueScenes(found, group.identities, SIZE, FUSION.count, seed)
        if arm.data == "true_scenes":
            return scenes
        fused = ConceptFusion(found, self._class_pictures(arm, group), self._scenes, arm.fusion_config(seed))
        if arm.data == "true_pairs":
            return TruePairs(fused, scenes)
        return ShuffledMasks(fused) if arm.masks == "shuffled" else fused

    def _train(
        self, base: BaseModel, training_set: TrainingSet, config: TrainConfig, title: str, folder: Path
    ) -> Vocabulary:
        callbacks = Callbacks(
            on_phase=self.on_progress,
            on_step=lambda step, _: self.on_progress(title, step, config.steps),
            should_stop=self.should_stop,
        )
        config = config.replace(device=str(self.device))
        weights = train(base, training_set, config, folder, resume=folder.exists(), callbacks=callbacks)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return apply_weights(weights, base)

    # ---- figures

    def _judge(
        self, base: BaseModel, vocabulary: Vocabulary | None, arm: Arm, group: Group, seed: int
    ) -> tuple[dict[str, float], list[Observation], Tensor]:
        names = names_in_prompts(arm, group)
        asked = prompts(group, names, self.plan.pictures)
        seeds = _seeds(seed, len(asked))
        pictures, readings = self._look(base, vocabulary or plain_vocabulary(base), asked, seeds)
        observed = _observations(asked, seeds, readings)
        by_kind = {kind: [s for s in observed if s.kind == kind] for kind in self.plan.pictures}
        joint = self.plan.pictures["joint"]  # they come first, prior pictures last
        figures = joint_figures(by_kind["joint"], group.identities, reference_places(group))
        if arm.data != "none":
            figures |= solo_figures(by_kind["solo"], group.identities)
        if vocabulary:
            figures |= overfitting_figures(self._rulers(group), group.identities, pictures[:joint], readings[:joint])
            base_observed, base_features = self._base_prior(group, seed)
            figures |= prior_figures(by_kind["prior"], base_observed, group.identities)
            drawn = pictures[len(pictures) - len(by_kind["prior"]) :]
            figures["prior_kid"] = kernel_distance(picture_features(self.oracle, drawn), base_features)
        if len(names) == 2:
            figures |= binding_figures(by_kind["binding"], group.identities)
            figures["leakage_corrected"] = corrected_leakage(by_kind["joint"], group.identities, self.confusion)
        return figures, observed, pictures[:joint]

    def _look(
        self, base: BaseModel, vocabulary: Vocabulary, asked: Sequence[Asked], seeds: Sequence[int]
    ) -> tuple[Tensor, list[Reading]]:
        pictures = draw_pictures(
            base, vocabulary, [a[1] for a in asked], DRAWING, seeds=seeds, on_progress=self._phase("drawing")
        )
        return pictures, read_pictures(self.oracle, pictures)

    def _rulers(self, group: Group) -> list[SubjectRuler]:
        if group.key not in self._rulers_of:
            self._rulers_of[group.key] = subject_rulers(group.identities, concepts(group), self.oracle, SIZE)
        return self._rulers_of[group.key]

    def _base_prior(self, group: Group, seed: int) -> tuple[list[Observation], Tensor]:
        """What the untrained base shows for the group's bare nouns, with the same seeds, and the pictures' features."""
        names = [Name(n.noun) for n in group.names]
        asked = prompts(group, names, self.plan.pictures)
        # Seeds go by position, so the other kinds are counted, not drawn.
        first = next(i for i, a in enumerate(asked) if a[0] == "prior")
        path = self.out / "materials" / "prior" / f"{'-'.join(sorted({n.noun for n in names}))}-{first}-s{seed}.json"
        kept = path.with_suffix(".safetensors")
        if path.exists() and kept.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            observed = [Observation(**{**row, "found": tuple(row["found"])}) for row in rows]
            return observed, load_file(kept)["features"]
        seeds = _seeds(seed, len(asked))[first:]
        pictures, readings = self._look(self._base, plain_vocabulary(self._base), asked[first:], seeds)
        observed, features = _observations(asked[first:], seeds, readings), picture_features(self.oracle, pictures)
        write_json(path, [asdict(s) for s in observed])
        write_tensors(kept, {"features": features}, {})
        return observed, features

    def _write(
        self, folder: Path, row: dict[str, Any], group: Group, observed: Sequence[Observation], pictures: Tensor
    ) -> None:
        write_text(folder / "seen.jsonl", "".join(json.dumps(asdict(s)) + "\n" for s in observed))
        sheet = pictures[:SHOWN]
        labels = [judge_subjects(group.identities, s.place, s.as_reading()).words for s, _ in zip(observed, sheet)]
        save_sheet(folder / "sheet.jpg", picture_grid(sheet, labels, columns=8, cell=144))
        write_json(folder / "row.json", row)  # last, because it marks the run as finished


def _observations(asked: Sequence[Asked], seeds: Sequence[int], readings: Sequence[Reading]) -> list[Observation]:
    return [Observation.build(*a, s, r) for a, s, r in zip(asked, seeds, readings)]


def _seeds(seed: int, count: int) -> list[int]:
    """Noise seeds of a run's pictures, by their place among its prompts: the same for all arms."""
    return [1_000_000 * (seed + 1) + i for i in range(count)]


def reference_places(group: Group) -> set[str]:
    """The places of the group's photos. No prompt asks for them, so a picture that shows one has background leakage."""
    return set(chain.from_iterable(_places_of(group)))


def _places_of(group: Group) -> list[list[str]]:
    """Two places for each subject's photos, or one each where there are more than two subjects."""
    each = 2 if len(group.identities) <= 2 else 1
    order = np.random.default_rng([group.seed, 0xBAC]).permutation(len(BACKGROUNDS))
    return [[BACKGROUNDS[j] for j in order[each * i : each * (i + 1)]] for i in range(len(group.identities))]


def concepts(group: Group, count: int = PHOTOS) -> list[Concept]:
    """The group's subjects with ``count`` photos each and exact masks."""
    found = []
    for i, (name, identity, places) in enumerate(zip(group.names, group.identities, _places_of(group))):
        photos = reference_photos(identity, 10 * group.seed + i, count, SIZE, places)
        found.append(Concept(name.token, name.noun, tuple(p for p, _ in photos), tuple(m for _, m in photos)))
    return found


def names_in_prompts(arm: Arm, group: Group) -> tuple[Name, ...]:
    """The subjects' names in an arm's prompts: their tokens, all their attributes, or bare nouns."""
    if arm.data == "prompt_only":
        return tuple(Name(describe(identity).split(" ", 1)[1]) for identity in group.identities)
    return group.names if arm.learns else tuple(Name(identity.noun) for identity in group.identities)


def prompts(group: Group, names: Sequence[Name], counts: Mapping[str, int]) -> list[Asked]:
    """Every picture of a run, joint ones first and prior ones last; ``names`` without tokens ask the base as it is."""
    free = [place for place in BACKGROUNDS if place not in reference_places(group)]
    asked: list[Asked] = []
    for i in range(counts["joint"]):
        place = free[i % len(free)]
        asked.append(("joint", f"a photo of {join_phrases(names)}, {PLACES[place][0]}", place, None))
    for i in range(counts["solo"]):
        place, subject = free[i % len(free)], i % len(names)
        asked.append(("solo", f"a photo of {join_phrases([names[subject]])}, {PLACES[place][0]}", place, subject))
    if len(names) == 2:
        left, right = (with_article(name.phrase) for name in names)
        asked += [("binding", f"a photo of {left} on the left and {right} on the right", None, None)] * counts[
            "binding"
        ]
    for i in range(counts["prior"]):
        subject = i % len(names)
        asked.append(("prior", f"a photo of {with_article(names[subject].noun)}", None, subject))
    return asked


def attention_figures(base: BaseModel, vocabulary: Vocabulary, group: Group) -> dict[str, float]:
    """Cross-attention of the placeholder tokens on noised held-out renders.

    Shares of a map's mass on its own subject and on others, pointing accuracy (the hottest cell is on the own subject),
    and the ratio of mean attention inside and outside. A check of the mechanism, not a quality score.
    """
    own, other, looks = [], [], []
    caption = f"a photo of {join_phrases(group.names)}"
    for k in range(PROBES):
        order = np.random.default_rng([PROBE_SEED, k]).permutation(len(group.names))[:3]
        scene = render_scene(PROBE_SEED, k, SIZE, identities=[group.identities[i] for i in order])
        maps = attention_maps(base, vocabulary, scene.image, caption, group.names, timestep=300 + 100 * (k % 4))
        masks = F.adaptive_avg_pool2d(torch.stack(scene.masks), maps.shape[-2:])
        for place, i in enumerate(order):
            share = maps[i] / maps[i].sum()
            own.append(float((share * masks[place]).sum()))
            other.append(float((share * masks.sum(0)).sum()) - own[-1])
            looks.append(focus(share, scene.masks[place]))
    inside, outside = (float(np.mean([getattr(look, side) for look in looks])) for side in ("inside", "outside"))
    return {
        "attention_own": np.mean(own),
        "attention_other": np.mean(other),
        "attention_hit": np.mean([look.hottest_inside for look in looks]),
        "attention_density": inside / outside,
    }
