"""Which files hold the weights of one part in a diffusers folder: whole or in shards, in full or reduced precision."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from ..utils.errors import BaseModelError

# The best first: fp16 keeps three bits more of each weight than bf16.
VARIANTS = ("", "fp32", "fp16", "bf16")
# diffusers wrote a variant's name behind the shard's number before it wrote it in front of it.
NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<number>\d+)-of-(?P<count>\d+)(?:\.(?P<late_variant>\w+))?)?\.safetensors"
)


def weight_files(folder: Path) -> list[Path]:
    """The files of the most precise variant in ``folder``; a whole file goes before shards.

    Raises BaseModelError where there is none, where shards are missing, or where the names don't say which to take.
    """
    where = f"{folder.parent.name}/{folder.name}"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseModelError(f"base: {where} holds no .safetensors weights; FaR never unpickles .bin files")
    variants: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        found = NAME.fullmatch(path.name)
        if found:
            variant = found["variant"] or found["late_variant"] or ""
            variants[variant][int(found["count"] or 1)].append(path)
    chosen = next((v for v in VARIANTS if v in variants), None)
    if chosen is None:
        if len(files) == 1:
            return files
        if len(variants) != 1:
            names = ", ".join(path.name for path in files[:4])
            raise BaseModelError(f"base: {where} holds {names}; leave one of them, named {_plain_name(folder)}")
        (chosen,) = variants
    count, shards = min(variants[chosen].items())
    if len(shards) != count:
        raise BaseModelError(f"base: {where} holds {len(shards)} of {count} shards of its weights; fetch the others")
    return shards


def _plain_name(folder: Path) -> str:
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    return f"{stem}.safetensors"
