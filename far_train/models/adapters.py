"""Adapters: the fp32 parameters that a training learns, injected into a frozen base model.

Every adapter has embedding rows for the placeholder tokens. The UNet changes by dense deltas of all cross-attention
K and V (:class:`CrossAttentionKV`) or by LoRA on all attention projections (:class:`LoRAAttention`).
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import WeightsError
from ..utils.seeding import derive_seed
from .base import BaseModel
from .conditioning import TextConditioner
from .layers import attention_projections, kv_layers
from .settings import AdapterSettings
from .tokens import Vocabulary, initial_rows, norm_limits
from .weights import FarWeights, LowRankDelta

log = logging.getLogger(__name__)


class Adapter(ABC):
    """Trainable parameters injected into a base model. The base's own weights are never written.

    ``rows`` are the embeddings of the placeholder tokens, [concepts × vectors, width] for each text encoder.
    Subclasses add what changes in the UNet; :func:`inject_adapter` chooses one. An adapter that can't be completed, as
    where memory runs out, leaves the base as it was.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        from .memory_efficient import MemoryEfficientLayers  # loads diffusers, which takes seconds

        self._vocabulary, self._conditioner = vocabulary, TextConditioner(base)
        tables = self._conditioner.tables
        self._norm_limits = [norm_limits(table, vocabulary) for table in tables]
        rows = [initial_rows(table, vocabulary) for table in tables]
        self._undo = ExitStack()
        try:
            self._undo.callback(self._conditioner.remove)
            self.rows = self._conditioner.inject(rows)
            self._undo.callback(MemoryEfficientLayers(base.unet).remove)
            self._change_unet(base)
        except BaseException:
            self.remove()
            raise

    def _replace(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, module)

    @abstractmethod
    def _change_unet(self, base: BaseModel) -> None:
        """Put the trainable layers into the UNet, by ``_replace`` alone."""

    @abstractmethod
    def _trained_layers(self) -> Sequence[_StackedLinear] | Sequence[LoRALinear]:
        """The layers that ``_change_unet`` has put in."""

    @abstractmethod
    def unet_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that change the UNet, by their names in checkpoints."""

    @abstractmethod
    def export_state(self) -> tuple[dict[str, Tensor], dict[str, LowRankDelta]]:
        """Copy the UNet's changes, dense ones and low-rank ones, as fp16 tensors on the CPU.

        Keys are the layers' original (LDM) names. The changes are in the units of the matrices that they are added
        to: no alpha or strength is left to apply. One of the two is empty.
        """

    @abstractmethod
    def _load_deltas(self, weights: FarWeights) -> None:
        """Copy the UNet's changes of ``weights``. Raises WeightsError where they are of another kind or rank."""

    @abstractmethod
    def prepared_for(self, context: Tensor) -> AbstractContextManager[None]:
        """Do once what all layers need for the text ``context`` [B, length, width].

        Enter it around UNet passes that read this text and around their backward passes. Outside of it, as when
        sample images are drawn, each layer does the work for itself.
        """

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the UNet computes as if it had no adapter. Placeholder tokens keep their embeddings."""
        layers = self._trained_layers()
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def start_from(self, weights: FarWeights) -> None:
        """Continue from earlier weights. Placeholder tokens that they lack keep their initial rows.

        They must have passed :func:`check_start`.
        """
        self._load_deltas(weights)
        known = [name.token for name in self._vocabulary.names]
        if left := [token for token in weights.embeddings if token not in known]:
            log.warning("The weights to continue from also know %s, which the dataset lacks.", ", ".join(left))
        for token in weights.embeddings.keys() & set(known):
            own = self._vocabulary.rows(token)
            for encoder, rows in zip(weights.encoders, self.rows, strict=True):
                rows.detach()[own.start : own.stop] = weights.embeddings[token][encoder].to(rows)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by their names in checkpoints."""
        rows = {f"rows{i or ''}": rows for i, rows in enumerate(self.rows)}
        return {**rows, **self.unet_parameters()}

    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter; zeros where no sample used it: regularization images have no token."""
        for parameter in self.named_parameters().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.named_parameters().values()]

    def optimizer(self, config: AdapterSettings, samples_per_step: int) -> torch.optim.Optimizer:
        """AdamW over all parameters. The UNet's learning rate is per sample of a step; embeddings don't decay.

        The rate grows linearly with the samples, as in Custom Diffusion's script. It was measured at four to eight
        samples a step. For far larger steps scale it by the square root, as is usual with Adam, and set it by hand.
        """
        unet_lr = config.change_lr * samples_per_step
        optimizer = torch.optim.AdamW(
            [
                {"params": self.rows, "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": list(self.unet_parameters().values()), "lr": unet_lr, "weight_decay": config.weight_decay},
            ],
            fused=self.rows[0].device.type in ("cuda", "cpu"),  # one launch, and it can skip a step without the host
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    @torch.no_grad()
    def cap_norms(self) -> None:
        """Scale embedding rows down to the norm of their class noun. Rows within rounding of it stay as they are."""
        for rows, limits in zip(self.rows, self._norm_limits):
            excess = rows.norm(dim=1, keepdim=True) / limits
            rows.div_(torch.where(excess > 1 + 1e-6, excess, 1))

    def remove(self) -> None:
        """Leave the base as it was found."""
        self._undo.close()


def inject_adapter(base: BaseModel, vocabulary: Vocabulary, config: AdapterSettings) -> Adapter:
    """Inject the kind of adapter that ``config.trainable`` names into ``base``."""
    if config.trainable == "kv":
        return CrossAttentionKV(base, vocabulary)
    return LoRAAttention(base, vocabulary, config.lora_rank, config.train_seed)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, decay: float) -> None:
    """Set each group's learning rate for ``step``, counted from 0: constant, then a linear decay to 0.

    ``decay`` is the share of ``steps`` at the end over which the rate falls.
    """
    factor = min(max(steps - step, 0) / (decay * steps), 1.0) if decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class StackedProjections:
    """The matrices of several linear layers that read the same input, stacked into one and trained as W + Δ.

    ``delta`` [rows, width] is the learned Δ of the stacked frozen ``weight`` W. It stays in fp32 and is multiplied
    on its own, W x + Δ x: added to a bf16 W, most of its updates would be rounded away. ``layers`` stand in for the
    linear layers, in their order.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.delta = nn.Parameter(torch.zeros_like(self.weight, dtype=torch.float32))
        ends = list(itertools.accumulate(self.sizes))
        self.layers = [_StackedLinear(self, slice(end - size, end)) for end, size in zip(ends, self.sizes)]

    @contextmanager
    def prepared_for(self, context: Tensor) -> Iterator[None]:
        """Project ``context`` [B, length, width] for all layers in one product.

        The backward pass belongs in here too: a checkpointed layer runs again then and must find the same.
        """
        projected = F.linear(context, self.weight) + F.linear(context, self.delta.to(context.dtype))
        for layer, part in zip(self.layers, projected.split(self.sizes, -1)):
            layer.projected = part
        try:
            yield
        finally:
            for layer in self.layers:
                layer.projected = None


class _StackedLinear(nn.Module):
    """One layer of a stack, which owns ``rows`` of its matrix."""

    def __init__(self, stack: StackedProjections, rows: slice):
        super().__init__()
        self.stack, self.rows = stack, rows
        self.projected: Tensor | None = None  # within prepared_for
        self.enabled = True

    def forward(self, context: Tensor) -> Tensor:
        """[B, length, width] → [B, length, channels]."""
        if self.projected is not None:
            return self.projected
        projected = F.linear(context, self.stack.weight[self.rows])
        if not self.enabled:
            return projected
        return projected + F.linear(context, self.stack.delta[self.rows].to(context.dtype))


class CrossAttentionKV(Adapter):
    """Dense deltas of all cross-attention K and V, as in Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488)."""

    def _change_unet(self, base: BaseModel) -> None:
        layers = kv_layers(base.unet)
        self._names = list(layers)
        self._stack = StackedProjections([getattr(owner, part) for owner, part in layers.values()])
        for (owner, part), layer in zip(layers.values(), self._stack.layers):
            self._replace(owner, part, layer)

    def _trained_layers(self) -> Sequence[_StackedLinear]:
        return self._stack.layers

    @property
    def deltas(self) -> dict[str, Tensor]:
        """The change [channels, context width] of each matrix by layer name: views of one parameter."""
        return dict(zip(self._names, self._stack.delta.detach().split(self._stack.sizes)))

    def unet_parameters(self) -> dict[str, nn.Parameter]:
        return {"kv": self._stack.delta}

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, LowRankDelta]]:
        return {name: delta.to("cpu", torch.float16) for name, delta in self.deltas.items()}, {}

    def _load_deltas(self, weights: FarWeights) -> None:
        for name, delta in self.deltas.items():
            delta.copy_(weights.deltas[name])

    def prepared_for(self, context: Tensor) -> AbstractContextManager[None]:
        return self._stack.prepared_for(context)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank change beside it: W x + B A x (Hu et al. 2021, arXiv 2106.09685).

    ``up`` is B [out, rank] and ``down`` is A [rank, in], both fp32. There is no alpha: the product is not scaled.
    """

    def __init__(self, base_layer: nn.Linear, up: Tensor, down: Tensor):
        super().__init__()
        self.base_layer, self.up, self.down = base_layer, up, down
        self.cast: tuple[Tensor, Tensor] | None = None  # up and down in the dtype of the pass, within prepared_for
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, in] → [B, n, out]."""
        if not self.enabled:
            return self.base_layer(x)
        up, down = self.cast or (self.up.to(x.dtype), self.down.to(x.dtype))
        return self.base_layer(x) + F.linear(F.linear(x, down), up)


class LoRAAttention(Adapter):
    """LoRA on every projection of self- and cross-attention, as in DreamBooth-LoRA trainings.

    All factors are views of one flat parameter, so that one cast and one gradient serve the whole UNet. A is random
    and B is 0 at first: training starts from the unchanged base.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary, rank: int, seed: int):
        self.rank, self._seed = rank, seed
        super().__init__(base, vocabulary)

    def _change_unet(self, base: BaseModel) -> None:
        projections = attention_projections(base.unet)
        linears = {name: getattr(owner, part) for name, (owner, part) in projections.items()}
        self._matrix_shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self._flat = nn.Parameter(self._initial_factors().to(base.device))
        self.layers: dict[str, LoRALinear] = {}
        for name, (up, down) in self._split(self._flat.detach()).items():
            self.layers[name] = LoRALinear(linears[name], up, down)
            owner, part = projections[name]
            self._replace(owner, part, self.layers[name])

    def _initial_factors(self) -> Tensor:
        """The flat parameter at the start: B is 0, A is normal with a standard deviation of 1 / rank, by the seed."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "low rank", 0))
        factors = []
        for out_features, in_features in self._matrix_shapes.values():
            up = torch.zeros(out_features, self.rank)
            down = torch.randn(self.rank, in_features, generator=generator) / self.rank
            factors += [up.flatten(), down.flatten()]
        return torch.cat(factors)

    def _split(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views of the flat parameter by layer name: up [out, rank] and down [rank, in]."""
        sizes = [self.rank * features for shape in self._matrix_shapes.values() for features in shape]
        parts = flat.split(sizes)
        return {
            name: (up.view(-1, self.rank), down.view(self.rank, -1))
            for name, up, down in zip(self._matrix_shapes, parts[::2], parts[1::2])
        }

    def _trained_layers(self) -> Sequence[LoRALinear]:
        return list(self.layers.values())

    def unet_parameters(self) -> dict[str, nn.Parameter]:
        return {"low_rank": self._flat}

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, LowRankDelta]]:
        return {}, {
            name: LowRankDelta(layer.up.to("cpu", torch.float16), layer.down.to("cpu", torch.float16))
            for name, layer in self.layers.items()
        }

    def _load_deltas(self, weights: FarWeights) -> None:
        for name, layer in self.layers.items():
            layer.up.copy_(weights.low_rank_deltas[name].up)
            layer.down.copy_(weights.low_rank_deltas[name].down)

    @contextmanager
    def prepared_for(self, context: Tensor) -> Iterator[None]:
        """Cast all factors to the dtype of ``context`` at once."""
        for name, factors in self._split(self._flat.to(context.dtype)).items():
            self.layers[name].cast = factors
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.cast = None


def check_start(weights: FarWeights, config: AdapterSettings, tokens: Collection[str]) -> None:
    """Refuse weights to continue from that have another kind of adapter, LoRA rank or number of vectors per token.

    ``tokens``: those of the dataset. Raises WeightsError.
    """
    kind = "lora" if weights.low_rank_deltas else "kv"
    ranks = {delta.rank for delta in weights.low_rank_deltas.values()}
    if kind != config.trainable:
        raise WeightsError(f"continue_from: these weights were trained with trainable {kind}; set it to {kind}")
    if ranks and ranks != {config.lora_rank}:
        raise WeightsError(f"continue_from: these weights have rank {max(ranks)}; set lora_rank to {max(ranks)}")
    vectors, shared = weights.vectors, [token for token in weights.embeddings if token in tokens]
    if shared and vectors != config.vectors_per_token:
        raise WeightsError(
            f"continue_from: {shared[0]} has {vectors} vectors there; set vectors_per_token to {vectors}"
        )
