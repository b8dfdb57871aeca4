"""Placeholder tokens: their ids, their places in a prompt, and their embedding rows.

The tokenizer and the embedding table of the base stay as they are. A prompt is split at the placeholder tokens and the
rest is tokenized as always. The placeholder tokens get ids behind the table's last row, which
:class:`PlaceholderEmbedding` serves from a small parameter of its own. So nothing that is frozen can change, and no
token can split.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.captions import Name, Span, check_noun, check_token
from ..utils.errors import CaptionError, TokenError

log = logging.getLogger(__name__)

# Three-letter strings that CLIP's vocabulary holds as one token but that hardly occur in captions: starting points
# without a meaning of their own, as Custom Diffusion uses them.
RARE_WORDS = ("pll", "ucd", "olis", "hta", "rdr", "ohwx", "mbo")


@dataclass(frozen=True)
class TokenizedPrompt:
    """``ids`` [length] padded for the text encoder; ``spans[i]`` is where token i + 1 stands in the text (0 is BOS)."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def positions(self, span: Span) -> tuple[int, ...]:
        """Indices into ``ids`` of the tokens that overlap the characters ``span``."""
        start, end = span
        return tuple(i + 1 for i, (a, b) in enumerate(self.spans) if a < end and b > start)


class Vocabulary:
    """A base tokenizer together with the placeholder tokens of some concepts.

    ``tokenizer`` is a fast CLIP tokenizer; ``names`` are the concepts in the order of their embedding rows;
    each placeholder token stands for ``vectors`` consecutive rows.
    """

    def __init__(self, tokenizer: Any, names: Sequence[Name], table_rows: int, vectors: int = 1):
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.table_rows = table_rows
        self.vectors = vectors
        self.max_length = min(int(tokenizer.model_max_length), 77)
        known = tokenizer.get_vocab()
        self._rows: dict[str, range] = {}
        for i, name in enumerate(self.names):
            token = check_token(name.token or "")
            check_noun(name.noun)
            if token in self._rows:
                raise TokenError(f"token: {token} names two concepts; give each its own token")
            if token in known:
                raise TokenError(f"token: {token} is already a token of the base's vocabulary; choose another name")
            self._rows[token] = range(i * vectors, (i + 1) * vectors)

    def rows(self, token: str) -> range:
        """Embedding rows of a placeholder token, counted from 0."""
        return self._rows[token]

    def tokenize(self, text: str, *, truncate: bool = False) -> TokenizedPrompt:
        """Token ids with character spans. A prompt that is too long is cut with a warning or refused (CaptionError)."""
        ids: list[int] = []
        spans: list[Span] = []
        for start, piece in _split(text, self._rows):
            if piece in self._rows:
                rows = self._rows[piece]
                ids += [self.table_rows + r for r in rows]
                spans += [(start, start + len(piece))] * len(rows)
            else:
                coded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                ids += coded["input_ids"]
                spans += [(start + a, start + b) for a, b in coded["offset_mapping"]]
        room = self.max_length - 2
        if len(ids) > room:
            if not truncate:
                raise CaptionError(f"caption: {text!r} has {len(ids)} tokens, {room} fit; shorten it")
            log.warning("The prompt %r has %d tokens; all after the first %d are ignored.", text, len(ids), room)
            ids, spans = ids[:room], spans[:room]
        ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        ids += [self.tokenizer.pad_token_id] * (self.max_length - len(ids))
        return TokenizedPrompt(tuple(ids), tuple(spans))

    def words(self, text: str) -> list[int]:
        """Plain token ids of a word or phrase, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _split(text: str, tokens: dict[str, Any]) -> list[tuple[int, str]]:
    """Pieces of ``text`` with their starts, cut at every known placeholder token."""
    if not tokens:
        return [(0, text)] if text else []
    pattern = re.compile("(" + "|".join(re.escape(t) for t in tokens) + ")", re.IGNORECASE)
    pieces, start = [], 0
    for piece in pattern.split(text):
        key = piece.lower() if piece.lower() in tokens else piece
        if piece.strip():
            pieces.append((start, key))
        start += len(piece)
    return pieces


def unknown_tokens(prompt: str, known: Sequence[str]) -> list[str]:
    """``<tokens>`` of a prompt that no loaded concept has: they would be read as plain text."""
    return [t for t in re.findall(r"<[^<>\s|]+>", prompt) if t.lower() not in known]


class PlaceholderEmbedding(nn.Module):
    """The base's embedding table (frozen) with the placeholder tokens' rows behind it.

    ``rows`` [n, width] is the one parameter that learns; it keeps fp32 whatever the table's precision is.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows.detach().clone().float())

    @property
    def weight(self) -> Tensor:
        """The frozen table: some text models ask their embedding for its dtype and device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids [..., length] → [..., length, width]; ids from ``len(table)`` on are placeholder tokens."""
        size = self.table.num_embeddings
        is_placeholder = ids >= size
        embedded = self.table(ids.clamp(max=size - 1))
        placeholders = self.rows[(ids - size).clamp(min=0, max=len(self.rows) - 1)].to(embedded.dtype)
        return torch.where(is_placeholder.unsqueeze(-1), placeholders, embedded)


def noun_embedding(table: Tensor, vocabulary: Vocabulary, noun: str) -> Tensor:
    """Mean embedding [width] of a class noun's tokens, in fp32."""
    return table[torch.tensor(vocabulary.words(noun), device=table.device)].float().mean(0)


def initial_rows(table: Tensor, vocabulary: Vocabulary) -> Tensor:
    """First embeddings of all placeholder tokens, [concepts × vectors, width] in fp32.

    Every row starts from a rare word of its own, scaled to its class noun's norm: two dogs that both started from
    "dog" would start identical. A vocabulary without the rare words gives its last merges, its rarest entries.
    """
    rare = [ids[0] for word in RARE_WORDS if len(ids := vocabulary.words(word)) == 1]
    special = {
        vocabulary.tokenizer.bos_token_id,
        vocabulary.tokenizer.eos_token_id,
        vocabulary.tokenizer.pad_token_id,
        vocabulary.tokenizer.unk_token_id,
    }
    tail = (i for i in range(len(vocabulary.tokenizer.get_vocab()) - 1, -1, -1) if i not in special and i not in rare)
    rows = []
    for name in vocabulary.names:
        limit = noun_embedding(table, vocabulary, name.noun).norm()
        for _ in range(vocabulary.vectors):
            row = table[rare.pop(0) if rare else next(tail)].float()
            rows.append(row * (limit / row.norm().clamp(min=1e-8)))
    return torch.stack(rows) if rows else table.new_zeros((0, table.shape[1]), dtype=torch.float32)


def norm_limits(table: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The largest norm that each placeholder row may have, [rows, 1]: its class noun's.

    Longer rows would drown the other words of a prompt.
    """
    limits = [
        noun_embedding(table, vocabulary, name.noun).norm()
        for name in vocabulary.names
        for _ in range(vocabulary.vectors)
    ]
    return torch.stack(limits).unsqueeze(1)
