"""What is trained: modifier embeddings and the cross-attention K/V, as fp32 parameters beside a frozen base."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import BaseModel, kv_layers
from .config import TrainConfig
from .tokens import ModifierEmbedding, Vocabulary, initial_rows, norm_limits


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


class Trainables:
    """The learning parameters, put into a base and taken out again.

    ``rows`` [concepts × vectors, width] are the modifier embeddings, ``deltas`` the K/V changes by layer name, views of
    one flat parameter. The base's own weights are never written.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        from .frozen import FrozenLayers  # loads diffusers, which takes seconds

        self._base = base
        table = base.text_encoder.get_input_embeddings()
        self._limits = norm_limits(table.weight, vocabulary)
        self._embedding = ModifierEmbedding(table, initial_rows(table.weight, vocabulary))
        base.text_encoder.set_input_embeddings(self._embedding)
        self._layers = {
            name: (layer, part, getattr(layer, part)) for name, (layer, part) in kv_layers(base.unet).items()
        }
        self._bank = ProjectionBank([linear for _, _, linear in self._layers.values()])
        self.projecting = self._bank.projecting
        self._frozen = FrozenLayers(base.unet)
        for (layer, part, _), banked in zip(self._layers.values(), self._bank.layers):
            setattr(layer, part, banked)

    @property
    def rows(self) -> nn.Parameter:
        return self._embedding.rows

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        return dict(zip(self._layers, self._bank.delta.detach().split(self._bank.sizes)))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"rows": self.rows, "kv": self._bank.delta}

    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter; zeros where samples left it out, as class pictures do the modifiers."""
        for parameter in self.named_parameters().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.named_parameters().values()]

    def optimizer(self, config: TrainConfig, samples_per_step: int) -> torch.optim.Optimizer:
        """AdamW over both parameters; K/V learn at a rate per sample of the whole step, embeddings don't decay."""
        kv_lr = config.kv_lr * samples_per_step
        return torch.optim.AdamW(
            [
                {"params": [self.rows], "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": [self._bank.delta], "lr": kv_lr, "weight_decay": config.weight_decay},
            ],
            fused=self.rows.device.type in ("cuda", "cpu"),  # one launch, and it can skip a step without the host
        )

    @torch.no_grad()
    def cap_norms(self) -> None:
        """Scale modifier rows down to their class noun's norm; rows at it already, but for rounding, stay."""
        excess = self.rows.norm(dim=1, keepdim=True) / self._limits
        self.rows.div_(torch.where(excess > 1 + 1e-6, excess, 1))

    def remove(self) -> None:
        """Leave the base as it was found."""
        self._frozen.remove()
        self._base.text_encoder.set_input_embeddings(self._embedding.table)
        for layer, part, linear in self._layers.values():
            setattr(layer, part, linear)
