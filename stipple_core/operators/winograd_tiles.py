"""Winograd's F(4x4, 3x3) on tiles (Lavin & Gray 2015, section 4): convolution and its gradient for the weight.

Overlapping 6x6 tiles of the input and the 3x3 weights are mapped to 36 numbers each by fixed matrices, 36 matrix
products run over channels, and one more fixed matrix maps the sums to 4x4 tiles of the output. Work is split so that
its data stay in the cache: transformed weights in blocks of input channels, and large features in bands of rows of
tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # outputs per tile, along one side
WEIGHTS_IN_CACHE = 1_200_000  # transformed weights computed at a time, 5 MB
TILES_IN_CACHE = 6_000_000  # transformed inputs and outputs at a time, 24 MB
FEWEST_TILES = 128  # fewer make the matrix products too flat to be fast
FEW_PIXELS = 160  # up to here, one matrix product with all patches is faster

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


def convolve_taps(x: Tensor, weight: Tensor, bias: Tensor | None, whole: Tensor | None = None) -> Tensor:
    """Convolve x [B, C, H, W] with weight [9, C, O] to [B, O, H, W].

    `whole` is the transformed weight [36, C, O], if it was computed before.
    """
    (batch, channels, height, width), out = x.shape, weight.shape[2]
    x = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C], no copy if x is channels_last
    if batch * height * width <= FEW_PIXELS:
        return convolve_patches(x, weight, bias).permute(0, 3, 1, 2)
    result = x.new_empty(batch, *(TILE * tiles for tiles in tile_counts(height, width)), out)
    parts = list(bands(batch, *tile_counts(height, width), channels + out))
    if whole is None and len(parts) > 1:
        whole = transform(weight)
    for images, rows in parts:
        inputs = transform_inputs(x, images, rows)  # [36, N, C]
        if whole is not None:
            sums = torch.bmm(inputs, whole)  # [36, N, O]
        else:
            sums = inputs.new_empty(*inputs.shape[:2], out)
            for first, last in channel_blocks(channels, out):
                block = transform(weight[:, first:last])
                sums.baddbmm_(inputs[:, :, first:last], block, beta=1 if first else 0)
        outputs = (OUTPUT @ sums.flatten(1)).view(TILE, TILE, *tile_shape(images, rows, width), out)
        outputs = outputs.permute(2, 3, 0, 4, 1, 5)  # [b, rows, 4, columns, 4, O]
        place = result[images, TILE * rows.start : TILE * rows.stop].view(outputs.shape)
        torch.add(outputs, bias, out=place) if bias is not None else place.copy_(outputs)
    return result[:, :height, :width].permute(0, 3, 1, 2)


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [9, C, O] of the weight, from x [B, C, H, W] and the gradient [B, O, H, W] of the result."""
    (batch, channels, height, width), out = x.shape, gradient.shape[1]
    tiles = tile_counts(height, width)
    x = x.permute(0, 2, 3, 1).contiguous()
    missing = (0, 0, 0, TILE * tiles[1] - width, 0, TILE * tiles[0] - height)
    gradient = F.pad(gradient.permute(0, 2, 3, 1), missing).contiguous()  # [B, 4 rows, 4 columns, O]
    total = x.new_zeros(9, channels, out)
    for images, rows in bands(batch, *tiles, channels + out):
        inputs = transform_inputs(x, images, rows)  # [36, N, C]
        part = gradient[images, TILE * rows.start : TILE * rows.stop]
        part = part.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(2, 4, 0, 1, 3, 5)  # [4, 4, b, r, c, O]
        sums = (OUTPUT.T @ part.reshape(16, -1)).view(36, -1, out)  # [36, N, O]
        for first, last in channel_blocks(channels, out):
            block = torch.bmm(inputs[:, :, first:last].transpose(1, 2), sums)  # [36, c, O]
            total[:, first:last] += (WEIGHT.T @ block.flatten(1)).view(9, last - first, out)
    return total


def transform(weight: Tensor) -> Tensor:
    """Transform weights [9, C, O] to [36, C, O]."""
    return (WEIGHT @ weight.flatten(1)).view(36, *weight.shape[1:])


def transform_inputs(x: Tensor, images: slice, rows: slice) -> Tensor:
    """Transform the N tiles in some images and rows of tiles of x [B, H, W, C] to [36, N, C]."""
    height, width, channels = x.shape[1:]
    shape = tile_shape(images, rows, width)
    first, last = TILE * rows.start - 1, TILE * rows.stop + 1  # rows of pixels, one more than outputs at each end
    some = x[images, max(first, 0) : min(last, height)]
    beyond = 1, TILE * shape[2] - width + 1, max(-first, 0), max(last - height, 0)  # left, right, above, below
    padded = F.pad(some, (0, 0, *beyond))  # zeros
    to_image, to_row, to_column, _ = padded.stride()
    strides = (to_row, to_column, to_image, TILE * to_row, TILE * to_column, 1)
    overlapping = padded.as_strided((6, 6, *shape, channels), strides)  # [6, 6, b, rows, columns, C]
    return (INPUT @ overlapping.reshape(36, -1)).view(36, -1, channels)


def convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x [B, H, W, C] with weight [9, C, O] to [B, H, W, O], by one matrix product with all patches."""
    batch, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    to_image, to_row, to_column, _ = padded.stride()
    strides = (to_image, to_row, to_column, to_row, to_column, 1)
    patches = padded.as_strided((batch, height, width, 3, 3, channels), strides).reshape(-1, 9 * channels)
    matrix = weight.flatten(0, 1)  # [9 C, O]
    result = patches @ matrix if bias is None else torch.addmm(bias, patches, matrix)
    return result.view(batch, height, width, -1)


def tile_counts(height: int, width: int) -> tuple[int, int]:
    """Numbers of rows and columns of tiles."""
    return -(-height // TILE), -(-width // TILE)


def tile_shape(images: slice, rows: slice, width: int) -> tuple[int, int, int]:
    """Numbers of images, of rows of tiles, and of columns of tiles."""
    return images.stop - images.start, rows.stop - rows.start, -(-width // TILE)


def bands(batch: int, rows: int, columns: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """Split all tiles into parts that stay in the cache: slices of images and of rows of tiles."""
    most = max(FEWEST_TILES, TILES_IN_CACHE // (36 * channels))
    if batch * rows * columns <= most:
        yield slice(0, batch), slice(0, rows)
        return
    together, height = max(1, most // (rows * columns)), min(rows, max(1, most // columns))
    for image in range(0, batch, together):
        for row in range(0, rows, height):
            yield slice(image, min(image + together, batch)), slice(row, min(row + height, rows))


def channel_blocks(channels: int, out: int) -> Iterator[tuple[int, int]]:
    """Split the input channels into ranges whose transformed weights stay in the cache."""
    most = max(16, WEIGHTS_IN_CACHE // (36 * out) // 16 * 16)
    for first in range(0, channels, most):
        yield first, min(first + most, channels)
