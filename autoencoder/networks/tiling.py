"""Encoding and decoding of large images in tiles, with limited memory and equal results up to the last bits.

Convolutions need the neighborhood of a tile, so tiles are computed with a margin that is cropped. Group normalization
needs mean and variance of the whole image (Wu & He 2018, eq. 2), so these are summed over all tiles before any tile is
normalized. Therefore these tiles have no seams, unlike overlapping tiles that are normalized separately and blended.

A layer's output is kept if it fits into the memory; otherwise its parts are computed when they are needed, from the
last kept output. Attention, and each layer that fits into the memory, runs on the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.networks.autoencoder_blocks import Downsample, ResnetBlock, SingleHeadAttention, Upsample
from autoencoder.networks.encoder_decoder import Decoder, Encoder

LIVE = 4  # feature maps of the largest size that a layer on a whole image needs at a time
SHARE = 0.25  # of the memory, for the current tile
LEAST_TILE = 32  # pixels along each side; in smaller tiles the margins take most of the time

Layer = Callable[[Tensor], Tensor]


class Region(NamedTuple):
    """A rectangle of a feature map."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        """Return this rectangle of x [B, C, H, W]."""
        return x[:, :, self.top : self.bottom, self.left : self.right]

    def within(self, outer: Region) -> Region:
        """Return this rectangle in coordinates relative to another one."""
        top, left = outer.top, outer.left
        return Region(self.top - top, self.bottom - top, self.left - left, self.right - left)

    def times(self, zoom: float) -> Region:
        """Return this rectangle in a map that is `zoom` times as large."""
        return Region(*(round(side * zoom) for side in self))


@dataclass(frozen=True, kw_only=True)
class Local:
    """A layer whose outputs depend only on nearby inputs."""

    run: Layer  # [1, c, h, w] -> [1, channels, zoom h, zoom w]; does not change its input
    channels: int  # of the outputs
    zoom: float = 1.0  # 2 doubles the sides, 0.5 halves them
    margin: int = 1  # number of outputs next to a cut edge that are wrong

    def reads(self, region: Region, height: int, width: int) -> Region:
        """Return the region of an input of height x width that a region of the output depends on."""
        low = [max(0, math.floor((side - self.margin) / self.zoom)) for side in (region.top, region.left)]
        high = [math.ceil((side + self.margin) / self.zoom) for side in (region.bottom, region.right)]
        return Region(low[0], min(high[0], height), low[1], min(high[1], width))


@dataclass(frozen=True)
class Features:
    """A feature map of one image: `kept` is in memory, and `pending` layers are run when a part is needed."""

    kept: Tensor  # [1, c, h, w]
    pending: tuple[Local, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        zoom = math.prod(local.zoom for local in self.pending)
        channels = self.pending[-1].channels if self.pending else self.kept.shape[1]
        return channels, round(self.kept.shape[2] * zoom), round(self.kept.shape[3] * zoom)

    def then(self, local: Local) -> Features:
        """Return the output of a layer on this map, with the layer pending."""
        return replace(self, pending=(*self.pending, local))

    def part(self, region: Region) -> Tensor:
        """Compute a part [1, C, ...] of the map. Do not modify it: it may be a view."""
        if not self.pending:
            return region.of(self.kept)
        before, last = Features(self.kept, self.pending[:-1]), self.pending[-1]
        needed = last.reads(region, *before.shape[1:])
        return region.within(needed.times(last.zoom)).of(last.run(before.part(needed)))

    def tiles(self, side: int) -> Iterator[Region]:
        """Split the map into regions of at most side x side and about equal size."""
        _, height, width = self.shape
        for top, bottom in _spans(height, side):
            for left, right in _spans(width, side):
                yield Region(top, bottom, left, right)

    def keep(self, side: int) -> Features:
        """Run all pending layers, in tiles of at most side x side."""
        if not self.pending:
            return self
        kept = torch.empty(1, *self.shape, dtype=self.kept.dtype, device=self.kept.device)
        kept = kept.contiguous(memory_format=torch.channels_last)
        for region in self.tiles(side):
            region.of(kept).copy_(self.part(region))
        return Features(kept)


def largest(network: Encoder | Decoder, x: Tensor) -> int:
    """Return the bytes of the largest feature map of a network for one image of x [B, c, h, w]."""
    shape, sizes = (network.conv_in.out_channels, *x.shape[2:]), []
    for layer in _layers(network):
        sizes.append(math.prod(shape))
        shape = _shape_after(layer, shape)
    return max(*sizes, math.prod(shape)) * x.element_size()


@torch.no_grad()
def run(network: Encoder | Decoder, x: Tensor, memory: int) -> Tensor:
    """Run a network on x [B, c, h, w] with about `memory` bytes for feature maps, excluding the result."""
    if LIVE * largest(network, x) <= memory:
        return network(x)
    return torch.cat([_Tiling(network, image, memory).run() for image in x.split(1)])


class _Tiling:
    """Runs a network on one image in tiles."""

    def __init__(self, network: Encoder | Decoder, x: Tensor, memory: int):
        self.network, self.x, self.memory = network, x, memory
        widest = max(layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))
        pixels = SHARE * memory / (LIVE * widest * x.element_size())
        self.side = max(LEAST_TILE, math.isqrt(int(pixels)))

    def run(self) -> Tensor:
        network = self.network
        x = Features(self.x).then(Local(run=network.conv_in, channels=network.conv_in.out_channels))
        for layer in _layers(network):
            if (
                isinstance(layer, SingleHeadAttention)
                or LIVE * self._bytes(x.shape, _shape_after(layer, x.shape)) <= self.memory
            ):
                x = x.keep(self.side)  # first, to release the map that it is computed from
                x = Features(layer(x.kept))
            elif isinstance(layer, ResnetBlock):
                x = self._residual(layer, x)
            else:
                channels, zoom = layer.conv.out_channels, 2.0 if isinstance(layer, Upsample) else 0.5
                x = x.then(Local(run=layer, channels=channels, zoom=zoom))
        last, norm = network.conv_out, self._norm_silu(network.conv_norm_out, x)
        return x.then(Local(run=lambda part: last(norm(part)), channels=last.out_channels)).keep(self.side).kept

    def _residual(self, block: ResnetBlock, x: Features) -> Features:
        """Run a residual block on x: in the memory of x if possible, or pending if it does not fit into the memory."""
        first, channels = self._norm_silu(block.norm1, x), block.conv1.out_channels
        inner = x.then(Local(run=lambda part: block.conv1(first(part)), channels=channels))
        in_place = not x.pending and isinstance(block.conv_shortcut, nn.Identity)
        held = x.kept.nbytes + self._bytes(inner.shape) * (1 if in_place else 2)
        if held > (1 - SHARE) * self.memory:
            second = self._norm_silu(block.norm2, inner)

            def whole(part: Tensor) -> Tensor:
                return block.conv_shortcut(part) + block.conv2(second(block.conv1(first(part))))

            return x.then(Local(run=whole, channels=channels, margin=2))
        inner = inner.keep(self.side)
        second = self._norm_silu(block.norm2, inner)
        outer = inner.then(Local(run=lambda part: block.conv2(second(part)), channels=channels))
        result = x.kept if in_place else torch.empty_like(inner.kept)
        for region in outer.tiles(self.side):
            torch.add(block.conv_shortcut(x.part(region)), outer.part(region), out=region.of(result))
        return Features(result)

    def _norm_silu(self, norm: nn.GroupNorm, x: Features) -> Layer:
        """Return group normalization and SiLU for any part of x, with mean and variance of the whole x."""
        (channels, height, width), each = x.shape, x.shape[0] // norm.num_groups
        wide = torch.promote_types(x.kept.dtype, torch.float32)
        sums = torch.zeros(2, channels, dtype=torch.float64, device=x.kept.device)
        for region in x.tiles(self.side):
            part = x.part(region).to(wide)
            sums += torch.stack([power.sum((0, 2, 3), dtype=torch.float64) for power in (part, part.square())])
        sums = sums.unflatten(1, (norm.num_groups, -1)).sum(2) / (each * height * width)
        mean, variance = sums[0], sums[1] - sums[0].square()  # [groups]
        scale = norm.weight.double() * (variance + norm.eps).rsqrt().repeat_interleave(each)  # [C]
        shift = norm.bias.double() - scale * mean.repeat_interleave(each)
        scale, shift = (number.to(wide)[:, None, None] for number in (scale, shift))
        return lambda part: F.silu(torch.addcmul(shift, part, scale), inplace=True).to(part.dtype)

    def _bytes(self, *shapes: tuple[int, int, int]) -> int:
        """Bytes of the largest of several feature maps."""
        return max(map(math.prod, shapes)) * self.x.element_size()


def _layers(network: Encoder | Decoder) -> Iterator[nn.Module]:
    """The layers between the first convolution and the last normalization."""
    return (layer for level in network.levels for layer in level.layers())


def _shape_after(layer: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    channels, height, width = shape
    if isinstance(layer, ResnetBlock):
        return layer.conv1.out_channels, height, width
    if isinstance(layer, Upsample):
        return channels, 2 * height, 2 * width
    return (channels, height // 2, width // 2) if isinstance(layer, Downsample) else shape


def _spans(length: int, most: int) -> list[tuple[int, int]]:
    """Split [0, length) into as few spans of at most `most` as possible, of about equal length."""
    count = -(-length // most)
    ends = [length * i // count for i in range(count + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))
