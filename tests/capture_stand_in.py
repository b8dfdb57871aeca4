"""What stands in for a CUDA graph where there is no GPU: it runs the work again, and refuses what a graph can't do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from far_train.training.step_graph import Compute, Inputs

# The host waits for their result, or their result's shape depends on values.
HOST_READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
FACTORIES = {
    torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.empty,
    torch.eye, torch.rand, torch.randn, torch.randint, torch.randperm,
}  # fmt: skip


class NotCapturable(RuntimeError):
    """Work that a CUDA graph would refuse, or would repeat with stale values."""


class StandInGraph:
    """A :class:`far_train.training.step_graph.Capture` for the CPU.

    Capturing runs ``compute`` and notes every operation: its name, its host arguments, and the address of every tensor
    that was there before. A replay runs it again and must do exactly the same. ``captures`` and ``replays`` count.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, compute: Compute, inputs: Inputs) -> Callable[[], Tensor]:
        self.captures += 1
        compute(inputs)  # the warm-up
        output, captured = _trace(compute, inputs)

        def replay() -> Tensor:
            self.replays += 1
            new, trace = _trace(compute, inputs)
            for before, now in zip(captured, trace):
                if before != now:
                    raise NotCapturable(f"a replay differs from the capture: {before} became {now}")
            if len(captured) != len(trace):
                raise NotCapturable(f"a replay has {len(trace)} operations, the capture had {len(captured)}")
            output.copy_(new)
            return output

        return replay


def _trace(compute: Compute, inputs: Inputs) -> tuple[Tensor, list[str]]:
    tracer = _Tracer()
    with _RefuseFactories(), tracer:
        output = compute(inputs)
    return output, tracer.operations


class _RefuseFactories(TorchFunctionMode):
    """A tensor made without a device is made on the CPU, and its copy to the device can't be captured."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            raise NotCapturable(f"{func.__name__} makes a tensor of values of the host")
        if func in FACTORIES and kwargs.get("device") is None:
            raise NotCapturable(f"{func.__name__} without a device makes a tensor on the CPU")
        return func(*args, **kwargs)


class _Tracer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self._made: dict[int, Tensor] = {}  # kept alive, so that no address is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name in HOST_READS or (name in INDEXING and any(_is_mask(i) for i in args[1])):
            raise NotCapturable(f"{name} makes the host wait for values")
        described = [self._describe(value) for value in tree_flatten((args, kwargs or {}))[0]]
        self.operations.append(f"{name}({', '.join(described)})")
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self._made.setdefault(value.untyped_storage().data_ptr(), value)
        return result

    def _describe(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        address = value.untyped_storage().data_ptr()
        where = "new" if address in self._made else hex(address)
        return f"{tuple(value.shape)} {value.dtype} {where}"


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
