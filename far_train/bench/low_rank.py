"""DreamBooth-LoRA as a rival: low-rank changes of all attention projections, learned by the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone import BaseModel
from ..config import TrainConfig
from ..files import write_tensors
from ..recipe import TrainingRun
from ..tokens import Vocabulary
from ..trainable import Trainables
from ..weights import FarWeights

RANK = 8
PARTS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """A projection beside which a low-rank change is learned: W x + B A x (Hu et al. 2021, arXiv 2106.09685).

    A [rank, in] begins at random, B [out, rank] at 0, so that nothing changes at first.
    """

    def __init__(self, inner: nn.Module, linear: nn.Linear, rank: int, choices: torch.Generator):
        super().__init__()
        self.inner = inner
        down = torch.randn(rank, linear.in_features, generator=choices) / rank
        self.down = nn.Parameter(down.to(linear.weight.device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    @property
    def change(self) -> Tensor:
        """What is added to the matrix, [out, in]."""
        return self.up.detach() @ self.down.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class LowRankTrainables(Trainables):
    """Modifier embeddings and low-rank changes of every attention projection, K and V among them."""

    def __init__(self, base: BaseModel, vocabulary: Vocabulary):
        linears = attention_projections(base.unet)
        super().__init__(base, vocabulary)
        self._bank.delta.requires_grad_(False)
        choices = torch.Generator().manual_seed(0)
        self.low_rank: dict[str, LowRank] = {}
        for name, linear in linears.items():
            layer, part = _owner(base.unet, name)
            self.low_rank[name] = LowRank(getattr(layer, part), linear, RANK, choices)
            setattr(layer, part, self.low_rank[name])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        learned = {f"{name}.{side}": getattr(m, side) for name, m in self.low_rank.items() for side in ("down", "up")}
        return {"rows": self.rows, **learned}

    def optimizer(self, config: TrainConfig, samples_per_step: int) -> torch.optim.Optimizer:
        """AdamW; ``config.kv_lr`` is the rate of the low-rank changes, per sample of the step as for K and V."""
        rows, *low_rank = self.named_parameters().values()
        lr = config.kv_lr * samples_per_step
        return torch.optim.AdamW(
            [
                {"params": [rows], "lr": config.embedding_lr, "weight_decay": 0.0},
                {"params": low_rank, "lr": lr, "weight_decay": config.weight_decay},
            ],
            fused=rows.device.type in ("cuda", "cpu"),
        )

    def remove(self) -> None:
        for name, module in self.low_rank.items():
            setattr(*_owner(self._base.unet, name), module.inner)
        super().remove()


@dataclass(frozen=True)
class LowRankWeights:
    """``embeddings`` as FaR weights without deltas; ``changes`` [out, in] by the projection's name in the UNet."""

    embeddings: FarWeights
    changes: Mapping[str, Tensor]

    @torch.no_grad()
    def apply(self, base: BaseModel) -> Vocabulary:
        """Put the weights into ``base`` for good and return the vocabulary for its prompts."""
        for name, linear in attention_projections(base.unet).items():
            linear.weight = nn.Parameter(linear.weight + self.changes[name].to(linear.weight), requires_grad=False)
        return self.embeddings.apply(base)


class LowRankRun(TrainingRun):
    """The recipe with other trainables; writes ``low-rank.safetensors`` beside the weights file."""

    trainables_type = LowRankTrainables

    def save_weights(self) -> LowRankWeights:
        changes = {name: module.change.cpu() for name, module in self.trainables.low_rank.items()}
        write_tensors(self.folder / "low-rank.safetensors", changes, {"format": "pt"})
        return LowRankWeights(super().save_weights(), changes)


def attention_projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """Q, K, V and output of all self- and cross-attention, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{part}" for part in PARTS))
    }


def _owner(unet: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the module ``name``, and what it calls it."""
    parent, _, last = name.rpartition(".")
    return unet.get_submodule(parent), last
