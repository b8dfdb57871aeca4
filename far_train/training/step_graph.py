"""A training step's forward and backward passes as CUDA graphs.

Eager, a step of Stable Diffusion 2.1 is ten thousand short kernels, and launching them from Python takes longer than a
fast card takes to run them. Captured once in a CUDA graph, all are launched by one call
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). The optimizer stays outside the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ..utils.errors import ConfigError
from ..utils.out_of_memory import empty_cache, out_of_memory, reason_of
from .settings import TrainConfig

log = logging.getLogger(__name__)

WARM_UP = 3  # eager passes before a capture: libraries choose kernels and set up their workspaces in them

Inputs = Mapping[str, Tensor]
Compute = Callable[[Inputs], Tensor]


class Capture(Protocol):
    """Records what ``compute`` does with ``inputs``; calling the result does it again and returns its output.

    The output and the inputs keep their addresses: new values are copied into the inputs before each replay.
    """

    def __call__(self, compute: Compute, inputs: Inputs) -> Callable[[], Tensor]: ...


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a process: cuBLAS keeps a workspace for every stream that it has worked on."""
    return torch.cuda.Stream(device)


def capture_cuda_graph(compute: Compute, inputs: Inputs) -> Callable[[], Tensor]:
    """A :class:`Capture` by a CUDA graph. ``compute`` also runs ``WARM_UP`` times before."""
    device = next(iter(inputs.values())).device
    with torch.cuda.device(device):
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute(inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        empty_cache()  # so that the graph's own pool doesn't come on top of what the warm-up has left cached
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a host's, may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = compute(inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@dataclass(eq=False)
class _Captured:
    inputs: dict[str, Tensor]
    replay: Callable[[], Tensor]


class GraphedPasses:
    """Calls ``compute`` through a captured graph, one for each combination of input shapes.

    ``compute(inputs)`` adds the gradient of its loss to ``parameters`` and returns a small tensor of figures. It must
    read nothing back to the host, and everything that changes from call to call must come in ``inputs``. Gradients are
    allocated here and keep their addresses: clear them with ``zero_grad(set_to_none=False)``.

    Where a capture fails for another reason than memory, a log line says why, and all calls run eagerly from then on.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        capture: Capture = capture_cuda_graph,
    ):
        self._compute, self._parameters, self._device, self._capture = compute, parameters, device, capture
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._eager = False

    def __call__(self, inputs: Inputs) -> Tensor:
        """The figures of ``compute`` for ``inputs``, on the CPU or on the device. Raises what ``compute`` raises."""
        if self._eager:
            return self._compute({name: tensor.to(self._device) for name, tensor in inputs.items()})
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self._captured:
            try:
                self._captured[key] = self._record(inputs)
            except RuntimeError as e:
                if out_of_memory(e):
                    raise
                self.release()
                self._eager = True
                log.warning("The step can't be captured in a CUDA graph (%s): it runs eagerly, slower.", reason_of(e))
                return self(inputs)
        captured = self._captured[key]
        for name, tensor in inputs.items():
            source = tensor if tensor.device.type == self._device.type else tensor.pin_memory()
            captured.inputs[name].copy_(source, non_blocking=True)
        return captured.replay().clone()

    def release(self) -> None:
        """Forget all graphs and give their memory back; the next calls capture anew."""
        self._captured.clear()
        empty_cache()

    def _record(self, inputs: Inputs) -> _Captured:
        """Capture with copies of ``inputs``. What it adds to the gradients is taken back."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        before = [parameter.grad.clone() for parameter in self._parameters]
        static = {name: tensor.to(self._device, copy=True) for name, tensor in inputs.items()}
        try:
            return _Captured(static, self._capture(self._compute, static))
        finally:
            for parameter, gradient in zip(self._parameters, before):
                parameter.grad.copy_(gradient)


def uses_cuda_graph(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run on ``device`` captures its steps. Raises ConfigError where it is asked to and can't."""
    if config.cuda_graph == "on" and device.type != "cuda":
        raise ConfigError(f"cuda_graph: on needs a CUDA device, and this run is on {device}; use auto or off")
    return config.cuda_graph != "off" and device.type == "cuda"
