"""A small tokenizer in CLIP's format: every word of the world and of FaR's captions is one token.

Byte-pair encoding as CLIP has it (Sennrich et al. 2016, arXiv 1508.07909, on bytes): 256 byte symbols, the same 256 at
the end of a word, then one entry per merge. Whatever is no known word is spelt, so anything can be written.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

from far_train.data.backgrounds import PLAIN_COLOURS
from far_train.data.captions import COLLAGE_TEMPLATES, TEMPLATES
from far_train.mini.world import world_words
from far_train.models.tokens import RARE_WORDS
from far_train.utils.files import write_json, write_text

START, END = "<|startoftext|>", "<|endoftext|>"
PAD = "!"  # the first byte symbol, id 0: SD 2.x pads with it
LENGTH = 77
WORD_END = "</w>"
# What captions.py and scenery.py say beyond their templates.
PHRASES = ("another", "close up", "far away", "on a plain background", "on a gradient background", "and")


def known_words() -> list[str]:
    """Every word that shall be one token: the world's, those of FaR's own captions, and words without a meaning for
    modifier tokens to start from. In a fixed order, the meaningless ones last."""
    texts = [*TEMPLATES, *COLLAGE_TEMPLATES, *PHRASES, *PLAIN_COLOURS]
    own = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    return [*sorted({*world_words(), *own}), *RARE_WORDS]


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: visible ones first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def make_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in order of rank, under which each of these ASCII words becomes one token.

    Words are taken one after the other, and merges are only ever appended. A later merge has a lower rank than all
    that an earlier word needs, so it never comes between them.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _split(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return list(ranks)


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word: the merge of the best rank first, until none applies."""
    pieces = [*word[:-1], word[-1] + WORD_END]
    while candidates := [pair for pair in pairwise(pieces) if pair in ranks]:
        best, merged, i = min(candidates, key=ranks.__getitem__), [], 0
        while i < len(pieces):
            taken = 2 if tuple(pieces[i : i + 2]) == best else 1
            merged.append("".join(pieces[i : i + taken]))
            i += taken
        pieces = merged
    return pieces


def vocabulary() -> dict[str, int]:
    """Token → id, as vocab.json has it; the end token has the largest id, by which CLIP finds it."""
    symbols = byte_symbols()
    merged = ["".join(pair) for pair in make_merges(known_words())]
    entries = [*symbols, *(s + WORD_END for s in symbols), *dict.fromkeys(merged), START, END]
    return {entry: i for i, entry in enumerate(entries)}


def write_tokenizer(folder: Path) -> Path:
    """Write vocab.json, merges.txt and the two config files; ``CLIPTokenizerFast`` loads the folder."""
    special = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": END}
    write_text(folder / "vocab.json", json.dumps(vocabulary(), ensure_ascii=False))
    merges = [" ".join(pair) for pair in make_merges(known_words())]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "split_special_tokens": True,
    }
    write_json(folder / "tokenizer_config.json", settings | special)
    return folder
