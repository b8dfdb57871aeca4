"""FaR weights: what a training learned, and the safetensors file that holds it. Never pickle.

:mod:`.apply` merges weights into a base model, :mod:`.export` writes them as LoRA and embedding files.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from torch import Tensor

from .. import __version__
from ..data.captions import Name, check_noun, check_token
from ..utils.errors import FarError, UnreadableFile, WeightsError
from ..utils.files import parse_json, read_tensors, write_tensors
from .base import BaseModel
from .conditioning import TextConditioner
from .families import FAMILIES, Family
from .fingerprint import fingerprint
from .layers import attention_projections, kv_layers

log = logging.getLogger(__name__)

SCHEMA = 3  # of the file; 2 had embeddings of one text encoder, SD 2.1's, by the token alone
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DELTA_PREFIXES = ("delta.", "up.", "down.")  # of tensor names in the file
MAX_METADATA = 1_000_000  # characters; a file of ten concepts has about two thousand


@dataclass(frozen=True)
class Provenance:
    """Where weights come from: the base model, the concepts in order, and the training's settings.

    ``nouns`` maps placeholder tokens to class nouns; ``size`` is the side of the training images in pixels.
    """

    family: str
    base_digest: str
    prediction_type: str
    nouns: dict[str, str]
    steps: int
    size: int
    config: dict[str, Any] = field(default_factory=dict)
    far_version: str = __version__


@dataclass(frozen=True, eq=False)  # compared by identity: tensors have no single truth value
class LowRankDelta:
    """The change of a matrix [out, in] as the product ``up`` [out, rank] @ ``down`` [rank, in]."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [out, in] of the matrix."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """The change as one fp32 matrix [out, in]."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, eq=False)  # compared by identity; ``digest`` compares by content
class FarWeights:
    """Everything that a training learned.

    ``embeddings`` holds rows [vectors, width] by placeholder token and by text encoder, the latter by its name in
    ComfyUI: ``clip_l``, ``clip_g`` or ``clip_h``. The UNet's changes are stored by the layer's original (LDM) name,
    such as ``input_blocks.1.1.transformer_blocks.0.attn2.to_k``: either ``deltas``, dense matrices [out, in] of all
    cross-attention K and V, or ``low_rank_deltas`` of all attention projections.
    """

    embeddings: dict[str, dict[str, Tensor]]
    deltas: dict[str, Tensor]
    provenance: Provenance
    low_rank_deltas: dict[str, LowRankDelta] = field(default_factory=dict)

    @property
    def names(self) -> tuple[Name, ...]:
        return tuple(Name(self.provenance.nouns[t], t) for t in self.embeddings)

    @property
    def vectors(self) -> int:
        """Vectors of each token."""
        return len(next(iter(next(iter(self.embeddings.values())).values())))

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that the tokens have embeddings for, by their names in ComfyUI, in the base's order."""
        return FAMILIES[self.provenance.family].comfy_names

    def save(self, path: Path) -> None:
        """Write one ``.safetensors`` file. Raises OutputError."""
        embeddings = {f"embedding.{encoder}.{token}": rows for encoder, token, rows in self._rows()}
        about = {**asdict(self.provenance), "schema": SCHEMA}
        write_tensors(path, embeddings | self._delta_tensors(), {"format": "pt", "far": json.dumps(about)})

    def _rows(self) -> list[tuple[str, str, Tensor]]:
        """All embeddings, each as text encoder, placeholder token and rows [vectors, width]."""
        return [(e, token, by_encoder[e]) for token, by_encoder in self.embeddings.items() for e in self.encoders]

    def _delta_tensors(self) -> dict[str, Tensor]:
        """The UNet's changes by their names in the file."""
        tensors = {f"delta.{name}": delta for name, delta in self.deltas.items()}
        tensors |= {f"up.{name}": delta.up for name, delta in self.low_rank_deltas.items()}
        return tensors | {f"down.{name}": delta.down for name, delta in self.low_rank_deltas.items()}

    @classmethod
    def load(cls, path: Path) -> FarWeights:
        """Read a FaR weights file.

        Raises WeightsError when the file is no FaR file, is damaged or comes from a newer version.
        """
        try:
            tensors, metadata = read_tensors(path)
        except UnreadableFile as e:
            raise WeightsError(
                f"weights: can't read {path} ({e}); it is missing, damaged or no safetensors file"
            ) from e
        if "far" not in metadata:
            raise WeightsError(f"weights: {path} is no FaR file (it has no 'far' metadata); is it a LoRA?")
        provenance, schema = _read_provenance(metadata["far"], path)
        if schema < 3:
            tensors = {re.sub("^embedding[.]", "embedding.clip_h.", k): v for k, v in tensors.items()}
        encoders = FAMILIES[provenance.family].comfy_names
        embeddings = {(t, e): tensors.pop(f"embedding.{e}.{t}", None) for t in provenance.nouns for e in encoders}
        deltas, ups, downs = (
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} for prefix in DELTA_PREFIXES
        )
        rows = {f"{token} of {encoder}": tensor for (token, encoder), tensor in embeddings.items()}
        for name, tensor in [*rows.items(), *deltas.items(), *ups.items(), *downs.items()]:
            _check_tensor(name, tensor, path)
        shapes = {(encoder, *tensor.shape) for (_, encoder), tensor in embeddings.items()}
        if len(shapes) > len(encoders) or len({vectors for _, vectors, _ in shapes}) > 1:
            raise WeightsError(f"weights: the embeddings in {path} differ in shape; the file is damaged")
        foreign = [k for k in tensors if not k.startswith(DELTA_PREFIXES)]
        if foreign or not embeddings:
            raise WeightsError(f"weights: {path} does not hold what its metadata says ({foreign[:1] or 'no concepts'})")
        if deltas and ups:
            raise WeightsError(f"weights: {path} holds both dense and low-rank changes; the file is damaged")
        for name in ups.keys() | downs.keys():
            if name not in ups or name not in downs or ups[name].shape[1] != downs[name].shape[0]:
                raise WeightsError(f"weights: {path}: up and down of {name} don't match; the file is damaged")
        learned = {token: {e: embeddings[token, e] for e in encoders} for token in provenance.nouns}
        return cls(learned, deltas, provenance, {name: LowRankDelta(ups[name], downs[name]) for name in ups})

    def check_fits(self, base: BaseModel) -> None:
        """Refuse a base model of another family, shape or prediction type.

        A base of the same shape with other weights only logs a warning. Raises WeightsError.
        """
        about = self.provenance
        self.check_family(base.family)
        if about.prediction_type != base.prediction_type:
            raise WeightsError(
                f"weights: trained on a base with {about.prediction_type}, this one has {base.prediction_type}; "
                "use the base that they were trained on"
            )
        layers = attention_projections(base.unet) if self.low_rank_deltas else kv_layers(base.unet)
        expected = {k: tuple(getattr(owner, part).weight.shape) for k, (owner, part) in layers.items()}
        shapes = self.shapes()
        wrong = sorted(k for k in expected.keys() | shapes.keys() if expected.get(k) != shapes.get(k))
        for encoder, table in zip(self.encoders, TextConditioner(base).tables, strict=True):
            widths = {embeddings[encoder].shape[1] for embeddings in self.embeddings.values()}
            if widths != {table.shape[1]}:
                wrong.append(f"embeddings of {encoder} (width {max(widths)}, the base has {table.shape[1]})")
        if wrong:
            others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise WeightsError(f"weights: they don't fit this base: it differs in {wrong[0]}{others}; use their base")
        if about.base_digest != base.digest:
            log.warning("These weights were trained on another base of the same shape; likeness may suffer.")

    def check_family(self, family: Family) -> None:
        """Refuse bases of another family than the one that was trained. Raises WeightsError."""
        own = FAMILIES[self.provenance.family]
        if own != family:
            raise WeightsError(
                f"weights: trained on {own.title}, this base is {family.title}; use a base of {own.title}"
            )

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of every matrix that changes, by layer name."""
        low_rank = {name: delta.shape for name, delta in self.low_rank_deltas.items()}
        return {name: tuple(delta.shape) for name, delta in self.deltas.items()} | low_rank

    def delta(self, name: str) -> Tensor:
        """The change of a layer's matrix as a dense matrix [out, in], of whichever kind it is stored."""
        return self.low_rank_deltas[name].dense() if name in self.low_rank_deltas else self.deltas[name]

    def digest(self) -> str:
        """A hash of all learned values, the same for every file that holds them."""
        # Runs that continue from weights of SD 2.1 are known by the digest that these had before they named encoders.
        several = len(self.encoders) > 1
        embeddings = {f"{e}.{token}" if several else token: rows for e, token, rows in self._rows()}
        return fingerprint({**embeddings, **self._delta_tensors()}, torch.float32)


def _check_tensor(name: str, tensor: Tensor | None, path: Path) -> None:
    """Refuse what can't be learned values: nothing, no matrix, no floats, or values that are not finite."""
    if tensor is None or tensor.ndim != 2 or not tensor.numel() or tensor.dtype not in DTYPES:
        raise WeightsError(f"weights: {path} holds no proper tensor for {name}; the file is damaged")
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"weights: {path}: {name} holds values that are not finite; the file is damaged")


def _read_provenance(text: str, path: Path) -> tuple[Provenance, int]:
    """What a file's metadata say, and the schema of the file."""
    try:
        if len(text) > MAX_METADATA:
            raise ValueError(f"it has {len(text)} characters")
        values = parse_json(text)
        schema = values["schema"]
        if schema > SCHEMA:
            raise WeightsError(
                f"weights: {path} was made by a newer version of FaR ({values.get('far_version')}); update"
            )
        known = {k: values[k] for k in Provenance.__dataclass_fields__ if k in values}
        provenance = Provenance(**known)
        for name, kind in get_type_hints(Provenance).items():
            if not isinstance(getattr(provenance, name), get_origin(kind) or kind):
                raise TypeError(f"{name} has a wrong type")
        if provenance.family not in FAMILIES:
            raise WeightsError(
                f"weights: {path} is for the model family {provenance.family!r}, which this version lacks"
            )
        for token, noun in provenance.nouns.items():
            check_token(token)
            check_noun(noun)
    except WeightsError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, FarError) as e:
        raise WeightsError(
            f"weights: the metadata of {path} can't be read ({str(e)[:300]}); the file is damaged"
        ) from e
    return provenance, schema


def describe(weights: FarWeights) -> Mapping[str, Any]:
    """Summarize a weights file for people: concepts, layers, number of values, largest change, provenance."""
    about = weights.provenance
    norms = {name: float(weights.delta(name).float().norm()) for name in weights.shapes()}
    parameters = [*(rows for _, _, rows in weights._rows()), *weights._delta_tensors().values()]
    return {
        "concepts": {t: {"noun": about.nouns[t], "vectors": weights.vectors} for t in weights.embeddings},
        "kv_deltas": len(weights.deltas),
        "low_rank_deltas": len(weights.low_rank_deltas),
        "rank": max((delta.rank for delta in weights.low_rank_deltas.values()), default=None),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "largest_delta": max(norms, key=norms.get) if norms else None,
        "family": about.family,
        "prediction_type": about.prediction_type,
        "base_digest": about.base_digest,
        "steps": about.steps,
        "size": about.size,
        "far_version": about.far_version,
        "config": about.config,
    }
