"""Count operations, FLOPs, bytes saved for the backward pass and host waits, independent of the machine.

A computation is counted while it runs, on real tensors or on PyTorch's fake ones (shapes without values). With those,
Stable Diffusion 2.1 is counted at any size in seconds, without the memory for its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten

# Operations that launch no kernel: they allocate memory or create views.
_FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "aten::is_same_size", "aten::_reshape_alias",
}  # fmt: skip
# Operations whose result the host waits for.
_WAITS = {
    "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop(grad, q, k, v)
    ),
}


@dataclass
class Counts:
    """Counts of a computation: operations by name, FLOPs, bytes saved for the backward pass, host waits by name."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    saved_bytes: int = 0

    @property
    def kernels(self) -> int:
        """Operations that launch work. A fused or multi-tensor operation counts as one, as on a GPU."""
        return self.operations.total()

    def to_dict(self) -> dict[str, int]:
        return {
            "kernels": self.kernels,
            "host_waits": self.waits.total(),
            "flops": self.flops,
            "saved_bytes": self.saved_bytes,
        }


@contextmanager
def counting(constants: Iterable[Tensor] = (), on_host: Iterable[Tensor] = ()) -> Iterator[Counts]:
    """Count everything that runs in this context.

    ``constants`` (weights) don't count as saved for the backward pass. All tensors are assumed to be on the device,
    except for those in ``on_host``, which are read without a wait. Fake tensors read as 1.
    """
    counts = Counts()
    known = {_storage(t) for t in constants}
    kept = []  # an address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in known:
            known.add(storage)
            kept.append(tensor)
            counts.saved_bytes += tensor.untyped_storage().nbytes()
        return tensor

    flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with (
        flops,
        _OperationCounter(counts, {_storage(t) for t in on_host}),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield counts
    counts.flops = flops.get_total_flops()


class _OperationCounter(TorchDispatchMode):
    def __init__(self, counts: Counts, on_host: set[int]):
        super().__init__()
        self.counts, self.on_host = counts, on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            if _storage(args[0]) not in self.on_host:
                self.counts.waits[name] += 1
            return 1.0 if isinstance(args[0], FakeTensor) else func(*args, **(kwargs or {}))
        if not func.is_view and name not in _FREE and name.startswith("aten::"):
            self.counts.operations[name] += 1
        if name in _WAITS or (name in _INDEXING and any(_is_mask(i) for i in args[1])):
            self.counts.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
