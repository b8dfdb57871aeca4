"""The host's tokenizers: placeholder tokens in every prompt, and the embeddings of class nouns.

A CLIP has a tokenizer for each of its text encoders, and a prompt goes through all of them: those of Stable Diffusion
XL split it alike but fill it up differently, and each looks an embedding up for its own encoder.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..far_train.models.tokens import unknown_tokens
from ..far_train.utils.errors import WeightsError
from . import layout
from .host_memory import training_copy
from .host_state import read_weights

log = logging.getLogger(__name__)


def apply_tokens(clip: Any, embeddings: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """CLIP whose prompts may hold the placeholder tokens.

    ``embeddings`` [n, width] by token, ``<corgi-dog>``, and by text encoder, ``clip_l``. Works in every node that
    tokenizes with the CLIP it is given, with weights as in ``(<corgi-dog>:1.2)``, and on top of tokens applied before.
    The input and its tokenizers stay as they are. Raises WeightsError.
    """
    tokenizers = inner_tokenizers(clip)
    applied = clip.clone()
    applied.tokenizer = copy.copy(clip.tokenizer)
    warned: set[str] = set()
    for name, tokenizer in tokenizers.items():
        own = {token: by_encoder[name] for token, by_encoder in embeddings.items()}
        for token, rows in own.items():
            # The host would drop such an embedding from every prompt with no more than a line in its log.
            if rows.ndim != 2 or rows.shape[1] != tokenizer.embedding_size:
                raise WeightsError(
                    f"weights: {token} has {rows.shape[-1]} numbers per vector, {name} of this CLIP needs "
                    f"{tokenizer.embedding_size}; use the CLIP of the base that they belong to"
                )
        setattr(applied.tokenizer, name, _with_placeholders(tokenizer, own, warned))
    return applied


def text_encoder_names(clip: Any) -> tuple[str, ...]:
    """The host's names of CLIP's text encoders, such as clip_h."""
    return tuple(name for name, _ in clip.cond_stage_model.named_children())


def inner_tokenizers(clip: Any) -> dict[str, Any]:
    """The host's tokenizer for each text encoder of CLIP, by the encoder's name, in the order of the family's table.

    Raises BaseModelError for a CLIP of another family.
    """
    family = layout.clip_family(text_encoder_names(clip), "the base that the weights belong to")
    return {name: getattr(clip.tokenizer, name) for name in family.comfy_names}


def first_tokenizer(clip: Any) -> tuple[str, Any]:
    """The first of CLIP's tokenizers, with the name under which the host tokenizes with it: all split prompts alike.

    Raises BaseModelError for a CLIP of another family.
    """
    name, tokenizer = next(iter(inner_tokenizers(clip).items()))
    return name.removeprefix("clip_"), tokenizer


class _PlaceholderTokens:
    """Mixin for a copy of the host's tokenizer: placeholder tokens become embeddings, looked up in a table."""

    far_tokens: Mapping[str, Tensor]
    far_warned: set[str]  # one set for all tokenizers of a CLIP
    far_names_found: bool  # whether this host's _try_get_embedding also gives the name back, as it does since 2026

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        for token in unknown_tokens(text, tuple(self.far_tokens)):
            if token not in self.far_warned:
                self.far_warned.add(token)
                log.warning(
                    "The prompt holds %s, which none of the applied concepts has (%s): it is read as plain text.",
                    token,
                    ", ".join(self.far_tokens),
                )
        names = "|".join(map(re.escape, self.far_tokens))
        pattern = re.compile(f"(?:{self.embedding_identifier})?({names})", re.IGNORECASE)
        # The spaces matter: the host looks for " embedding:", and takes all up to the next space for the name.
        text = pattern.sub(lambda m: f" {self.embedding_identifier}{m[1].lower()} ", text)
        return super().tokenize_with_weights(text, *args, **kwargs)

    def _try_get_embedding(self, embedding_name: str) -> tuple[Any, ...]:
        name, _, rest = embedding_name.partition(" ")
        if name in self.far_tokens:
            found = self.far_tokens[name]
            return (found, name, rest.strip()) if self.far_names_found else (found, rest.strip())
        return super()._try_get_embedding(embedding_name)


def _with_placeholders(tokenizer: Any, embeddings: Mapping[str, Tensor], warned: set[str]) -> Any:
    """A copy of a tokenizer that knows the tokens; those of earlier copies stay known.

    ``warned`` collects unknown tokens that the log tells of.
    """
    applied = copy.copy(tokenizer)
    kind = type(tokenizer)
    if not isinstance(tokenizer, _PlaceholderTokens):
        applied.__class__ = type(kind.__name__, (_PlaceholderTokens, kind), {})
    tokens = {token: training_copy(rows).float() for token, rows in embeddings.items()}
    applied.far_tokens = {**getattr(tokenizer, "far_tokens", {}), **tokens}
    applied.far_warned = warned
    nowhere = copy.copy(tokenizer)
    nowhere.embedding_directory = []
    applied.far_names_found = len(nowhere._try_get_embedding("none")) == 3
    if applied.embedding_directory is None:  # then the host would not look for embeddings at all
        applied.embedding_directory = []
    return applied


def noun_embeddings(clip: Any, noun: str) -> dict[str, Tensor]:
    """Mean embedding [width] of a class noun's tokens in each of CLIP's text encoders, by the encoder's name.

    See :func:`far_train.models.tokens.noun_embedding`.
    """
    means = {}
    for name, tokenizer in inner_tokenizers(clip).items():
        key = f"{name}.transformer.text_model.embeddings.token_embedding.weight"
        table = read_weights(clip.patcher, key)[key]
        means[name] = table[tokenizer.tokenizer(noun, add_special_tokens=False)["input_ids"]].mean(0)
    return means
