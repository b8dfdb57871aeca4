"""The FaR weights file, and its exports to files that stock loaders read. Safetensors alone, never pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .. import __version__
from ..data.captions import Name, check_noun, check_token
from ..utils.config import SCHEMA_VERSION, SampleConfig
from ..utils.errors import ConfigError, FarError, UnreadableFile, WeightsError
from ..utils.files import parse_json, read_tensors, write_tensors
from .base import BaseModel
from .conditioning import TextConditioner
from .families import FAMILIES
from .fingerprint import fingerprint
from .layers import attention_projections, kv_layers
from .lora_files import exact, lora_tensors, nearest
from .tokens import Vocabulary, noun_embedding

log = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PREFIXES = ("delta.", "up.", "down.")  # of the tensors that change the UNet
MAX_METADATA = 1_000_000  # characters; a file of ten concepts has about two thousand
RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


@dataclass(frozen=True)
class Provenance:
    """Where weights come from: the base they were trained on, the concepts in order, and how."""

    family: str
    base_digest: str
    prediction_type: str
    nouns: dict[str, str]
    steps: int
    size: int
    config: dict[str, Any] = field(default_factory=dict)
    far_version: str = __version__
    schema: int = SCHEMA_VERSION


class Product(NamedTuple):
    """A change of a matrix [out, in] as ``up`` [out, rank] @ ``down`` [rank, in]."""

    up: Tensor
    down: Tensor

    @property
    def whole(self) -> Tensor:
        return self.up.float() @ self.down.float()


@dataclass(frozen=True)
class FarWeights:
    """Learned weights: ``embeddings`` [n, width] by placeholder token and text encoder, and what changes in the UNet by
    the original (LDM) layer name, ``input_blocks.1.1.transformer_blocks.0.attn2.to_k``: ``deltas`` [out, in] of all
    K/V, or ``products`` for all projections of the attention. Text encoders go by their names in ComfyUI, "clip_h"."""

    embeddings: dict[str, dict[str, Tensor]]
    deltas: dict[str, Tensor]
    provenance: Provenance
    products: dict[str, Product] = field(default_factory=dict)

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

    def _tokens(self) -> dict[str, Tensor]:
        """The tokens' embeddings as a file of this schema has them: for the only text encoder."""
        (encoder,) = self.encoders
        return {token: embeddings[encoder] for token, embeddings in self.embeddings.items()}

    def save(self, path: Path) -> None:
        """Write one ``.safetensors`` file. Raises OutputError."""
        tensors = {f"embedding.{t}": e for t, e in self._tokens().items()}
        tensors |= self._changes()
        write_tensors(path, tensors, {"format": "pt", "far": json.dumps(asdict(self.provenance))})

    def _changes(self) -> dict[str, Tensor]:
        """The UNet's changes as a file names them."""
        tensors = {f"delta.{name}": d for name, d in self.deltas.items()}
        tensors |= {f"up.{name}": product.up for name, product in self.products.items()}
        return tensors | {f"down.{name}": product.down for name, product in self.products.items()}

    @classmethod
    def load(cls, path: Path) -> FarWeights:
        """Read a FaR weights file. Raises WeightsError when it is none, damaged, or from a newer version."""
        try:
            tensors, metadata = read_tensors(path)
        except UnreadableFile as e:
            raise WeightsError(
                f"weights: can't read {path} ({e}); it is missing, damaged or no safetensors file"
            ) from e
        if "far" not in metadata:
            raise WeightsError(f"weights: {path} is no FaR file (it has no 'far' metadata); is it a LoRA?")
        provenance = _read_provenance(metadata["far"], path)
        embeddings = {t: tensors.get(f"embedding.{t}") for t in provenance.nouns}
        deltas, ups, downs = ({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in PREFIXES)
        foreign = [k for k in tensors if not k.startswith(PREFIXES) and k.removeprefix("embedding.") not in embeddings]
        for name, value in [*embeddings.items(), *deltas.items(), *ups.items(), *downs.items()]:
            if value is None or value.ndim != 2 or not value.numel() or value.dtype not in DTYPES:
                raise WeightsError(f"weights: {path} holds no proper tensor for {name}; the file is damaged")
            if not bool(torch.isfinite(value).all()):
                raise WeightsError(f"weights: {path}: {name} holds values that are not finite; the file is damaged")
        if len({e.shape for e in embeddings.values()}) > 1:
            raise WeightsError(f"weights: the embeddings in {path} differ in shape; the file is damaged")
        if foreign or not embeddings:
            raise WeightsError(f"weights: {path} does not hold what its metadata says ({foreign[:1] or 'no concepts'})")
        if deltas and ups:
            raise WeightsError(f"weights: {path} holds whole changes and low-rank ones; the file is damaged")
        for name in ups.keys() | downs.keys():
            if name not in ups or name not in downs or ups[name].shape[1] != downs[name].shape[0]:
                raise WeightsError(f"weights: {path}: the halves of {name} don't belong together; the file is damaged")
        (encoder,) = FAMILIES[provenance.family].comfy_names
        learned = {token: {encoder: embedding} for token, embedding in embeddings.items()}
        return cls(learned, deltas, provenance, {name: Product(ups[name], downs[name]) for name in ups})

    def check_fits(self, base: BaseModel) -> None:
        """Refuse a base of another shape or prediction type (WeightsError); warn about another one of the same kind."""
        about = self.provenance
        if about.prediction_type != base.prediction_type:
            raise WeightsError(
                f"weights: trained on a base with {about.prediction_type}, this one has {base.prediction_type}; "
                "use the base that they were trained on"
            )
        layers = attention_projections(base.unet) if self.products else kv_layers(base.unet)
        own = {k: tuple(getattr(owner, part).weight.shape) for k, (owner, part) in layers.items()}
        ours = self.shapes()
        wrong = sorted(k for k in own.keys() | ours.keys() if own.get(k) != ours.get(k))
        for encoder, table in zip(self.encoders, TextConditioner(base).tables, strict=True):
            widths = {embeddings[encoder].shape[1] for embeddings in self.embeddings.values()}
            if widths != {table.shape[1]}:
                wrong.append(f"embeddings (width {max(widths)}, the base has {table.shape[1]})")
        if wrong:
            raise WeightsError(
                f"weights: they don't fit this base: {wrong[0]} and {len(wrong) - 1} others differ; use their base"
            )
        if about.base_digest != base.digest:
            log.warning("These weights were trained on another base of the same shape; likeness may suffer.")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of every matrix that changes."""
        products = {name: (p.up.shape[0], p.down.shape[1]) for name, p in self.products.items()}
        return {name: tuple(delta.shape) for name, delta in self.deltas.items()} | products

    def change(self, name: str) -> Tensor:
        """What is added to the matrix of a layer, [out, in]."""
        return self.products[name].whole if name in self.products else self.deltas[name]

    def check_kind(self, trainable: str, rank: int | None = None) -> None:
        """Refuse weights that a training of this kind can't go on from. Raises WeightsError."""
        kind = "attention" if self.products else "kv"
        ranks = {product.up.shape[1] for product in self.products.values()}
        if kind != trainable:
            raise WeightsError(f"continue_from: these weights were trained with trainable {kind}; set it to {kind}")
        if ranks and ranks != {rank}:
            raise WeightsError(f"continue_from: these weights have rank {max(ranks)}; set low_rank to {max(ranks)}")

    def digest(self) -> str:
        """Identifies what was learned, whatever file it came from."""
        return fingerprint({**self._tokens(), **self._changes()}, torch.float32)

    @torch.no_grad()
    def initialize(self, vocabulary: Vocabulary, rows: Sequence[Tensor]) -> None:
        """Write the embeddings into those of the vocabulary's tokens that learn on: ``rows``, [concepts × vectors,
        width] for each text encoder. Tokens that these weights lack keep theirs.

        Raises WeightsError if a token has another number of vectors.
        """
        known = [name.token for name in vocabulary.names]
        if left := [token for token in self.embeddings if token not in known]:
            log.warning("The weights to continue from also know %s, which the dataset lacks.", ", ".join(left))
        for token in self.embeddings.keys() & set(known):
            own = vocabulary.rows(token)
            for encoder, into in zip(self.encoders, rows, strict=True):
                learned = self.embeddings[token][encoder]
                if len(own) != len(learned):
                    raise WeightsError(
                        f"continue_from: {token} has {len(learned)} vectors there; "
                        f"set vectors_per_token to {len(learned)}"
                    )
                into[own.start : own.stop] = learned.to(into)

    def apply(self, base: BaseModel, config: SampleConfig = SampleConfig()) -> Vocabulary:
        """Put the weights into ``base`` for good and return the vocabulary for its prompts; see :meth:`applied`."""
        return self._put_into(base, config)[0]

    @contextmanager
    def applied(self, base: BaseModel, config: SampleConfig = SampleConfig()) -> Iterator[Vocabulary]:
        """Within, ``base`` has the weights, and prompts are read by the vocabulary that this gives; afterwards it is
        as it was.

        ``config.strength`` scales the UNet's changes, which all concepts share; ``config.concept_strength`` moves one
        concept's embedding between its bare noun's (0) and the learned one (1). Raises WeightsError if they don't fit
        the base, or if the base has some applied already.
        """
        vocabulary, take_out = self._put_into(base, config)
        try:
            yield vocabulary
        finally:
            take_out()

    def _put_into(self, base: BaseModel, config: SampleConfig) -> tuple[Vocabulary, Callable[[], None]]:
        """The vocabulary, and what takes the weights out again."""
        conditioner = TextConditioner(base)
        if conditioner.has_placeholders:
            raise WeightsError(
                "weights: this base has FaR weights already; load it anew, or use 'with weights.applied(base)', which "
                "takes them out again"
            )
        self.check_fits(base)
        strengths = config.concept_strength or {}
        for token in strengths:
            if token not in self.embeddings:
                raise ConfigError(f"concept_strength: there is no {token}; known: {', '.join(self.embeddings)}")
        layers = attention_projections(base.unet)
        before = []
        for name in self.shapes():
            owner, part = layers[name]
            projection = getattr(owner, part)
            before.append((projection, projection.weight))
            changed = projection.weight.detach() + config.strength * self.change(name).to(projection.weight)
            projection.weight = nn.Parameter(changed, requires_grad=False)  # the old tensor may be the caller's own
        vocabulary = Vocabulary(base.tokenizer, self.names, base.tokenizer_size, self.vectors)
        rows = []
        for encoder, table in zip(self.encoders, conditioner.tables):
            of_encoder = []
            for name in self.names:
                bare = noun_embedding(table, vocabulary, name.noun)
                learned = self.embeddings[name.token][encoder].float().to(bare)
                of_encoder.append(torch.lerp(bare, learned, strengths.get(name.token, 1.0)))
            rows.append(torch.cat(of_encoder))
        conditioner.inject(rows)

        def take_out() -> None:
            conditioner.remove()
            for projection, weight in before:
                projection.weight = weight

        return vocabulary, take_out

    def export_lora(self, path: Path, rank: int | None = None) -> None:
        """Write the UNet's changes as one LoRA file that ComfyUI, kohya's tools and diffusers read: as they are, or as
        the nearest of ``rank``. Whole changes as they are make a large file, of the matrices' own rank."""
        changes = {
            name: product if rank is None or rank >= product.up.shape[1] else nearest(product.whole, rank)
            for name, product in self.products.items()
        }
        for name, delta in self.deltas.items():
            changes[name] = exact(delta) if rank is None or rank >= min(delta.shape) else nearest(delta, rank)
        write_tensors(path, lora_tensors(changes), {"format": "pt"})

    def export_embeddings(self, folder: Path) -> list[Path]:
        """Write one embedding file per concept, ``corgi-dog.safetensors``, used as ``embedding:corgi-dog``."""
        paths = []
        for token, embeddings in self.embeddings.items():
            path = folder / f"{file_stem(token)}.safetensors"
            write_tensors(path, {encoder: e.float() for encoder, e in embeddings.items()}, {"format": "pt"})
            paths.append(path)
        return paths


def file_stem(token: str) -> str:
    """A file name for a modifier token that every system can hold: ``<corgi-dog>`` → ``corgi-dog``."""
    stem = token.strip("<>")
    return f"{stem}-token" if stem in RESERVED else stem


def _read_provenance(text: str, path: Path) -> Provenance:
    try:
        if len(text) > MAX_METADATA:
            raise ValueError(f"it has {len(text)} characters")
        values = parse_json(text)
        if values["schema"] > SCHEMA_VERSION:
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
    return provenance


def describe(weights: FarWeights) -> Mapping[str, Any]:
    """What a weights file holds, for people: concepts, layers, the size of the change, where it comes from."""
    about = weights.provenance
    norms = {name: float(weights.change(name).float().norm()) for name in weights.shapes()}
    embeddings = chain(*(e.values() for e in weights.embeddings.values()))
    learned = [*embeddings, *weights.deltas.values(), *chain(*weights.products.values())]
    return {
        "concepts": {t: {"noun": about.nouns[t], "vectors": weights.vectors} for t in weights.embeddings},
        "kv_deltas": len(weights.deltas),
        "low_rank_changes": len(weights.products),
        "rank": max((p.up.shape[1] for p in weights.products.values()), default=None),
        "parameters": sum(v.numel() for v in learned),
        "largest_change": max(norms, key=norms.get) if norms else None,
        "family": about.family,
        "prediction_type": about.prediction_type,
        "base_digest": about.base_digest,
        "steps": about.steps,
        "size": about.size,
        "far_version": about.far_version,
        "config": about.config,
    }
