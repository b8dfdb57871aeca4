"""Exports of FaR weights that stock loaders read: one LoRA file, and one embedding file per concept."""

from __future__ import annotations

from pathlib import Path

from ..utils.files import RESERVED_NAMES, write_tensors
from .families import FAMILIES
from .lora_files import exact_factorization, lora_tensors, truncated_svd
from .weights import FarWeights, LowRankDelta


def export_lora(weights: FarWeights, path: Path, rank: int | None = None) -> None:
    """Write the UNet's changes as one LoRA file that ComfyUI, kohya's tools and diffusers read.

    ``rank``: an upper limit of the LoRA rank; changes above it are approximated by a truncated SVD. By default they
    are exact, which makes a large file of dense changes: its rank is that of the matrices. Raises OutputError.
    """
    deltas = {name: _factors(weights, name, rank) for name in weights.shapes()}
    write_tensors(path, lora_tensors(deltas, FAMILIES[weights.provenance.family]), {"format": "pt"})


def _factors(weights: FarWeights, name: str, rank: int | None) -> LowRankDelta:
    """A layer's change at no more than ``rank``."""
    if name in weights.low_rank_deltas:
        factors = weights.low_rank_deltas[name]
        return factors if rank is None or rank >= factors.rank else truncated_svd(factors.dense(), rank)
    dense = weights.deltas[name]
    return exact_factorization(dense) if rank is None or rank >= min(dense.shape) else truncated_svd(dense, rank)


def export_embeddings(weights: FarWeights, folder: Path) -> list[Path]:
    """Write one embedding file per concept, ``corgi-dog.safetensors``, which prompts call ``embedding:corgi-dog``.

    It holds the rows of every text encoder by its name, ``clip_l`` and ``clip_g`` for SDXL, as ComfyUI, kohya's tools
    and diffusers expect them.

    Returns their paths in the order of the concepts. Raises OutputError.
    """
    paths = []
    for token, embeddings in weights.embeddings.items():
        path = folder / f"{file_stem(token)}.safetensors"
        write_tensors(path, {encoder: embedding.float() for encoder, embedding in embeddings.items()}, {"format": "pt"})
        paths.append(path)
    return paths


def file_stem(token: str) -> str:
    """A file name for a placeholder token that every system can hold: ``<corgi-dog>`` → ``corgi-dog``."""
    stem = token.strip("<>")
    return f"{stem}-token" if stem in RESERVED_NAMES else stem
