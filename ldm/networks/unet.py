"""The latent UNet, conditioned on the timestep and a context (Rombach et al. 2022, sections 3.2, 3.3, appendix E.2.1).

Parameter names and arithmetic are those of diffusers' `UNet2DConditionModel`, or where attention is plain of its
`UNet2DModel`. The output convolution, the second convolution of each residual block and the last projection of each
attention are zero at construction, as in LDM: an untrained network returns 0 and all its residual branches are the
identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.networks.attention import (
    MASKED,
    Attention,
    KeysValues,
    PlainAttention,
    Signal,
    SpatialTransformer,
    TransformerBlock,
    zeroed,
)
from ldm.networks.unet_blocks import (
    Downsample,
    Embedding,
    ResidualBlock,
    ResidualDownsample,
    ResidualUpsample,
    UNetLevel,
    Upsample,
    scale_sinusoids,
)
from ldm.networks.unet_config import UNetConfig
from stipple_core.operators.normalization import norm_silu
from stipple_core.operators.sinusoids import sinusoids


class ContextLike(Protocol):
    """What the UNet reads of a context (`conditioning.Context`); each may be None."""

    tokens: Tensor | None  # [B, L, d]
    mask: Tensor | None  # [B, L], True for a token
    vector: Tensor | None  # [B, v]
    latents: Tensor | None  # [B, c, h, w]
    guidance: Tensor | None  # [B], guidance scales, for a UNet with a guidance_dim


@dataclass(frozen=True)
class ReadContext:
    """A context with the keys and values of its tokens for each cross-attention of one UNet, see `UNet.read`."""

    tokens: Tensor | None
    mask: Tensor | None
    vector: Tensor | None
    latents: Tensor | None
    keys_values: Mapping[Attention, KeysValues]
    guidance: Tensor | None = None


class UNet(nn.Module):
    """The network of the diffusion model; `Denoiser` defines what its output means.

    Attributes:
        config: its shape.
        checkpointing: recompute each layer's activations in the backward pass, which saves memory and takes a third
            more time.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        channels = config.block_out_channels
        self.embedding_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], self.embedding_dim, config.guidance_dim)
        if config.vector_dim is not None:
            self.add_module(self.vector_name, Embedding(config.vector_dim, self.embedding_dim))
        self.down_blocks = nn.ModuleList(self._down_levels())
        self.mid_block = self._level(len(channels) - 1, [channels[-1], channels[-1]], attentions=1)
        self.up_blocks = nn.ModuleList(self._up_levels())
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(channels[0], config.out_channels, 3, padding=1))

    @property
    def vector_name(self) -> str:
        """What diffusers calls the embedding of context.vector."""
        return "class_embedding" if self.config.frame_width is None else "add_embedding"

    def _residual(self, kind: type[ResidualBlock], channels: int, out_channels: int) -> ResidualBlock:
        config = self.config
        groups, dropout = config.norm_num_groups, config.dropout
        return kind(channels, out_channels, self.embedding_dim, groups, dropout, config.norm_eps, config.scale_shift)

    def _attention(self, level: int) -> SpatialTransformer | PlainAttention:
        config = self.config
        channels, heads = config.block_out_channels[level], config.attention_heads[level]
        if config.attention == "plain":
            return PlainAttention(channels, heads, config.norm_num_groups, config.norm_eps)
        return SpatialTransformer(
            channels,
            heads=heads,
            depth=config.depth(level),
            context_dim=config.cross_attention_dim,
            linear=config.use_linear_projection,
            groups=config.norm_num_groups,
        )

    def _level(self, level: int, inputs: list[int], attentions: int, **resampling: nn.Module | None) -> UNetLevel:
        """Residual blocks from `inputs` channels each to those of `level`, the first `attentions` with attention."""
        channels = self.config.block_out_channels[level]
        resnets = [self._residual(ResidualBlock, dim, channels) for dim in inputs]
        return UNetLevel(resnets, [self._attention(level) for _ in range(attentions)], **resampling)

    def _down_levels(self) -> Iterator[UNetLevel]:
        channels, layers = self.config.block_out_channels, self.config.layers_per_block
        for level, dim in enumerate(channels):
            inputs = [channels[max(level - 1, 0)], *[dim] * (layers - 1)]
            attentions = layers if self.config.attention_levels[level] else 0
            downsampler = None
            if level < len(channels) - 1:
                residual = self.config.resample == "residual"
                downsampler = self._residual(ResidualDownsample, dim, dim) if residual else Downsample(dim)
            yield self._level(level, inputs, attentions, downsampler=downsampler)

    def _up_levels(self) -> Iterator[UNetLevel]:
        channels, layers = self.config.block_out_channels, self.config.layers_per_block + 1
        for level, dim in reversed(list(enumerate(channels))):
            below = channels[min(level + 1, len(channels) - 1)]  # what arrives from the coarser level
            skips = [*[dim] * (layers - 1), channels[max(level - 1, 0)]]
            inputs = [into + skip for into, skip in zip([below, *[dim] * (layers - 1)], skips, strict=True)]
            attentions = layers if self.config.attention_levels[level] else 0
            upsampler = None
            if level > 0:
                residual = self.config.resample == "residual"
                upsampler = self._residual(ResidualUpsample, dim, dim) if residual else Upsample(dim)
            yield self._level(level, inputs, attentions, upsampler=upsampler)

    def forward(self, z_t: Tensor, timestep: Tensor, context: ContextLike | None = None) -> Tensor:
        """Run the network.

        Args:
            z_t: [B, c, h, w].
            timestep: [B], real numbers from 0 to about 1000.
            context: tokens [B, L, d], mask [B, L], vector [B, v], latents [B, in_channels - c, h, w], as configured.

        Returns:
            [B, out_channels, h, w].

        Raises:
            ValueError: the context lacks what the config requires, or has what the UNet can't read.
        """
        signal = self.signal(z_t, timestep, context)
        x = self.conv_in(self.concatenated(z_t, context))  # [B, C0, h, w]
        skips = [x]
        for level in self.down_blocks:
            for index in range(len(level.resnets)):
                x = self._run(level.layer, index, x, signal)
                skips.append(x)
            for downsampler in level.downsamplers:
                x = self._run(downsampler, x, signal.embedding)  # [B, C, h / 2, w / 2]
                skips.append(x)
        for index in range(len(self.mid_block.resnets)):
            x = self._run(self.mid_block.layer, index, x, signal)
        for level in self.up_blocks:
            for index in range(len(level.resnets)):
                x = self._run(level.layer, index, x, signal, skips.pop())
            for upsampler in level.upsamplers:
                x = self._run(upsampler, x, signal.embedding, skips[-1].shape[2:])  # [B, C, 2h, 2w]
        return self.output(x)

    def output(self, x: Tensor) -> Tensor:
        """The output [B, out_channels, h, w] of the last features [B, C0, h, w]."""
        return self.conv_out(norm_silu(self.conv_norm_out, x))

    def read(self, context: ContextLike) -> ReadContext:
        """Compute keys and values for every cross-attention, so that a sampler's steps need not repeat it."""
        keys_values = {}
        if context.tokens is not None:
            _check_width("tokens", context.tokens, self.config.cross_attention_dim)
            blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
            keys_values = {block.attn2: block.attn2.read(context.tokens) for block in blocks}
        guidance = None if self.config.guidance_dim is None else context.guidance
        return ReadContext(context.tokens, context.mask, context.vector, context.latents, keys_values, guidance)

    def _run(self, layer: Callable[..., Tensor], *arguments: object) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def concatenated(self, z_t: Tensor, context: ContextLike | None) -> Tensor:
        """Concatenate context.latents to z_t: [B, in_channels, h, w]."""
        latents = context.latents if context is not None else None
        x = z_t if latents is None else torch.cat([z_t, latents], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"z_t has {z_t.shape[1]} channels and context.latents {x.shape[1] - z_t.shape[1]}; "
                f"this UNet takes in_channels = {self.config.in_channels} of both together"
            )
        return x

    def signal(self, z_t: Tensor, timestep: Tensor, context: ContextLike | None) -> Signal:
        """Embed the timestep and the vector, and turn the mask into a bias of attention scores."""
        tokens, mask, vector = (context.tokens, context.mask, context.vector) if context is not None else (None,) * 3
        _check_width("tokens", tokens, self.config.cross_attention_dim)
        _check_width("vector", vector, self.config.vector_dim)
        if tokens is not None and len(tokens) != len(z_t):
            raise ValueError(
                f"context.tokens for {len(tokens)} images do not go with {len(z_t)} latents; repeat one of them"
            )
        sines = sinusoids(timestep, self.config.block_out_channels[0]).to(z_t.dtype)
        embedding = self.time_embedding(sines, self._scale(context, z_t))  # [B, E]
        if vector is not None:
            embedding = embedding + getattr(self, self.vector_name)(vector)
        bias = None
        if tokens is not None and mask is not None:
            bias = (~mask.bool()).to(z_t.dtype)[:, None, None, :] * MASKED  # [B, 1, 1, L]
        read = context if isinstance(context, ReadContext) else None
        keys_values = read.keys_values if read is not None and tokens is not None else None
        return Signal(F.silu(embedding), tokens, bias, keys_values)

    def _scale(self, context: ContextLike | None, z_t: Tensor) -> Tensor | None:
        """The embedded guidance scale [B, guidance_dim], or None if the UNet is not conditioned on it."""
        if self.config.guidance_dim is None:
            return None
        if context is None or context.guidance is None:
            raise ValueError("this UNet was distilled from a guided one: context.guidance must hold the guidance scale")
        return scale_sinusoids(context.guidance, self.config.guidance_dim).to(z_t)


def _check_width(name: str, value: Tensor | None, width: int | None) -> None:
    """Raise a ValueError unless the context's `value` is as wide as the UNet was built for, or absent where it is."""
    have = None if value is None else value.shape[-1]
    if have != width:
        raise ValueError(
            f"context.{name} of width {have} does not fit this UNet, which was built for {width}; "
            "use the conditioner that it was trained with"
        )
