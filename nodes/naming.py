"""File names from what users type, and places for new files beside old ones."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..far_train.utils.files import RESERVED_NAMES, replacing

LONGEST = 80  # characters; some file systems end at 255 bytes, and a counter and a suffix follow


def file_name(text: str, default: str) -> str:
    """``text`` as one plain file name that every system can hold: no folders, no reserved names; or ``default``."""
    name = re.sub(r"[^\w.+ -]+", "-", text.strip())[:LONGEST].strip(" .-")
    name = name or default
    return f"{default}-{name}" if name.split(".")[0].lower() in RESERVED_NAMES else name


def place(source: Path, folder: Path, stem: str) -> Path:
    """Copy a safetensors file to ``folder``/STEM, STEM-2, …: the first that is free or holds the same already.

    Raises OutputError.
    """
    for number in itertools.count(1):
        target = folder / f"{stem if number == 1 else f'{stem}-{number}'}{source.suffix}"
        if not os.path.lexists(target):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
            return target
        if _same_content(source, target):
            return target


def _same_content(first: Path, second: Path) -> bool:
    """By names, metadata and values: the order of a header's entries differs from one write to the next."""
    try:
        with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
            if a.metadata() != b.metadata() or set(a.keys()) != set(b.keys()):
                return False
            pairs = ((a.get_tensor(k), b.get_tensor(k)) for k in a.keys())
            return all(x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all()) for x, y in pairs)
    except (OSError, SafetensorError, RuntimeError, TypeError):  # damaged, or of dtypes that can't be compared
        return False
