"""3x3 convolutions by Winograd's F(4x4, 3x3): 36 products per 16 outputs instead of 144 (Lavin & Gray 2015).

It is written in plain PyTorch, for float32 on CPUs; on GPUs, cuDNN has such algorithms. The transformed weights, which
are four times as large, are not kept: each call makes them again, in blocks that stay in the cache. That is fast
because `lay_out` orders the memory so that a block of weights is a plain matrix. `keep_transforms` keeps them, for four
times the memory. `stipple_core.operators.winograd_tiles` has the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stipple_core.operators import winograd_tiles
from stipple_core.operators.winograd_tiles import convolve_taps

FEWEST_CHANNELS = 96  # below, the transforms cost more than they save


class Convolution(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1, [B, C, H, W] -> [B, O, H, W], fast after `lay_out`.

    It uses `convolve`, with a relative error of about 3e-6, if its weight is laid out and input and weight are float32
    on the CPU. Otherwise, and under autocast and torch.compile, it uses PyTorch's convolution.

    Args:
        channels, out_channels: C and O.
        kernel_size, stride, padding, options: as in nn.Conv2d; padding None is half of the kernel. With other values
            than the defaults the layer is PyTorch's convolution; peft, for one, makes layers of the same class.

    Attributes:
        is_3x3: whether it is a 3x3 convolution with stride 1 and padding 1.
        keeps_transform: whether the transformed weight is kept after the first call, see `keep_transforms`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        **options: Any,
    ):
        half = (kernel_size if isinstance(kernel_size, int) else kernel_size[0]) // 2
        super().__init__(channels, out_channels, kernel_size, stride, half if padding is None else padding, **options)
        self.is_3x3 = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        self.keeps_transform = False
        self._kept: Tensor | None = None  # [36, C, O]

    def forward(self, x: Tensor) -> Tensor:
        plain = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and has_fast_layout(self.weight)
        if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        if self.keeps_transform and not torch.is_grad_enabled() and x[:, 0].numel() > winograd_tiles.FEW_PIXELS:
            if self._kept is None:
                self._kept = winograd_tiles.transform(_taps(self.weight))
            return convolve_taps(x, _taps(self.weight), self.bias, self._kept)
        return convolve(x, self.weight, self.bias)


def lay_out(module: nn.Module) -> nn.Module:
    """Reorder the memory of all convolution weights in a module for speed, and return the module.

    Names, shapes and values stay the same. A weight [O, C, 3, 3] of a `Convolution` that `fits` is laid out in memory
    as [3, 3, C, O], all others as channels_last. Call it after moving the module to its device and before making an
    optimizer or an EMA, whose tensors take over the memory order.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            weight = convolution.weight
            if getattr(convolution, "is_3x3", False) and fits(weight):
                weight.data = weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            else:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return module


def keep_transforms(module: nn.Module) -> nn.Module:
    """Let each `Convolution` of a module keep its transformed weight after the first call, and return the module.

    This needs four times the memory of the weights. Use it only if the weights no longer change.
    """
    for convolution in module.modules():
        if isinstance(convolution, Convolution):
            convolution.keeps_transform, convolution._kept = True, None
    return module


def fits(weight: Tensor) -> bool:
    """Whether Winograd's algorithm is faster than PyTorch's for a weight [O, C, 3, 3]."""
    return weight.is_cpu and weight.dtype == torch.float32 and min(weight.shape[:2]) >= FEWEST_CHANNELS


def has_fast_layout(weight: Tensor) -> bool:
    """Whether a weight [O, C, 3, 3] is laid out in memory as [3, 3, C, O]."""
    out, channels = weight.shape[:2]
    return weight.stride() == (1, out, 3 * channels * out, channels * out)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x [B, C, H, W] with weight [O, C, 3, 3] and padding 1: [B, O, H, W], channels last in memory.

    Inputs are float32 on the CPU, in any memory order; that of `lay_out` is fast. The result is differentiable once.
    """
    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    """The convolution and its gradients: for the input another convolution, for the weight a product over tiles."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve_taps(x, _taps(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1).contiguous()  # [9, O, C]
            to_x = convolve_taps(gradient, turned, None)
        if ctx.needs_input_grad[1]:
            taps = winograd_tiles.weight_gradient(x, gradient)  # [9, C, O]
            to_weight = taps.unflatten(0, (3, 3)).permute(3, 2, 0, 1)  # [O, C, 3, 3]
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum((0, 2, 3))
        return to_x, to_weight, to_bias


def _taps(weight: Tensor) -> Tensor:
    """Weights [O, C, 3, 3] -> [9, C, O], the order in which `lay_out` stores them."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1)
