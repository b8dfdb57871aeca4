"""Merging FaR weights into a base model, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..utils.config import SampleConfig
from ..utils.errors import ConfigError, WeightsError
from .base import BaseModel, attention_projections
from .tokens import ModifierEmbedding, Vocabulary, noun_embedding
from .weights import FarWeights


def apply_weights(weights: FarWeights, base: BaseModel, config: SampleConfig = SampleConfig()) -> Vocabulary:
    """Merge ``weights`` into ``base`` for good and return the vocabulary that reads its prompts.

    ``config.strength`` scales the UNet's changes, which all concepts share. ``config.concept_strength`` interpolates a
    concept's embedding between its class noun's (0) and the learned one (1). Raises WeightsError if the weights don't
    fit the base or if the base has some already, ConfigError if ``concept_strength`` names an unknown token.
    """
    table = base.text_encoder.get_input_embeddings()
    if isinstance(table, ModifierEmbedding):
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
    vectors = len(next(iter(weights.embeddings.values())))
    vocabulary = Vocabulary(base.tokenizer, weights.names, table.num_embeddings, vectors)
    rows = _embedding_rows(weights, table.weight, vocabulary, config.concept_strength or {})
    base.text_encoder.set_input_embeddings(ModifierEmbedding(table, rows))
    return vocabulary


@contextmanager
def applied_weights(
    weights: FarWeights, base: BaseModel, config: SampleConfig = SampleConfig()
) -> Iterator[Vocabulary]:
    """Merge ``weights`` into ``base`` within a ``with`` block; afterwards the base is as it was.

    Arguments, result and errors are those of :func:`apply_weights`.
    """
    table = base.text_encoder.get_input_embeddings()
    before = [(projection, projection.weight) for projection in _projections(base).values()]
    try:
        yield apply_weights(weights, base, config)
    finally:
        base.text_encoder.set_input_embeddings(table)
        for projection, weight in before:
            projection.weight = weight


def _projections(base: BaseModel) -> dict[str, nn.Linear]:
    return {name: getattr(owner, part) for name, (owner, part) in attention_projections(base.unet).items()}


def _embedding_rows(weights: FarWeights, table: Tensor, vocabulary: Vocabulary, strengths: dict[str, float]) -> Tensor:
    """Embedding rows [concepts × vectors, width] at these concept strengths, by default 1."""
    rows = []
    for name in weights.names:
        noun = noun_embedding(table, vocabulary, name.noun)
        rows.append(torch.lerp(noun, weights.embeddings[name.token].float().to(noun), strengths.get(name.token, 1.0)))
    return torch.cat(rows)
