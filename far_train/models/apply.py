"""Merging FaR weights into a base model, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..utils.errors import ConfigError, WeightsError
from .base import BaseModel
from .conditioning import TextConditioner
from .layers import attention_projections
from .settings import SampleConfig
from .tokens import Vocabulary, noun_embedding
from .weights import FarWeights


def apply_weights(weights: FarWeights, base: BaseModel, config: SampleConfig = SampleConfig()) -> Vocabulary:
    """Merge ``weights`` into ``base`` for good and return the vocabulary that reads its prompts.

    ``config.strength`` scales the UNet's changes, which all concepts share. ``config.concept_strength`` interpolates a
    concept's embedding between its class noun's (0) and the learned one (1). Raises WeightsError if the weights don't
    fit the base or if the base has some already, ConfigError if ``concept_strength`` names an unknown token.
    """
    conditioner = TextConditioner(base)
    if conditioner.has_placeholders:
        raise WeightsError(
            "weights: this base has FaR weights already; load it anew, or use 'with applied_weights(weights, base)', "
            "which takes them out again"
        )
    weights.check_fits(base)
    for token in config.concept_strength or {}:
        if token not in weights.embeddings:
            raise ConfigError(f"concept_strength: there is no {token}; known: {', '.join(weights.embeddings)}")
    projections = _projections(base)
    for name in weights.shapes():
        projection = projections[name]
        merged = projection.weight.detach() + config.strength * weights.delta(name).to(projection.weight)
        projection.weight = nn.Parameter(merged, requires_grad=False)  # the old tensor may be the caller's own
    vocabulary = Vocabulary(base.tokenizer, weights.names, base.tokenizer_size, weights.vectors)
    strengths = config.concept_strength or {}
    tables = zip(weights.encoders, conditioner.tables, strict=True)
    conditioner.inject([_embedding_rows(weights, encoder, table, vocabulary, strengths) for encoder, table in tables])
    return vocabulary


@contextmanager
def applied_weights(
    weights: FarWeights, base: BaseModel, config: SampleConfig = SampleConfig()
) -> Iterator[Vocabulary]:
    """Merge ``weights`` into ``base`` within a ``with`` block; afterwards the base is as it was.

    Arguments, result and errors are those of :func:`apply_weights`.
    """
    conditioner = TextConditioner(base)
    others = conditioner.has_placeholders  # of other weights, which stay when these are refused
    before = [(projection, projection.weight) for projection in _projections(base).values()]
    try:
        yield apply_weights(weights, base, config)
    finally:
        if not others:
            conditioner.remove()
        for projection, weight in before:
            projection.weight = weight


def _projections(base: BaseModel) -> dict[str, nn.Linear]:
    return {name: getattr(owner, part) for name, (owner, part) in attention_projections(base.unet).items()}


def _embedding_rows(
    weights: FarWeights, encoder: str, table: Tensor, vocabulary: Vocabulary, strengths: dict[str, float]
) -> Tensor:
    """Embedding rows [concepts × vectors, width] for a text encoder at these concept strengths, by default 1."""
    rows = []
    for name in weights.names:
        noun = noun_embedding(table, vocabulary, name.noun)
        learned = weights.embeddings[name.token][encoder].float().to(noun)
        rows.append(torch.lerp(noun, learned, strengths.get(name.token, 1.0)))
    return torch.cat(rows)
