"""Captions of composites, and where each mention's words stand in them.

Spans are character positions; the base's own tokenizer turns them into token positions (see
:mod:`far_train.tokens`), because two "dog" tokens of one caption share an id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import CaptionError, TokenError

TEMPLATES = ("a photo of {}", "a picture of {}", "a photograph of {}", "an image of {}")
COLLAGE_TEMPLATES = ("a collage of {}", "a photo collage of {}")
TOKEN_PATTERN = re.compile(r"<[a-z0-9]+(?:[-_][a-z0-9]+)*>")
NOUN_PATTERN = re.compile(r"[a-z0-9]+(?:[ '-][a-z0-9]+)*")

Span = tuple[int, int]


@dataclass(frozen=True)
class Name:
    """How a subject is called: a class noun, behind a modifier token if it is a concept and not just any such thing."""

    noun: str
    token: str | None = None

    @property
    def phrase(self) -> str:
        return f"{self.token} {self.noun}" if self.token else self.noun


@dataclass(frozen=True)
class MentionSpans:
    """Character spans of one mention; ``token`` is None for a subject without a modifier."""

    token: Span | None
    noun: Span


def check_token(token: str) -> str:
    """Return ``token`` if it is a modifier token such as ``<corgi-dog>``. Raises TokenError with a suggestion."""
    if not TOKEN_PATTERN.fullmatch(token) or len(token) > 64:
        words = re.findall(r"[a-z0-9]+", token.lower())
        fix = f"write it as <{'-'.join(words)[:60]}>" if words else "write it as <my-dog>"
        raise TokenError(
            f"token: {token!r} is not a modifier token ({fix}): lower-case letters, digits and hyphens between < and >, "
            "so that it stays one token and never collides with a word"
        )
    return token


def check_noun(noun: str) -> str:
    """Return ``noun`` if it can stand in a caption. Raises CaptionError."""
    if not NOUN_PATTERN.fullmatch(noun) or len(noun) > 64:
        raise CaptionError(
            f"noun: {noun!r} is no class noun; use one or two lower-case words, such as 'dog' or 'teddy bear'"
        )
    return noun


def with_article(phrase: str) -> str:
    """``dog`` → ``a dog``; a modifier token always takes ``a``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def join_phrases(names: Sequence[Name]) -> str:
    """List the subjects as a sentence does: "a <x> dog, a <y> dog and a cat"; a repeated bare noun is "another"."""
    seen: set[str] = set()
    phrases = []
    for name in names:
        phrases.append(f"another {name.noun}" if name.phrase in seen else with_article(name.phrase))
        seen.add(name.phrase)
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def write_caption(
    names: Sequence[Name],
    rng: np.random.Generator,
    *,
    background: str = "",
    collage: bool = False,
    size_word: str = "",
) -> str:
    """Draw a caption that mentions ``names`` in this order.

    ``background`` is a phrase such as "in a garden"; ``size_word`` ("far away" or "close up") is for one subject.
    """
    templates = COLLAGE_TEMPLATES if collage else TEMPLATES
    subjects = join_phrases(names)
    if size_word:
        subjects = f"{subjects} {size_word}"
    caption = templates[rng.integers(len(templates))].format(subjects)
    return f"{caption}, {background}" if background else caption


def locate_mentions(caption: str, names: Sequence[Name], where: str = "the caption") -> tuple[MentionSpans, ...]:
    """Find the words of each mention, in the order in which the caption mentions them.

    A concept is its modifier token and the next occurrence of its noun behind it; a bare noun is the next such word
    that no modifier token precedes. Raises CaptionError naming ``where`` and what is missing.
    """
    spans = []
    cursor = 0
    for name in names:
        token_span = None
        if name.token:
            found = caption.find(name.token, cursor)
            if found < 0:
                raise CaptionError(
                    f"{where}: '{name.token}' is missing from {caption!r}; mention every masked subject once"
                )
            token_span = (found, found + len(name.token))
            cursor = token_span[1]
        noun_span = _find_noun(caption, name, cursor)
        if noun_span is None:
            place = f" behind {name.token}" if name.token else ""
            raise CaptionError(f"{where}: the class noun '{name.noun}' is missing{place} in {caption!r}; add it")
        cursor = noun_span[1]
        spans.append(MentionSpans(token_span, noun_span))
    return tuple(spans)


def _find_noun(caption: str, name: Name, start: int) -> Span | None:
    for match in re.finditer(rf"(?<![\w<-]){re.escape(name.noun)}(?![\w>-])", caption[start:], re.IGNORECASE):
        span = (start + match.start(), start + match.end())
        behind_token = re.search(r"<[^<>\s]+>\s*$", caption[: span[0]])
        if name.token or not behind_token:
            return span
    return None
