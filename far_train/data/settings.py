"""Settings of extraction and of Concept Fusion."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.config import Config, check_shares, setting
from ..utils.errors import ConfigError


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
