"""What is trained: modifier embeddings and the cross-attention K/V, as fp32 parameters beside a frozen base."""

from __future__ import annotations

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

    def __init__(self, layers: Sequence[nn.Linear]):
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.delta = nn.Parameter(torch.zeros_like(self.weight, dtype=torch.float32))
        self._projected: Sequence[Tensor] = ()

    @contextmanager
    def projecting(self, context: Tensor) -> Iterator[None]:
        """Project ``context`` [B, length, width], the text of all passes of the UNet in here, for all layers at once.

        The backward pass belongs in here too: a checkpointed layer runs again then and must find the same.
        """
        projected = F.linear(context, self.weight) + F.linear(context, self.delta.to(context.dtype))
        self._projected = projected.split(self.sizes, -1)
        try:
            yield
        finally:
            self._projected = ()

    def project(self, index: int, context: Tensor) -> Tensor:
        """The rows of layer ``index``: [B, length, width] → [B, length, channels]."""
        if self._projected:
            return self._projected[index]
        weight, delta = self.weight.split(self.sizes)[index], self.delta.split(self.sizes)[index]
        return F.linear(context, weight) + F.linear(context, delta.to(context.dtype))


class _BankedLinear(nn.Module):
    """Stands in a layer's ``to_k`` or ``to_v`` while it is trained."""

    def __init__(self, bank: ProjectionBank, index: int):
        super().__init__()
        self.bank, self.index = bank, index

    def forward(self, context: Tensor) -> Tensor:
        return self.bank.project(self.index, context)


class Trainables:
    """The learning parameters, put into a base and taken out again.

    ``rows`` [concepts × vectors, width] are the modifier embeddings, ``deltas`` the K/V changes by layer name, views of
    one flat parameter. The base's own weights are never written.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
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
        for i, (layer, part, _) in enumerate(self._layers.values()):
            setattr(layer, part, _BankedLinear(self._bank, i))

    @property
    def rows(self) -> nn.Parameter:
        return self._embedding.rows

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        return dict(zip(self._layers, self._bank.delta.detach().split(self._bank.sizes)))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"rows": self.rows, "kv": self._bank.delta}

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
        self._base.text_encoder.set_input_embeddings(self._embedding.table)
        for layer, part, linear in self._layers.values():
            setattr(layer, part, linear)
