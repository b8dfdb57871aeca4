"""Settings: frozen dataclasses that check themselves and travel as JSON or YAML.

Every choice of the method is a field here, so that a measurement can overrule it. The command line's flags are
made from these same fields (see :mod:`far_train.cli.main`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, UnreadableFile
from .text_files import read_words

SCHEMA_VERSION = 2

EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

C = TypeVar("C", bound="Config")


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
    shapes_result: bool = True,
) -> Any:
    """A dataclass field with its range and its help line.

    ``shapes_result=False`` marks a setting that may differ between a run and its resumption, since it changes
    what is reported or saved but never what is learned.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "shapes_result": shapes_result}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Base of all settings: validated on construction, read from and written to plain mappings."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = _coerce(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
            _check_range(f.name, value, f.metadata)
        self.check()

    def check(self) -> None:
        """Refuse combinations that single fields can't see. Raises ConfigError."""

    def replace(self: C, **changes: Any) -> C:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A mapping of JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def result_shaping(self) -> dict[str, Any]:
        """The settings that decide what is learned: a resumed run must have the same."""
        names = {f.name for f in fields(self) if f.metadata["shapes_result"]}
        return {k: v for k, v in self.to_dict().items() if k in names}

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], where: str = "settings", other_names: Sequence[str] = ()) -> C:
        """Build from a mapping. An unknown name is refused with the nearest one known, here or in ``other_names``."""
        own = [f.name for f in fields(cls)]
        known = [*other_names, *(name for name in own if name not in other_names)]
        for name in values:
            if name not in own:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known settings: {', '.join(known)}"
                raise ConfigError(f"{name}: unknown setting in {where}; {hint}")
        return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring ``value`` to the field's declared type, or say what was expected."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and not isinstance(value, bool):
            if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
                return int(value)
        if option is float and isinstance(value, str) and EXPONENT.fullmatch(value):
            return float(value)  # YAML takes 5e-4, without a point, for a text
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, (str, Path)):
            return str(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(name, item, args[0]) for item in value)
        if origin is dict and isinstance(value, dict):
            return {_coerce(name, k, args[0]): _coerce(name, v, args[1]) for k, v in value.items()}
    expected = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _check_range(name: str, value: Any, meta: Any) -> None:
    if value is None:
        return
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, meta['choices']))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is not a finite number")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = meta.get("low"), meta.get("high")
        if low is not None and value < low or high is not None and value > high:
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name}: {value} is out of range; it must be {bounds}")


@dataclass(frozen=True)
class ExtractConfig(Config):
    """How a subject is cut out of its photo (method: subject extraction)."""

    min_area: float = setting(0.03, "smallest share of the frame that counts as a subject", low=0, high=1)
    max_area: float = setting(0.95, "a mask that covers more of the frame than this is no subject", low=0, high=1)
    max_side: int = setting(1024, "photos are scaled down to this longest side, in pixels", low=64, high=8192)
    use_masks: str = setting(
        "keep",
        "masks that photos bring: keep them, or take each as a hint of where SAM finds the outline",
        choices=("keep", "hint"),
    )

    def check(self) -> None:
        if self.min_area >= self.max_area:
            raise ConfigError(f"min_area: {self.min_area} must be smaller than max_area ({self.max_area})")


# Shares of the training recipes by the number of concepts (method.md, section 2). For two, pictures of both were raised
# from .35: what prompts ask for is what must be seen. None shows one beside another of its class: two concepts tell
# each other apart, and it cost what is learned of one alone (benchmarks/reports/2026-11-26/tuning.md).
RECIPE_SHARES: dict[int, dict[str, float]] = {
    1: {"original": 0.35, "solo": 0.25, "pair": 0.0, "triple": 0.0, "beside_prior": 0.40},
    2: {"original": 0.10, "solo": 0.25, "pair": 0.65, "triple": 0.0, "beside_prior": 0.0},
    3: {"original": 0.20, "solo": 0.15, "pair": 0.30, "triple": 0.20, "beside_prior": 0.15},
}
MANY_CONCEPTS = {"original": 0.20, "solo": 0.15, "pair": 0.30, "triple": 0.20, "beside_prior": 0.15}
RECIPES = tuple(MANY_CONCEPTS)
BACKGROUND_SHARES = {"scene": 0.45, "infilled": 0.20, "prior": 0.20, "plain": 0.15}


@dataclass(frozen=True)
class FusionConfig(Config):
    """Concept Fusion: which composites are made and how. Lengths are fractions of the canvas."""

    size: int = setting(768, "side of the square training picture, in pixels; a multiple of 64", low=64, high=2048)
    count: int = setting(400, "how many composites the dataset holds", low=1, high=1_000_000)
    fusion_seed: int = setting(0, "every composite is derived from this seed and its index", low=0, high=2**63 - 1)
    recipe_weights: dict[str, float] | None = setting(
        None, "shares of original, solo, pair, triple, beside_prior; default: by the number of concepts"
    )
    background_weights: dict[str, float] | None = setting(
        None, "shares of scene, infilled, prior, plain; default .45 .20 .20 .15 of those available"
    )
    flip: float = setting(0.5, "probability of a mirrored subject; 0 for asymmetric subjects", low=0, high=1)
    rotation: float = setting(10.0, "subjects are turned by up to this many degrees", low=0, high=180)
    brightness: float = setting(0.10, "subjects get brighter or darker by up to this share", low=0, high=0.9)
    occlusion: float = setting(0.10, "share of composites in which one subject covers a part of another", low=0, high=1)
    max_covered: float = setting(0.15, "the most that an occlusion hides of the smaller subject", low=0, high=0.9)
    height_drift: float = setting(
        0.1,
        "subjects stand as high as in their photos, give or take this share of the canvas; 1 puts them anywhere",
        low=0,
        high=1,
    )
    pair_fill: float = setting(
        0.9, "two subjects are fitted to half the canvas times a random share between this and 1", low=0.2, high=1
    )
    row: float = setting(
        # As bases draw two; half, since pictures of two needn't be portraits (benchmarks/reports/2026-11-26/tuning.md).
        0.5,
        "share of composites in which subjects stand close together in a row, all equally large, the lower in front",
        low=0,
        high=1,
    )
    margin: float = setting(1 / 64, "gap kept between subjects, as a fraction of the canvas", low=0, high=0.1)
    erode: float = setting(
        1 / 768, "rim taken off a subject before pasting, as a fraction of the canvas", low=0, high=0.08
    )
    feather: float = setting(2.5 / 768, "softness of the pasted rim, as a fraction of the canvas", low=0, high=0.08)
    shadow: float = setting(
        0.35,  # benchmarks/reports/2026-11-26/tuning.md: without it training unlearns the shadows that bases draw
        "how much the ground under a pasted subject is darkened, softly; 0 for not at all",
        low=0,
        high=1,
    )
    collage_words: float = setting(
        0.5,
        "share of composites whose caption calls them a collage, so that paste marks attach to that word",
        low=0,
        high=1,
    )
    prior_collages: float = setting(
        0.3, "share of the prior half that shows two class pictures' subjects", low=0, high=1
    )
    # They choose among the photos, and what was chosen is part of a dataset's identity already.
    min_area: float = setting(
        ExtractConfig.min_area,
        "smallest share of a photo that its mask may mark as the subject",
        low=0,
        high=1,
        shapes_result=False,
    )
    max_area: float = setting(
        ExtractConfig.max_area,
        "a mask that covers more of its photo than this is none",
        low=0,
        high=1,
        shapes_result=False,
    )

    @property
    def masks(self) -> ExtractConfig:
        """How the masks of photos are judged."""
        return ExtractConfig(min_area=self.min_area, max_area=self.max_area)

    def check(self) -> None:
        _ = self.masks  # says what is wrong with the two
        if self.size % 64:
            raise ConfigError(f"size: {self.size} is not a multiple of 64; try {max(64, round(self.size / 64) * 64)}")
        check_shares("recipe_weights", self.recipe_weights, RECIPES)
        check_shares("background_weights", self.background_weights, tuple(BACKGROUND_SHARES))


def check_shares(name: str, shares: dict[str, float] | None, known: tuple[str, ...]) -> None:
    """Refuse unknown names, negative shares, and shares that sum to nothing."""
    if shares is None:
        return
    for key, value in shares.items():
        if key not in known:
            raise ConfigError(f"{name}: unknown kind '{key}'; known: {', '.join(known)}")
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}: the share of '{key}' is {value}; it must be a number of 0 or more")
    if sum(shares.values()) <= 0:
        raise ConfigError(f"{name}: all shares are 0; give at least one kind a positive share")


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training recipe: what is learned, with which loss, and what is written while it runs."""

    steps: int | None = setting(None, "optimizer steps; default 500 per concept", low=1, high=10_000_000)
    batch_size: int = setting(2, "composites per step", low=1, high=4096)
    prior_batch_size: int = setting(
        2, "class pictures per step (prior preservation); 0 switches them off", low=0, high=4096
    )
    micro_batch: int | None = setting(
        None, "samples run at once, none for all; fewer need less memory for the same step", low=1, high=4096
    )
    train_seed: int = setting(0, "seed of noise, timesteps and batch order", low=0, high=2**63 - 1)
    embedding_lr: float = setting(5e-4, "learning rate of the modifier tokens' embeddings", low=0, high=1)
    trainable: str = setting(
        "attention",  # in benchmarks/reports/2026-11-26/tuning.md it learns looks that K and V alone don't
        "what learns beside the embeddings; attention: low-rank changes of all attention; kv: cross-attention K and V",
        choices=("attention", "kv"),
    )
    kv_lr: float = setting(
        1e-5, "learning rate of cross-attention K and V, per sample of the whole step", low=0, high=1
    )
    low_rank: int = setting(8, "rank of the changes of all attention", low=1, high=1024)
    low_rank_lr: float = setting(
        3e-5, "learning rate of the changes of all attention, per sample of the whole step", low=0, high=1
    )
    lr_decay: float = setting(
        0.5,  # benchmarks/reports/2026-11-26/tuning.md: subjects alone get better, none together worse
        "share of the steps, the last ones, over which all learning rates fall linearly to 0; 0 keeps them",
        low=0,
        high=1,
    )
    weight_decay: float = setting(0.01, "AdamW decay of the model's changes (embeddings have none)", low=0, high=1)
    grad_clip: float = setting(1.0, "largest norm of the whole gradient", low=1e-6, high=1e6)
    vectors_per_token: int = setting(1, "embedding vectors behind each modifier token", low=1, high=16)
    prior_weight: float = setting(1.0, "weight of the prior preservation loss", low=0, high=100)
    background_weight: float = setting(0.3, "weight of the denoising error outside the subjects", low=0, high=1)
    per_mention: bool = setting(
        True,  # better on each of three dev pairs (benchmarks/reports/2026-11-27)
        "in the losses each subject of a composite counts alike; off: each cell, so that large ones count more",
    )
    min_snr_gamma: float | None = setting(5.0, "Min-SNR weighting; none switches it off", low=0.01, high=1e6)
    refinement_weight: float = setting(
        0.01, "weight λ of the localized refinement loss; 0 switches it off", low=0, high=100
    )
    refinement_ramp: float = setting(0.1, "share of the steps over which λ rises from 0", low=0, high=1)
    noun_weight: float = setting(0.5, "weight of the class nouns' maps in the localization loss", low=0, high=10)
    competition_weight: float = setting(1.0, "weight of the competition between mentions", low=0, high=10)
    localization: str = setting("mse", "form of the localization loss", choices=("mse", "none"))
    attention_cells: int = setting(
        16, "supervise the smallest attention maps of at least this many cells a side", low=2, high=256
    )
    prior_pictures: int = setting(
        50, "class pictures per noun that the base draws where the dataset has none", low=1, high=10_000
    )
    prior_steps: int = setting(20, "sampling steps of those class pictures (DPM-Solver++)", low=1, high=1000)
    prior_cache: str | None = setting(
        None,
        "folder that keeps those class pictures for other runs with the same base, size, steps and seed; "
        "default: the run's own",
        shapes_result=False,
    )
    gradient_checkpointing: bool = setting(False, "trade time for memory in the UNet", shapes_result=False)
    memory: str = setting(
        "auto",
        "fast: the whole step at once; lean: checkpointed, for small cards; auto: on a CUDA card what fits, else fast",
        choices=("auto", "fast", "lean"),
        shapes_result=False,
    )
    compile: bool = setting(
        False, "compile the UNet's blocks: minutes at the start, faster steps after", shapes_result=False
    )
    precision: str = setting("auto", "arithmetic of the frozen model", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, xpu …", shapes_result=False)
    save_every: int = setting(100, "steps between checkpoints", low=1, high=10_000_000, shapes_result=False)
    keep_checkpoints: int = setting(2, "checkpoints kept on disk", low=1, high=10_000, shapes_result=False)
    sample_every: int = setting(
        250, "steps between sample pictures; 0 switches them off", low=0, high=10_000_000, shapes_result=False
    )
    sample_steps: int = setting(25, "sampling steps of the sample pictures", low=1, high=1000, shapes_result=False)
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts of the sample pictures; default: each concept, and all together", shapes_result=False
    )

    def check(self) -> None:
        if self.embedding_lr == 0 and self.change_lr == 0:
            raise ConfigError("embedding_lr: both learning rates are 0, so nothing would be learned; raise one")

    @property
    def change_lr(self) -> float:
        """The rate at which the model's own changes are learned, per sample of the whole step."""
        return self.kv_lr if self.trainable == "kv" else self.low_rank_lr

    def steps_for(self, concepts: int) -> int:
        """Steps of a run: 500 per concept unless set, at most 2,500."""
        return self.steps if self.steps is not None else min(500 * concepts, 2500)


@dataclass(frozen=True)
class SampleConfig(Config):
    """How pictures are drawn."""

    sample_seed: int = setting(0, "seed of the first picture; the next has the next", low=0, high=2**63 - 1)
    sampler: str = setting("ddim", "ddim, or dpm++ (DPM-Solver++), which needs fewer steps", choices=("ddim", "dpm++"))
    sampling_steps: int = setting(50, "sampling steps", low=1, high=1000)
    guidance: float = setting(7.0, "classifier-free guidance scale", low=1, high=50)
    negative_prompt: str = setting("", "what the pictures should not show")
    width: int | None = setting(None, "width in pixels; default: the base's own", low=64, high=4096)
    height: int | None = setting(None, "height in pixels; default: the base's own", low=64, high=4096)
    sample_batch: int = setting(4, "pictures drawn at once", low=1, high=256)
    strength: float = setting(1.0, "strength of the model's changes", low=-4, high=4)
    concept_strength: dict[str, float] | None = setting(
        None, "per modifier token: 0 is the bare class noun's embedding, 1 the learned one"
    )

    def check(self) -> None:
        for token, value in (self.concept_strength or {}).items():
            if not -4 <= value <= 4:
                raise ConfigError(f"concept_strength: {value} for {token} is out of range; it must be between -4 and 4")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML settings file into a mapping. Raises ConfigError."""
    try:
        text = read_words(Path(path))
    except UnreadableFile as e:
        raise ConfigError(f"config: {e}; give a JSON or YAML file") from e
    import yaml

    kind, read = ("JSON", json.loads) if Path(path).suffix.lower() == ".json" else ("YAML", yaml.safe_load)
    try:
        values = read(text)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"config: {path} is not valid {kind} ({reason}); correct it") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold a mapping of settings, not a {type(values).__name__}")
    return values
