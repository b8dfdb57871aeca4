"""Write the captions of composites and locate each subject's mention in them.

Spans are character positions. The base model's tokenizer turns them into token positions (see
:mod:`far_train.models.tokens`), because two "dog" tokens in one caption share an id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.errors import CaptionError, TokenError

TEMPLATES = ("a photo of {}", "a picture of {}", "a photograph of {}", "an image of {}")
COLLAGE_TEMPLATES = ("a collage of {}", "a photo collage of {}")
TOKEN_PATTERN = re.compile(r"<[a-z0-9]+(?:[-_][a-z0-9]+)*>")
NOUN_PATTERN = re.compile(r"[a-z0-9]+(?:[ '-][a-z0-9]+)*")
SOME_TOKEN = re.compile(r"<[^<>\s]+>")
ENDS_IN_TOKEN = re.compile(r"<[^<>\s]+>\s*$")

Span = tuple[int, int]


@dataclass(frozen=True)
class Name:
    """The name of a subject in captions: a class noun, after a placeholder token if the subject is a concept."""

    noun: str
    token: str | None = None

    @property
    def phrase(self) -> str:
        return f"{self.token} {self.noun}" if self.token else self.noun


@dataclass(frozen=True)
class MentionSpans:
    """Character spans of one mention; ``token`` is None for a bare class noun."""

    token: Span | None
    noun: Span


def check_token(token: str) -> str:
    """Return ``token`` if it is a placeholder token such as ``<corgi-dog>``. Raises TokenError with a suggestion."""
    if not TOKEN_PATTERN.fullmatch(token) or len(token) > 64:
        words = re.findall(r"[a-z0-9]+", token.lower())
        fix = f"write it as <{'-'.join(words)[:60]}>" if words else "write it as <my-dog>"
        raise TokenError(
            f"token: {token!r} is not a placeholder token ({fix}): lower-case letters, digits and hyphens between "
            "< and >, so that it stays one token and never collides with a word"
        )
    return token


def check_noun(noun: str) -> str:
    """Return ``noun`` if it can stand in a caption. Raises CaptionError."""
    if not NOUN_PATTERN.fullmatch(noun) or len(noun) > 64:
        fix = " ".join(re.findall(r"[a-z0-9]+", noun.lower()))[:64].strip() or "dog"
        raise CaptionError(f"noun: {noun!r} is not a class noun; use one or two lower-case words, such as {fix!r}")
    return noun


def with_article(phrase: str) -> str:
    """``dog`` → ``a dog``; a placeholder token always takes ``a``."""
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
    # The template must not hold a noun itself: "a picture of a picture" would hide which word is the subject.
    bare = [name.noun for name in names if not name.token]
    choices = COLLAGE_TEMPLATES if collage else TEMPLATES
    templates = [t for t in choices if not any(_word(noun).search(t) for noun in bare)] or choices
    subjects = join_phrases(names)
    if size_word:
        subjects = f"{subjects} {size_word}"
    caption = templates[rng.integers(len(templates))].format(subjects)
    return f"{caption}, {background}" if background else caption


def default_prompts(names: Sequence[Name]) -> tuple[str, ...]:
    """Prompts to try concepts with: all together, if there are several, and each one alone."""
    groups = ([names] if len(names) > 1 else []) + [[name] for name in names]
    return tuple(f"a photo of {join_phrases(group)}" for group in groups)


def locate_mentions(caption: str, names: Sequence[Name], where: str = "the caption") -> tuple[MentionSpans, ...]:
    """Find the words of each mention, in the order in which the caption mentions them.

    A concept is its placeholder token and the next occurrence of its noun before another token; a bare noun is the next
    such word that no placeholder token precedes. Raises CaptionError naming ``where`` and what is missing.
    """
    spans = []
    cursor = 0
    for i, name in enumerate(names):
        behind = f" behind {names[i - 1].phrase!r}" if cursor else ""
        token_span = None
        if name.token:
            token = re.compile(re.escape(name.token), re.IGNORECASE).search(caption, cursor)
            if token is None:
                raise CaptionError(
                    f"{where}: {name.token!r} is missing{behind} in {caption!r}; mention every masked subject once, in "
                    "the order of the masks"
                )
            token_span, cursor = token.span(), token.end()
            behind = f" behind {name.token!r}"
        noun_span = _find_noun(caption, name, cursor)
        if noun_span is None:
            raise CaptionError(f"{where}: the class noun {name.noun!r} is missing{behind} in {caption!r}; add it there")
        cursor = noun_span[1]
        spans.append(MentionSpans(token_span, noun_span))
    return tuple(spans)


def _find_noun(caption: str, name: Name, start: int) -> Span | None:
    """The first span of the noun from ``start`` on; a noun after a token belongs to that token's mention."""
    for match in _word(name.noun).finditer(caption, start):
        if name.token:
            return None if SOME_TOKEN.search(caption, start, match.start()) else match.span()
        if not ENDS_IN_TOKEN.search(caption, 0, match.start()):
            return match.span()
    return None


def _word(noun: str) -> re.Pattern[str]:
    """The noun as a word of its own: not in "dogs", "hot-dog" or "<dog>"."""
    return re.compile(rf"(?<![\w<-]){re.escape(noun)}(?![\w>-])", re.IGNORECASE)
