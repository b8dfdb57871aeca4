"""Settings of extraction and of Concept Fusion."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.config import Config, check_shares, setting
from ..utils.errors import ConfigError


@dataclass(frozen=True)
class ExtractConfig(Config):
    """How a subject is cut out of its photo."""

    min_area: float = setting(0.03, "smallest part of the photo that a subject's mask may cover", low=0, high=1)
    max_area: float = setting(
        0.95,
        "largest part of the photo that a subject's mask may cover; a larger mask is rejected as the whole picture",
        low=0,
        high=1,
    )
    max_side: int = setting(1024, "photos are scaled down to this longest side, in pixels", low=64, high=8192)
    use_masks: str = setting(
        "keep",
        "what to do with masks that come with the photos; keep: use them as they are; hint: let SAM refine them",
        choices=("keep", "hint"),
    )

    def check(self) -> None:
        if self.min_area >= self.max_area:
            raise ConfigError(f"min_area: {self.min_area} must be smaller than max_area ({self.max_area})")


# Shares of the layouts by the number of concepts. For two concepts, "pair" was raised from .35: prompts ask for both,
# so training must show both. There is no "beside_prior": two concepts of a class already set each other apart, and it
# made each of them worse alone (benchmarks/reports/2026-11-26/tuning.md).
LAYOUT_SHARES: dict[int, dict[str, float]] = {
    1: {"original": 0.35, "solo": 0.25, "pair": 0.0, "triple": 0.0, "beside_prior": 0.40},
    2: {"original": 0.10, "solo": 0.25, "pair": 0.65, "triple": 0.0, "beside_prior": 0.0},
    3: {"original": 0.20, "solo": 0.15, "pair": 0.30, "triple": 0.20, "beside_prior": 0.15},
}
MANY_CONCEPTS = {"original": 0.20, "solo": 0.15, "pair": 0.30, "triple": 0.20, "beside_prior": 0.15}
LAYOUTS = tuple(MANY_CONCEPTS)
BACKGROUND_SHARES = {"scene": 0.45, "infilled": 0.20, "prior": 0.20, "plain": 0.15}


@dataclass(frozen=True)
class FusionConfig(Config):
    """Concept Fusion: which composites are made, and how. Lengths are fractions of the canvas."""

    size: int = setting(768, "side of the square composites in pixels; a multiple of 64", low=64, high=2048)
    count: int = setting(400, "number of composites in the dataset", low=1, high=1_000_000)
    fusion_seed: int = setting(
        0, "random seed; each composite depends on it and on its own index alone", low=0, high=2**63 - 1
    )
    layout_weights: dict[str, float] | None = setting(
        None,
        "relative frequency of each layout: original, solo, pair, triple, beside_prior; default: by the number of "
        "concepts",
        was=("recipe_weights",),
    )
    background_weights: dict[str, float] | None = setting(
        None,
        "relative frequency of each kind of background: scene, infilled, prior, plain; default: .45 .20 .20 .15 of "
        "those available",
    )
    flip: float = setting(
        0.5, "probability that a subject is mirrored; 0 for asymmetric subjects and for text", low=0, high=1
    )
    rotation: float = setting(10.0, "subjects are rotated by up to this many degrees", low=0, high=180)
    brightness: float = setting(0.10, "largest relative change of a subject's brightness", low=0, high=0.9)
    occlusion: float = setting(0.10, "probability that one subject partly covers another", low=0, high=1)
    max_covered: float = setting(
        0.15, "largest part of the smaller subject that the other one may cover", low=0, high=0.9
    )
    vertical_jitter: float = setting(
        0.1,
        "largest vertical offset from a subject's position in its photo, as a fraction of the canvas; 1: anywhere",
        low=0,
        high=1,
        was=("height_drift",),
    )
    pair_scale_min: float = setting(
        0.9,
        "smallest scale of two subjects, relative to half the canvas; the scale is drawn between this and 1",
        low=0.2,
        high=1,
        was=("pair_fill",),
    )
    row_probability: float = setting(
        # Bases draw two subjects side by side, as in a portrait; half, since other prompts must work as well
        # (benchmarks/reports/2026-11-26/tuning.md).
        0.5,
        "probability that several subjects stand close together in a row, at equal size, the lower ones in front",
        low=0,
        high=1,
        was=("row",),
    )
    margin: float = setting(
        1 / 64,
        "margin around each subject, as a fraction of the canvas; subjects are at least twice as far apart",
        low=0,
        high=0.1,
    )
    erode: float = setting(
        1 / 768, "width of the rim cut off each mask before pasting, as a fraction of the canvas", low=0, high=0.08
    )
    feather: float = setting(2.5 / 768, "softness of pasted edges, as a fraction of the canvas", low=0, high=0.08)
    shadow: float = setting(
        0.35,  # benchmarks/reports/2026-11-26/tuning.md: without it training unlearns the shadows that bases draw
        "darkness of the soft shadow under each pasted subject; 0: no shadow",
        low=0,
        high=1,
    )
    collage_caption_probability: float = setting(
        0.5,
        "probability that the caption of a pasted picture calls it a collage, so that traces of pasting are learned as "
        "that word",
        low=0,
        high=1,
        was=("collage_words",),
    )
    prior_composites: float = setting(
        0.3,
        "fraction of the regularization images that are composites of two of them",
        low=0,
        high=1,
        was=("prior_collages",),
    )
    # They choose among the photos, and what was chosen is part of a dataset's identity already.
    min_area: float = setting(
        ExtractConfig.min_area,
        "smallest part of the photo that a subject's mask may cover",
        low=0,
        high=1,
        shapes_result=False,
    )
    max_area: float = setting(
        ExtractConfig.max_area,
        "largest part of the photo that a subject's mask may cover; a larger mask is rejected as the whole picture",
        low=0,
        high=1,
        shapes_result=False,
    )

    @property
    def masks(self) -> ExtractConfig:
        """How the masks of photos are judged."""
        return ExtractConfig(min_area=self.min_area, max_area=self.max_area)

    def check(self) -> None:
        _ = self.masks  # refuses a min_area above max_area
        if self.size % 64:
            raise ConfigError(f"size: {self.size} is not a multiple of 64; try {max(64, round(self.size / 64) * 64)}")
        check_shares("layout_weights", self.layout_weights, LAYOUTS)
        check_shares("background_weights", self.background_weights, tuple(BACKGROUND_SHARES))
