"""What is trained: placeholder tokens and changes of the attention, as fp32 parameters beside a frozen base."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.config import TrainConfig
from ..utils.seeding import derive_seed
from .base import BaseModel
from .conditioning import TextConditioner
from .layers import attention_projections, kv_layers
from .tokens import Vocabulary, initial_rows, norm_limits
from .weights import FarWeights, Product


class Trainables:
    """The learning parameters, put into a base and taken out again; its own weights are never written.

    ``rows``, [concepts × vectors, width] for each text encoder, are the placeholder tokens' embeddings. What changes
    the UNet is a subclass's: see :func:`put_trainables`.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        from .memory_efficient import FrozenLayers  # loads diffusers, which takes seconds

        self._conditioner = TextConditioner(base)
        tables = self._conditioner.tables
        self._limits = [norm_limits(table, vocabulary) for table in tables]
        self.rows = self._conditioner.inject([initial_rows(table, vocabulary) for table in tables])
        self._frozen = FrozenLayers(base.unet)
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def _replace(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, module)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What changes the UNet, by name."""
        raise NotImplementedError

    def learned(self) -> tuple[dict[str, Tensor], dict[str, Product]]:
        """Changes of matrices by original (LDM) layer name, whole ones and low-rank ones, in fp16 on the CPU."""
        raise NotImplementedError

    def start_from(self, weights: FarWeights) -> None:
        """Take over the UNet's changes of earlier weights. Raises WeightsError where they are of another kind."""
        raise NotImplementedError

    def projecting(self, context: Tensor) -> AbstractContextManager[None]:
        """To be entered for the passes of the UNet that read the text ``context`` [B, length, width], and their
        backward passes."""
        raise NotImplementedError

    def named_parameters(self) -> dict[str, nn.Parameter]:
        rows = {f"rows{i or ''}": rows for i, rows in enumerate(self.rows)}
        return {**rows, **self.parameters()}

    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter; zeros where samples left it out, as class pictures do the modifiers."""
        for parameter in self.named_parameters().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.named_parameters().values()]

    def optimizer(self, config: TrainConfig, samples_per_step: int) -> torch.optim.Optimizer:
        """AdamW over all; the UNet's changes learn at a rate per sample of the whole step, embeddings don't decay.

        Linear in the samples, after Custom Diffusion's script; measured rates are of steps of four to eight samples.
        Far beyond them the square root that is usual with Adam is the safer rule: set the rate by hand.
        """
        changes, lr = list(self.parameters().values()), config.change_lr * samples_per_step
        optimizer = torch.optim.AdamW(
            [
                {"params": self.rows, "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": changes, "lr": lr, "weight_decay": config.weight_decay},
            ],
            fused=self.rows[0].device.type in ("cuda", "cpu"),  # one launch, and it can skip a step without the host
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    @torch.no_grad()
    def cap_norms(self) -> None:
        """Scale embeddings down to their class noun's norm; those at it already, but for rounding, stay."""
        for rows, limits in zip(self.rows, self._limits):
            excess = rows.norm(dim=1, keepdim=True) / limits
            rows.div_(torch.where(excess > 1 + 1e-6, excess, 1))

    def remove(self) -> None:
        """Leave the base as it was found."""
        self._frozen.remove()
        self._conditioner.remove()
        for owner, name, module in self._replaced:
            setattr(owner, name, module)


def put_trainables(base: BaseModel, vocabulary: Vocabulary, config: TrainConfig) -> Trainables:
    """Put into ``base`` what ``config.trainable`` says."""
    if config.trainable == "kv":
        return KeysAndValues(base, vocabulary)
    return LowRankAttention(base, vocabulary, config.low_rank, config.train_seed)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, decay: float) -> None:
    """Give each group its rate for step number ``step`` (from 0): its first one, which falls linearly to 0 over the
    last ``decay`` × ``steps``."""
    share = min(max(steps - step, 0) / (decay * steps), 1.0) if decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


class ProjectionBank:
    """All cross-attention K and V matrices of a UNet as one, since they all read the same text.

    ``delta`` [rows, width] is the learned change of the stacked frozen matrices: W x + Δ x. It stays in fp32 and has a
    product of its own: added to a bf16 W, most of its updates would be rounded away. Within ``projecting(context)``
    one product serves all layers; elsewhere, as when pictures are sampled, each layer projects for itself.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.delta = nn.Parameter(torch.zeros_like(self.weight, dtype=torch.float32))
        ends = list(itertools.accumulate(self.sizes))
        self.layers = [_BankedLinear(self, slice(end - size, end)) for end, size in zip(ends, self.sizes)]

    @contextmanager
    def projecting(self, context: Tensor) -> Iterator[None]:
        """Project ``context`` [B, length, width], the text of all passes of the UNet in here, for all layers at once.

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


class _BankedLinear(nn.Module):
    """Stands in a layer's ``to_k`` or ``to_v`` while it is trained; ``rows`` of the bank are its own."""

    def __init__(self, bank: ProjectionBank, rows: slice):
        super().__init__()
        self.bank, self.rows = bank, rows
        self.projected: Tensor | None = None

    def forward(self, context: Tensor) -> Tensor:
        """[B, length, width] → [B, length, channels]."""
        if self.projected is not None:
            return self.projected
        weight, delta = self.bank.weight[self.rows], self.bank.delta[self.rows]
        return F.linear(context, weight) + F.linear(context, delta.to(context.dtype))


class KeysAndValues(Trainables):
    """Whole changes of all cross-attention K and V, as Custom Diffusion has them (arXiv 2212.04488)."""

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        super().__init__(base, vocabulary)
        layers = kv_layers(base.unet)
        self._names = list(layers)
        self._bank = ProjectionBank([getattr(layer, part) for layer, part in layers.values()])
        for (layer, part), banked in zip(layers.values(), self._bank.layers):
            self._replace(layer, part, banked)

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """The changes by layer name, views of one flat parameter."""
        return dict(zip(self._names, self._bank.delta.detach().split(self._bank.sizes)))

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"kv": self._bank.delta}

    def learned(self) -> tuple[dict[str, Tensor], dict[str, Product]]:
        return {name: delta.to("cpu", torch.float16) for name, delta in self.deltas.items()}, {}

    def start_from(self, weights: FarWeights) -> None:
        weights.check_kind("kv")
        for name, delta in self.deltas.items():
            delta.copy_(weights.deltas[name])

    def projecting(self, context: Tensor) -> AbstractContextManager[None]:
        return self._bank.projecting(context)


class LowRank(nn.Module):
    """A frozen projection with a low-rank change beside it: W x + B A x (Hu et al. 2021, arXiv 2106.09685).

    ``up`` is B [out, rank] and ``down`` A [rank, in], fp32; ``cast``: both in the dtype of a pass that is under way.
    """

    def __init__(self, inner: nn.Linear, up: Tensor, down: Tensor):
        super().__init__()
        self.inner, self.up, self.down = inner, up, down
        self.cast: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, in] → [B, n, out]."""
        up, down = self.cast or (self.up.to(x.dtype), self.down.to(x.dtype))
        return self.inner(x) + F.linear(F.linear(x, down), up)


class LowRankAttention(Trainables):
    """Low-rank changes of every attention projection, self-attention's too, as DreamBooth-LoRA has them.

    All are parts of one flat parameter, so that one cast and one gradient serve the whole UNet. Every A begins at
    random, by ``seed``, every B at 0: nothing changes at first.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary, rank: int, seed: int = 0):
        super().__init__(base, vocabulary)
        self.rank = rank
        choices = torch.Generator().manual_seed(derive_seed(seed, "low rank", 0))
        found = attention_projections(base.unet)
        linears = {name: getattr(owner, part) for name, (owner, part) in found.items()}
        first = []
        for linear in linears.values():
            first.append(torch.zeros(linear.out_features, rank))
            first.append(torch.randn(rank, linear.in_features, generator=choices) / rank)
        self._shapes = [part.shape for part in first]
        self._flat = nn.Parameter(torch.cat([part.flatten() for part in first]).to(base.device))
        self.layers: dict[str, LowRank] = {}
        halves = iter(self._halves(self._flat.detach()))
        for (name, linear), (owner, part) in zip(linears.items(), found.values()):
            self.layers[name] = LowRank(linear, next(halves), next(halves))
            self._replace(owner, part, self.layers[name])

    def _halves(self, flat: Tensor) -> list[Tensor]:
        """Up and down of all layers in turn, parts of ``flat``."""
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes)]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"low_rank": self._flat}

    def learned(self) -> tuple[dict[str, Tensor], dict[str, Product]]:
        def half(part: Tensor) -> Tensor:
            return part.to("cpu", torch.float16)

        return {}, {name: Product(half(layer.up), half(layer.down)) for name, layer in self.layers.items()}

    def start_from(self, weights: FarWeights) -> None:
        weights.check_kind("attention", self.rank)
        for name, layer in self.layers.items():
            layer.up.copy_(weights.products[name].up)
            layer.down.copy_(weights.products[name].down)

    @contextmanager
    def projecting(self, context: Tensor) -> Iterator[None]:
        halves = iter(self._halves(self._flat.to(context.dtype)))
        for layer in self.layers.values():
            layer.cast = next(halves), next(halves)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.cast = None
