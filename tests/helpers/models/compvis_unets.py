"""CompVis' UNet: names and shapes of its parameters from CompVis' options, and a reference implementation."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models.compvis_shapes import Shapes, conv, norm


def unet_shapes(
    in_channels: int,
    out_channels: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    attention_resolutions: tuple[int, ...],  # downsampling factors
    num_res_blocks: int = 2,
    use_spatial_transformer: bool = False,
    transformer_depth: int = 1,
    context_dim: int | None = None,
    use_linear_in_transformer: bool = False,
    use_scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    adm_in_channels: int | None = None,
) -> Shapes:
    """Names and shapes in the state dict of UNetModel."""
    wide = 4 * model_channels
    shapes = linear("time_embed.0", model_channels, wide) | linear("time_embed.2", wide, wide)
    if adm_in_channels:
        shapes |= linear("label_emb.0.0", adm_in_channels, wide) | linear("label_emb.0.2", wide, wide)
    shapes |= conv("input_blocks.0.0", in_channels, model_channels, 3)

    def residual(name: str, into: int, out: int) -> Shapes:
        shapes = norm(f"{name}.in_layers.0", into) | conv(f"{name}.in_layers.2", into, out, 3)
        shapes |= linear(f"{name}.emb_layers.1", wide, 2 * out if use_scale_shift_norm else out)
        shapes |= norm(f"{name}.out_layers.0", out) | conv(f"{name}.out_layers.3", out, out, 3)
        return shapes | (conv(f"{name}.skip_connection", into, out, 1) if into != out else {})

    def attend(name: str, dim: int) -> Shapes:
        if not use_spatial_transformer:
            line = {f"{name}.qkv.weight": (3 * dim, dim, 1), f"{name}.qkv.bias": (3 * dim,)}
            return norm(f"{name}.norm", dim) | line | {f"{name}.proj_out.weight": (dim, dim, 1)} | bias(name, dim)
        project = linear if use_linear_in_transformer else lambda name, *sizes: conv(name, *sizes, 1)
        shapes = (
            norm(f"{name}.norm", dim) | project(f"{name}.proj_in", dim, dim) | project(f"{name}.proj_out", dim, dim)
        )
        for depth in range(transformer_depth):
            shapes |= transformer_block(f"{name}.transformer_blocks.{depth}", dim, context_dim or dim)
        return shapes

    channels, smaller, index, skips = model_channels, 1, 1, [model_channels]
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            shapes |= residual(f"input_blocks.{index}.0", channels, mult * model_channels)
            channels = mult * model_channels
            shapes |= attend(f"input_blocks.{index}.1", channels) if smaller in attention_resolutions else {}
            skips, index = [*skips, channels], index + 1
        if level < len(channel_mult) - 1:
            step = f"input_blocks.{index}.0"
            shapes |= (
                residual(step, channels, channels) if resblock_updown else conv(f"{step}.op", channels, channels, 3)
            )
            skips, index, smaller = [*skips, channels], index + 1, 2 * smaller
    shapes |= residual("middle_block.0", channels, channels) | residual("middle_block.2", channels, channels)
    shapes |= attend("middle_block.1", channels)
    index = 0
    for level, mult in reversed(list(enumerate(channel_mult))):
        for block in range(num_res_blocks + 1):
            shapes |= residual(f"output_blocks.{index}.0", channels + skips.pop(), mult * model_channels)
            channels, place = mult * model_channels, 1
            if smaller in attention_resolutions:
                shapes |= attend(f"output_blocks.{index}.1", channels)
                place = 2
            if level and block == num_res_blocks:
                step, smaller = f"output_blocks.{index}.{place}", smaller // 2
                up = (
                    residual(step, channels, channels)
                    if resblock_updown
                    else conv(f"{step}.conv", channels, channels, 3)
                )
                shapes |= up
            index += 1
    return shapes | norm("out.0", channels) | conv("out.2", channels, out_channels, 3)


def linear(name: str, into: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def bias(name: str, dim: int) -> Shapes:
    return {f"{name}.proj_out.bias": (dim,)}


def transformer_block(name: str, dim: int, context_dim: int) -> Shapes:
    shapes: Shapes = {}
    for attention, width in (("attn1", dim), ("attn2", context_dim)):
        for part, into in (("to_q", dim), ("to_k", width), ("to_v", width)):
            shapes[f"{name}.{attention}.{part}.weight"] = (dim, into)
        shapes |= linear(f"{name}.{attention}.to_out.0", dim, dim)
    shapes |= linear(f"{name}.ff.net.0.proj", dim, 8 * dim) | linear(f"{name}.ff.net.2", 4 * dim, dim)
    return shapes | {key: size for part in (1, 2, 3) for key, size in norm(f"{name}.norm{part}", dim).items()}


class Reference:
    """The forward pass of the UNet from weights in CompVis' names, which also determine the kinds of blocks."""

    def __init__(self, weights: Mapping[str, Tensor], num_res_blocks: int, heads: Callable[[int], int]):
        self.weights, self.period = weights, num_res_blocks + 1
        self.heads = heads  # number of heads for a number of channels

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.weights["time_embed.0.weight"].shape[1] // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        inputs, skips = (self.linear("time_embed.2", F.silu(emb)), context), []
        for index in range(self.count("input_blocks")):
            x = self.sequence(f"input_blocks.{index}", x, inputs, F.avg_pool2d if index % self.period == 0 else None)
            skips.append(x)
        x = self.sequence("middle_block", x, inputs)
        for index in range(self.count("output_blocks")):
            x = self.sequence(f"output_blocks.{index}", torch.cat([x, skips.pop()], dim=1), inputs, F.interpolate)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def count(self, name: str) -> int:
        return 1 + max(int(key.split(".")[1]) for key in self.weights if key.startswith(name))

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.weights)

    def sequence(self, name, x, inputs, resample=None) -> Tensor:
        for place in range(3):
            part = f"{name}.{place}"
            if self.has(f"{part}.in_layers"):
                step = place > 0 if name.startswith("output") else resample is not None
                x = self.residual(part, x, inputs[0], resample if step and name != "middle_block" else None)
            elif self.has(f"{part}.qkv"):
                x = self.attention_block(part, x)
            elif self.has(f"{part}.proj_in"):
                x = self.spatial_transformer(part, x, inputs[1])
            elif self.has(f"{part}.op"):
                x = self.conv(f"{part}.op", x, stride=2)
            elif self.has(f"{part}.conv"):
                x = self.conv(f"{part}.conv", F.interpolate(x, scale_factor=2))
            elif self.has(part):
                x = self.conv(part, x)
        return x

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        """Group normalization with 32 groups."""
        groups = x.reshape(x.shape[0], 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
        x, shape = ((groups - mean) / (variance + eps).sqrt()).view_as(x), [1, -1] + [1] * (x.ndim - 2)
        return x * self.weights[f"{name}.weight"].view(shape) + self.weights[f"{name}.bias"].view(shape)

    def residual(self, name: str, x: Tensor, emb: Tensor, resample=None) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resample is not None:
            x, h = (
                resample(y, kernel_size=2) if resample is F.avg_pool2d else resample(y, scale_factor=2) for y in (x, h)
            )
        h = self.conv(f"{name}.in_layers.2", h)
        emb = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if emb.shape[1] == 2 * h.shape[1]:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + emb)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (self.conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection") else x)

    def attention_block(self, name: str, x: Tensor) -> Tensor:
        """Attention in which the rows of q, k and v are ordered by heads."""
        h = self.norm(f"{name}.norm", x).flatten(2)  # [B, C, N]
        qkv = F.conv1d(h, self.weights[f"{name}.qkv.weight"], self.weights[f"{name}.qkv.bias"])
        out, heads, dim = [], self.heads(h.shape[1]), h.shape[1] // self.heads(h.shape[1])
        for head in range(heads):
            q, k, v = qkv[:, 3 * dim * head : 3 * dim * (head + 1)].split(dim, dim=1)  # [B, C / heads, N] each
            scores = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(dim)
            out.append(torch.einsum("bqk,bck->bcq", scores.softmax(-1), v))
        h = F.conv1d(
            torch.cat(out, dim=1), self.weights[f"{name}.proj_out.weight"], self.weights[f"{name}.proj_out.bias"]
        )
        return x + h.view_as(x)

    def spatial_transformer(self, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.norm(f"{name}.norm", x, eps=1e-6).flatten(2).transpose(1, 2)  # [B, N, C]
        h = self.pointwise(f"{name}.proj_in", h)
        for depth in range(sum(key.startswith(name) and key.endswith(".norm1.bias") for key in self.weights)):
            block = f"{name}.transformer_blocks.{depth}"
            h = h + self.attend(f"{block}.attn1", self.layer_norm(f"{block}.norm1", h), None)
            h = h + self.attend(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), context)
            value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
            h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.pointwise(f"{name}.proj_out", h).transpose(1, 2).reshape(x.shape)

    def pointwise(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.weights[f"{name}.weight"].flatten(1), self.weights[f"{name}.bias"])

    def layer_norm(self, name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attend(self, name: str, h: Tensor, context: Tensor | None) -> Tensor:
        source = h if context is None else context
        q, k, v = (self.linear(f"{name}.to_{part}", y) for part, y in (("q", h), ("k", source), ("v", source)))
        heads = zip(*(part.chunk(self.heads(h.shape[-1]), dim=-1) for part in (q, k, v)), strict=True)
        out = [(a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in heads]
        return self.linear(f"{name}.to_out.0", torch.cat(out, dim=-1))
