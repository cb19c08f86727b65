"""3x3 convolutions by Winograd's F(4x4, 3x3): 36 products per 16 outputs where the definition takes 144.

Lavin & Gray 2015, "Fast algorithms for convolutional neural networks". In plain PyTorch, for CPUs and float32:
overlapping 6x6 tiles of the input and the 3x3 weights are mapped to 36 numbers each by fixed matrices, 36 matrix
products run over channels, and one more fixed matrix maps the sums to 4x4 tiles of the output. What makes it pay
without four times the memory for weights: they are transformed anew at each call, in blocks that stay in the cache,
from an order of memory in which a block is a plain matrix (`lay_out`). Features too large for the cache are taken in
bands, for which all transformed weights of that one layer are made at once. `keep_transforms` is for who has four
times the memory. GPUs have such algorithms in cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 4  # outputs per tile, along one side
WEIGHTS_IN_CACHE = 1_200_000  # numbers of transformed weights that are made at a time: 5 MB
TILES_IN_CACHE = 6_000_000  # numbers of transformed inputs and outputs that are worked on at a time: 24 MB
FEWEST_TILES = 128  # below, the matrix products are too flat to be fast
FEW_PIXELS = 160  # up to here, transforming the weights does not pay: one product with all patches is faster
FEWEST_CHANNELS = 96  # below, the transforms cost more than they save

# Rows are points 0, 1, -1, 2, -2, infinity of Lavin & Gray 2015, section 4.3 (matrices of F(4, 3)).
_INPUT = torch.tensor([
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
], dtype=torch.float64)  # fmt: skip
_WEIGHT = torch.tensor([
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
_OUTPUT = torch.tensor([
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
], dtype=torch.float64)  # fmt: skip
INPUT, WEIGHT, OUTPUT = (torch.kron(matrix, matrix).float() for matrix in (_INPUT, _WEIGHT, _OUTPUT))


class Convolution(nn.Conv2d):
    """A 3x3 convolution of stride 1, padded by 1: [B, C, H, W] -> [B, out, H, W], fast once it is laid out.

    Where its weight is laid out (see `lay_out`) and input and weight are float32 on the CPU, `convolve` is used, with a
    relative error of about 3e-6; otherwise, under autocast and by torch.compile, PyTorch's own convolution.

    Args:
        channels, out_channels: C and O.
        kernel_size, stride, padding, options: as of nn.Conv2d, for those who make another layer of this one's kind, as
            peft does; padding None is half of the kernel. With others than the defaults it is PyTorch's own one.

    Attributes:
        is_known: whether it is a 3x3 convolution of stride 1, padded by 1.
        keeps: whether the transformed weight is kept from the first call on, see `keep_transforms`.
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
        self.is_known = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        self.keeps = False
        self._kept: Tensor | None = None  # [36, C, O]

    def forward(self, x: Tensor) -> Tensor:
        plain = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and has_fast_layout(self.weight)
        if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        if self.keeps and not torch.is_grad_enabled() and x[:, 0].numel() > FEW_PIXELS:
            if self._kept is None:
                self._kept = _transform(_taps(self.weight))
            return _convolve(x, _taps(self.weight), self.bias, self._kept)
        return convolve(x, self.weight, self.bias)


def lay_out(module: nn.Module) -> nn.Module:
    """Reorder the memory of all convolution weights in a module for speed; names, shapes and values stay.

    A weight [O, C, 3, 3] of a `Convolution` that `fits` then lies in memory as [3, 3, C, O], all others in PyTorch's
    channels_last order, which both kinds of convolution keep from layer to layer. To be called when the module is on
    its device, and before an optimizer and averages are made, which keep the order they find. Returns the module.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            weight = convolution.weight
            if getattr(convolution, "is_known", False) and fits(weight):
                weight.data = weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            else:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return module


def keep_transforms(module: nn.Module) -> nn.Module:
    """Spend memory for time: each `Convolution` of a module keeps its transformed weight when it has made it.

    For laid out weights that stay what they are, outside training. Returns the module.
    """
    for convolution in module.modules():
        if isinstance(convolution, Convolution):
            convolution.keeps, convolution._kept = True, None
    return module


def fits(weight: Tensor) -> bool:
    """Whether a weight [O, C, 3, 3] is one that Winograd's algorithm makes faster."""
    return weight.is_cpu and weight.dtype == torch.float32 and min(weight.shape[:2]) >= FEWEST_CHANNELS


def has_fast_layout(weight: Tensor) -> bool:
    """Whether a weight [O, C, 3, 3] lies in memory as [3, 3, C, O]."""
    out, channels = weight.shape[:2]
    return weight.stride() == (1, out, 3 * channels * out, channels * out)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x [B, C, H, W] with weight [O, C, 3, 3], padded by 1: [B, O, H, W], channels last in memory.

    Differentiable once. float32 on the CPU; any order of memory is right, that of `lay_out` is fast.
    """
    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    """The convolution and its two gradients, which are a convolution and a product over tiles again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, _taps(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1).contiguous()  # [9, O, C]
            to_x = _convolve(gradient, turned, None)
        if ctx.needs_input_grad[1]:
            to_weight = _weight_gradient(x, gradient).unflatten(0, (3, 3)).permute(3, 2, 0, 1)  # [O, C, 3, 3]
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum((0, 2, 3))
        return to_x, to_weight, to_bias


def _taps(weight: Tensor) -> Tensor:
    """Weights [O, C, 3, 3] -> [9, C, O], which is how they lie in memory."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, whole: Tensor | None = None) -> Tensor:
    """x [B, C, H, W], weight [9, C, O] -> [B, O, H, W]; `whole` is the transformed weight [36, C, O] if it is kept."""
    (batch, channels, height, width), out = x.shape, weight.shape[2]
    x = x.permute(0, 2, 3, 1).contiguous()  # as it lies in memory, channels last
    if batch * height * width <= FEW_PIXELS:
        return _with_patches(x, weight, bias).permute(0, 3, 1, 2)
    result = x.new_empty(batch, *(TILE * tiles for tiles in _tiles(height, width)), out)
    bands = list(_bands(batch, *_tiles(height, width), channels + out))
    if whole is None and len(bands) > 1:
        whole = _transform(weight)
    for images, rows in bands:
        inputs = _transformed_inputs(x, images, rows)  # [36, N, C]
        if whole is not None:
            sums = torch.bmm(inputs, whole)  # [36, N, O]
        else:
            sums = inputs.new_empty(*inputs.shape[:2], out)
            for first, last in _blocks(channels, out):
                block = _transform(weight[:, first:last])
                sums.baddbmm_(inputs[:, :, first:last], block, beta=1 if first else 0)
        outputs = (OUTPUT @ sums.flatten(1)).view(TILE, TILE, *_shape(images, rows, width), out)
        outputs = outputs.permute(2, 3, 0, 4, 1, 5)  # [b, rows, 4, columns, 4, O]
        place = result[images, TILE * rows.start : TILE * rows.stop].view(outputs.shape)
        torch.add(outputs, bias, out=place) if bias is not None else place.copy_(outputs)
    return result[:, :height, :width].permute(0, 3, 1, 2)


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [9, C, O] of the weight, from x [B, C, H, W] and the gradient [B, O, H, W] of the result."""
    (batch, channels, height, width), out = x.shape, gradient.shape[1]
    tiles = _tiles(height, width)
    x = x.permute(0, 2, 3, 1).contiguous()
    missing = (0, 0, 0, TILE * tiles[1] - width, 0, TILE * tiles[0] - height)
    gradient = F.pad(gradient.permute(0, 2, 3, 1), missing).contiguous()  # [B, 4 rows, 4 columns, O]
    total = x.new_zeros(9, channels, out)
    for images, rows in _bands(batch, *tiles, channels + out):
        inputs = _transformed_inputs(x, images, rows)  # [36, N, C]
        part = gradient[images, TILE * rows.start : TILE * rows.stop]
        part = part.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(2, 4, 0, 1, 3, 5)  # [4, 4, b, r, c, O]
        sums = (OUTPUT.T @ part.reshape(16, -1)).view(36, -1, out)  # [36, N, O]
        for first, last in _blocks(channels, out):
            block = torch.bmm(inputs[:, :, first:last].transpose(1, 2), sums)  # [36, c, O]
            total[:, first:last] += (WEIGHT.T @ block.flatten(1)).view(9, last - first, out)
    return total


def _transform(weight: Tensor) -> Tensor:
    """Weights [9, C, O] -> [36, C, O]."""
    return (WEIGHT @ weight.flatten(1)).view(36, *weight.shape[1:])


def _transformed_inputs(x: Tensor, images: slice, rows: slice) -> Tensor:
    """Rows of tiles of some images of x [B, H, W, C] -> [36, N, C], N tiles."""
    height, width, channels = x.shape[1:]
    shape = _shape(images, rows, width)
    first, last = TILE * rows.start - 1, TILE * rows.stop + 1  # rows of pixels, one more than outputs at each end
    some = x[images, max(first, 0) : min(last, height)]
    beyond = 1, TILE * shape[2] - width + 1, max(-first, 0), max(last - height, 0)  # left, right, above, below
    padded = F.pad(some, (0, 0, *beyond))  # zeros
    to_image, to_row, to_column, _ = padded.stride()
    strides = (to_row, to_column, to_image, TILE * to_row, TILE * to_column, 1)
    overlapping = padded.as_strided((6, 6, *shape, channels), strides)  # [6, 6, b, rows, columns, C]
    return (INPUT @ overlapping.reshape(36, -1)).view(36, -1, channels)


def _with_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, H, W, C], weight [9, C, O] -> [B, H, W, O], by one matrix product."""
    batch, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    to_image, to_row, to_column, _ = padded.stride()
    strides = (to_image, to_row, to_column, to_row, to_column, 1)
    patches = padded.as_strided((batch, height, width, 3, 3, channels), strides).reshape(-1, 9 * channels)
    matrix = weight.flatten(0, 1)  # [9 C, O]
    result = patches @ matrix if bias is None else torch.addmm(bias, patches, matrix)
    return result.view(batch, height, width, -1)


def _tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return -(-height // TILE), -(-width // TILE)


def _shape(images: slice, rows: slice, width: int) -> tuple[int, int, int]:
    """Images, rows of tiles, columns of tiles."""
    return images.stop - images.start, rows.stop - rows.start, -(-width // TILE)


def _bands(batch: int, rows: int, columns: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """All tiles in parts that stay in the cache: slices of images and of rows of tiles."""
    most = max(FEWEST_TILES, TILES_IN_CACHE // (36 * channels))
    if batch * rows * columns <= most:
        yield slice(0, batch), slice(0, rows)
        return
    together, height = max(1, most // (rows * columns)), min(rows, max(1, most // columns))
    for image in range(0, batch, together):
        for row in range(0, rows, height):
            yield slice(image, min(image + together, batch)), slice(row, min(row + height, rows))


def _blocks(channels: int, out: int) -> Iterator[tuple[int, int]]:
    """Ranges of input channels whose transformed weights stay in the cache."""
    most = max(16, WEIGHTS_IN_CACHE // (36 * out) // 16 * 16)
    for first in range(0, channels, most):
        yield first, min(first + most, channels)
