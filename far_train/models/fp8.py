"""A frozen UNet in 8 bits (float8_e4m3fn), half of what its weights take in bf16.

kohya's ``fp8_base`` casts the weights as they are. Here every matrix has a scale of its own. It is multiplied out where
it is used, in the forward pass and again in the backward pass, so that no copy of it is kept. Sums, biases, norms and
what is trained stay in the precision of the pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import ConfigError

FP8 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa (Micikevicius et al. 2022, arXiv 2209.05433)
# A few small layers stay as they are: how noise goes in and comes out, and what tells the UNet time and size.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


class Fp8Layers:
    """Replaces the linear layers and convolutions of a UNet's blocks by ones that hold their weights in 8 bits.

    The new weights lie on ``device``, layer by layer, so that it never holds the old ones. Raises ConfigError for
    devices without fp8.
    """

    def __init__(self, unet: nn.Module, device: torch.device):
        try:
            torch.zeros(1, device=device).to(FP8)
        except (TypeError, RuntimeError) as e:
            raise ConfigError(
                f"fp8_base: {device} has no fp8 ({str(e).splitlines()[0]}); switch it off or use another device"
            ) from e
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for name, layer in list(unet.named_modules()):
                if name.startswith(BLOCKS) and type(layer) in _REPLACEMENTS:
                    owner, _, part = name.rpartition(".")
                    parent = unet.get_submodule(owner)
                    setattr(parent, part, _REPLACEMENTS[type(layer)](layer, device))
                    self._replaced.append((parent, part, layer))
        except BaseException:  # of memory, most likely
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the UNet as it was found."""
        for parent, name, layer in self._replaced:
            setattr(parent, name, layer)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor in fp8, as bytes, and its scale [], by which they are to be multiplied.

    The largest value is brought to the upper end of fp8's range, 448. The scale is a power of two: to multiply by it
    rounds nothing, so a value's error is the 1/16 at most of rounding to fp8, or 2^-10 scales for the smallest ones.
    """
    largest = weight.float().abs().amax().clamp(min=1e-4)
    mantissa, exponent = torch.frexp(largest / torch.finfo(FP8).max)  # the mantissa from 0.5 on
    scale = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    return (weight.float() / scale).to(FP8).view(torch.uint8), scale


def dequantise(content: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that :func:`quantise` made bytes and a scale of."""
    return content.view(FP8).to(dtype) * scale.to(dtype)


class _Fp8Layer(nn.Module):
    """Holds what the layer that it replaces had. As bytes, since moving a module to a dtype casts all floats in it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, device: torch.device):
        super().__init__()
        content, scale = quantise(layer.weight.detach().to(device))
        self.register_buffer("content", content)
        self.register_buffer("scale", scale)
        self.bias = layer.bias


class _Fp8Linear(_Fp8Layer):
    def __init__(self, layer: nn.Linear, device: torch.device):
        super().__init__(layer, device)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return _Fp8LinearFunction.apply(x, self.content, self.scale, self.bias)


class _Fp8Conv2d(_Fp8Layer):
    def __init__(self, layer: nn.Conv2d, device: torch.device):
        super().__init__(layer, device)
        self.options = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] → [B, out, h, w]."""
        return _Fp8Conv2dFunction.apply(x, self.content, self.scale, self.bias, self.options)


class _Fp8LinearFunction(torch.autograd.Function):
    """A linear layer that saves 8 bits of each weight for the backward pass, and no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, content: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(content, scale)
        return F.linear(x, dequantise(content, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ dequantise(*ctx.saved_tensors, grad.dtype), None, None, None


class _Fp8Conv2dFunction(torch.autograd.Function):
    """The same for a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, content: Tensor, scale: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        ctx.save_for_backward(content, scale)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, dequantise(content, scale, x.dtype), bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantise(*ctx.saved_tensors, grad.dtype)
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.options), None, None, None, None


_REPLACEMENTS = {nn.Linear: _Fp8Linear, nn.Conv2d: _Fp8Conv2d}
