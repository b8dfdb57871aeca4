"""The files on disk that a node's output was made of. People edit and delete them, and the host's cache can't know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .host_folders import files_fingerprint


@dataclass
class _Known:
    generation: int = 0
    fingerprints: dict[Path, str] = field(default_factory=dict)


_by_node: dict[str | None, _Known] = {}


def remember_files(node_id: str | None, paths: Sequence[Path]) -> None:
    """Note how these files are now that a node has used them, and maybe made them. A missing one counts as well."""
    known = _by_node.setdefault(node_id, _Known())
    known.fingerprints |= {path: files_fingerprint([path]) for path in paths}


def files_generation(node_id: str | None) -> int:
    """For ``fingerprint_inputs``: a number that rises when someone else has changed what a node remembers.

    All that the node has used since the host started counts: the host may hold older outputs of it, too.
    """
    known = _by_node.setdefault(node_id, _Known())
    now = {path: files_fingerprint([path]) for path in known.fingerprints}
    if now != known.fingerprints:
        known.fingerprints = now
        known.generation += 1
    return known.generation
