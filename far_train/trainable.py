"""What is trained: modifier embeddings and the cross-attention K/V, as fp32 parameters beside a frozen base."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import BaseModel, kv_layers
from .config import TrainConfig
from .tokens import ModifierEmbedding, Vocabulary, initial_rows, norm_limits


class DeltaLinear(nn.Module):
    """A frozen linear layer plus a learned change of its weight: W x + Δ x.

    Δ stays in fp32 and has a product of its own: added to a bf16 W, most of its updates would be rounded away.
    """

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return self.base(x) + F.linear(x, self.delta.to(x.dtype))


class Trainables:
    """The learning parameters, put into a base and taken out again.

    ``rows`` [concepts × vectors, width] are the modifier embeddings, ``deltas`` the K/V changes by layer name.
    The base's own weights are never written.
    """

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        self._base = base
        table = base.text_encoder.get_input_embeddings()
        self._limits = norm_limits(table.weight, vocabulary)
        self._embedding = ModifierEmbedding(table, initial_rows(table.weight, vocabulary))
        base.text_encoder.set_input_embeddings(self._embedding)
        self._layers: dict[str, tuple[nn.Module, str, DeltaLinear]] = {}
        for name, (layer, part) in kv_layers(base.unet).items():
            trained = DeltaLinear(getattr(layer, part))
            setattr(layer, part, trained)
            self._layers[name] = (layer, part, trained)

    @property
    def rows(self) -> nn.Parameter:
        return self._embedding.rows

    @property
    def deltas(self) -> dict[str, nn.Parameter]:
        return {name: trained.delta for name, (_, _, trained) in self._layers.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"rows": self.rows, **self.deltas}

    def optimizer(self, config: TrainConfig, samples_per_step: int) -> torch.optim.Optimizer:
        """AdamW over all parameters; K/V learn at a rate per sample of the whole step, embeddings don't decay."""
        kv_lr = config.kv_lr * samples_per_step
        deltas = list(self.deltas.values())
        return torch.optim.AdamW(
            [
                {"params": [self.rows], "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": deltas, "lr": kv_lr, "weight_decay": config.weight_decay},
            ]
        )

    @torch.no_grad()
    def cap_norms(self) -> None:
        """Scale modifier rows down to their class noun's norm."""
        norms = self.rows.norm(dim=1, keepdim=True)
        self.rows.mul_((self._limits / norms.clamp(min=1e-8)).clamp(max=1))

    def remove(self) -> None:
        """Leave the base as it was found."""
        self._base.text_encoder.set_input_embeddings(self._embedding.table)
        for layer, part, trained in self._layers.values():
            setattr(layer, part, trained.base)
