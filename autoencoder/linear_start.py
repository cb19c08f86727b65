"""A start for the autoencoder's training: networks that do what a linear autoencoder does, to a few percent.

Every convolution that is always passed carries the linear map in some of its channels; residual branches and attention
end in zeros; all other channels keep their usual random weights. What would spoil it is the last normalization of the
encoder and of the decoder, with SiLU after it. There each feature is carried twice, as x and as -x, in one group:

- their mean is zero, so that the normalization has no mean to take away;
- two more channels of the group are the constants K and -K, with K a few times the features' standard deviation: the
  group's standard deviation, and so the normalization's gain, is nearly the same for every picture;
- silu(u) - silu(-u) = u, so that the last convolution, reading the two with opposite signs, gets x itself.

What is left is that the gain depends a little on the picture: about 1 / (2 CONSTANT^2) of the variation of its energy.
The architecture stays what it was, and so do file formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.autoencoder import Autoencoder
from autoencoder.config import AutoencoderConfig
from autoencoder.linear import Affine, LinearAutoencoder, fit
from autoencoder.networks import Decoder, Encoder

CONSTANT = 4.0  # K, in root sums of the variances of a group's features
SMALLEST = 0.01  # features whose standard deviation is below this share of the largest are taken to have this share
SPREAD = 1.0  # standard deviation of what enters the last SiLU
LOG_VARIANCE = -5.0  # of the posterior, of latents with variance 1


@dataclass(frozen=True)
class Pairs:
    """Which channels carry features as x and -x, and which the constants K and -K."""

    plus: Tensor  # [n]
    minus: Tensor  # [n]
    high: Tensor  # [groups]
    low: Tensor  # [groups]
    group: Tensor  # [n], of each feature

    @classmethod
    def of(cls, channels: int, groups: int, count: int) -> Pairs:
        """Places for `count` features, spread evenly over the groups: each group is K, -K, x, -x, x', -x', ..."""
        size, features = channels // groups, torch.arange(count)
        group, turn = features % groups, features // groups
        first = torch.arange(groups) * size
        plus = group * size + 2 + 2 * turn
        return cls(plus, plus + 1, first, first + 1, group)


def room(channels: int, groups: int) -> int:
    """How many features have a place in `Pairs`."""
    return (channels // groups - 2) // 2 * groups


def check_room(config: AutoencoderConfig) -> None:
    """Raise ValueError if an autoencoder's first or last level is too narrow for a linear start."""
    groups, ends = config.norm_num_groups, (config.block_out_channels[0], config.block_out_channels[-1])
    for channels, wanted in zip(ends, (config.in_channels, config.latent_channels), strict=True):
        if room(channels, groups) < wanted:
            raise ValueError(
                f"a linear start needs pairs of channels and two constants in each group of a norm: {channels} "
                f"channels in {groups} groups have room for {room(channels, groups)} features, not {wanted}; use fewer "
                "norm_num_groups, more block_out_channels, or linear_start=0"
            )


@torch.no_grad()
def start_linearly(autoencoder: Autoencoder, images: Tensor) -> LinearAutoencoder:
    """Make a new autoencoder do what the linear one of images [N, C, H, W] in [-1, 1] does; returns that one.

    Latents then have mean 0 and variance 1 over these images. A codebook gets some of the images' latents as codes.

    Raises:
        ValueError: the first or last level is too narrow (`check_room`), or the images are all of one color.
    """
    config = autoencoder.config
    check_room(config)
    images, channels = images.cpu(), config.block_out_channels
    widths = [min(pair) for pair in zip((channels[0], *channels), channels, strict=False)]
    widths[-1] = min(widths[-1], room(channels[-1], config.norm_num_groups))
    linear = fit(images, widths, config.latent_channels)
    _write_encoder(autoencoder.encoder, linear, images, config)
    _write_decoder(autoencoder.decoder, linear, images, config)
    for convolution in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        _carry(convolution, Affine(torch.eye(*convolution.weight.shape[:2])[:, :, None, None], None), alone=True)
    if config.regularizer == "vq":
        _spread_codes(autoencoder, linear.encode(images))
    return linear


def _write_encoder(encoder: Encoder, linear: LinearAutoencoder, images: Tensor, config: AutoencoderConfig) -> None:
    x = images + linear.center.bias[:, None, None]
    for step in linear.down:
        x = nn.functional.conv2d(x, step.weight, step.bias, stride=2)
    pairs = Pairs.of(config.block_out_channels[-1], config.norm_num_groups, x.shape[1])
    constant = _constant(x, pairs)
    entry, step = encoder.conv_in, linear.center
    for level, following in zip(encoder.down_blocks, (*linear.down, None), strict=True):
        last = following is None
        _enter(entry, step, level, (pairs, constant) if last else None)
        _silence(level)
        if not last:
            entry, step = level.downsamplers[0].conv, following
    _silence(encoder.mid_block)
    c = config.latent_channels
    _read(encoder.conv_norm_out, encoder.conv_out, linear.to_latents, x, pairs, constant)
    encoder.conv_out.weight[c:] = 0
    encoder.conv_out.bias[c:] = LOG_VARIANCE


def _write_decoder(decoder: Decoder, linear: LinearAutoencoder, images: Tensor, config: AutoencoderConfig) -> None:
    x = images + linear.center.bias[:, None, None]  # what the decoder comes near to
    pairs = Pairs.of(config.block_out_channels[0], config.norm_num_groups, x.shape[1])
    constant = _constant(x, pairs)
    entry, step = decoder.conv_in, linear.from_latents
    _silence(decoder.mid_block)
    for level, following in zip(decoder.up_blocks, (*linear.up, None), strict=True):
        last = following is None
        _enter(entry, step, level, (pairs, constant) if last else None)
        _silence(level)
        if not last:
            entry, step = level.upsamplers[0].conv, following
    back = Affine(torch.eye(x.shape[1])[:, :, None, None], -linear.center.bias)
    _read(decoder.conv_norm_out, decoder.conv_out, back, x, pairs, constant)


def _enter(entry: nn.Conv2d, step: Affine, level: nn.Module, paired: tuple[Pairs, float] | None) -> None:
    """Let a convolution, and the shortcut of the level after it, bring a step's features into the level's channels.

    They lie in the first channels; in the last level, where `paired` says how, in pairs, and nothing else beside them.
    """
    shortcut, count = level.resnets[0].conv_shortcut, len(step.bias)
    same = Affine(torch.eye(count)[:, :, None, None], torch.zeros(count))
    if isinstance(shortcut, nn.Identity):
        _carry(entry, step if paired is None else _paired(step, *paired, len(entry.bias)), alone=paired is not None)
        return
    _carry(entry, step)
    _carry(shortcut, same if paired is None else _paired(same, *paired, len(shortcut.bias)), alone=paired is not None)


def _carry(convolution: nn.Conv2d, step: Affine, alone: bool = False) -> None:
    """Write a step [m, n, k, k] into the first m of a convolution's outputs, the first n of its inputs.

    A kernel of 2 pixels becomes the first 2 of 3, one of 1 pixel the middle one. `alone`: other outputs are zero.
    """
    weight, (m, n, k, _) = convolution.weight, step.weight.shape
    written = slice(None) if alone else slice(m)
    weight[written] = 0
    first = 0 if k == 2 else (weight.shape[-1] - k) // 2
    weight[:m, :n, first : first + k, first : first + k] = step.weight.to(weight)
    convolution.bias[written] = 0
    if step.bias is not None:
        convolution.bias[:m] = step.bias.to(weight)


def _paired(step: Affine, pairs: Pairs, constant: float, channels: int) -> Affine:
    """The step with `channels` outputs: its own as pairs, and the constants."""
    weight, bias = step.weight.new_zeros(channels, *step.weight.shape[1:]), step.bias.new_zeros(channels)
    weight[pairs.plus], weight[pairs.minus] = step.weight, -step.weight
    bias[pairs.plus], bias[pairs.minus] = step.bias, -step.bias
    bias[pairs.high], bias[pairs.low] = constant, -constant
    return Affine(weight, bias)


def _silence(level: nn.Module) -> None:
    """Let residual branches and attention of a level add nothing, until they have learned to."""
    ends = [resnet.conv2 for resnet in level.resnets] + [attention.to_out[0] for attention in level.attentions]
    for end in ends:
        end.weight.zero_()
        end.bias.zero_()


def _constant(x: Tensor, pairs: Pairs) -> float:
    """K for features x [N, n, H, W]."""
    return CONSTANT * _energy(x, pairs).max().sqrt().item()


def _energy(x: Tensor, pairs: Pairs) -> Tensor:
    """The sum of the mean squares of the features x [N, n, H, W] in each group: [groups]."""
    return torch.zeros(len(pairs.high)).index_add(0, pairs.group, x.square().mean(dim=(0, 2, 3)))


def _read(norm: nn.GroupNorm, convolution: nn.Conv2d, step: Affine, x: Tensor, pairs: Pairs, constant: float) -> None:
    """Let conv(silu(norm(.))) be a 1x1 step of the features that lie in pairs; x [N, n, H, W] are such features."""
    size = norm.num_channels // norm.num_groups
    deviation = ((2 * constant**2 + 2 * _energy(x, pairs)) / size).sqrt()[pairs.group]  # [n], of each feature's group
    spreads = x.square().mean(dim=(0, 2, 3)).sqrt()  # [n]
    gain = SPREAD * deviation / spreads.clamp(min=SMALLEST * spreads.max().item())
    norm.weight[pairs.plus] = norm.weight[pairs.minus] = gain.to(norm.weight)
    norm.weight[torch.cat([pairs.high, pairs.low])] = 0  # nothing is to read the constants
    weight, middle = (step.weight[:, :, 0, 0] * deviation / gain).to(norm.weight), convolution.weight.shape[-1] // 2
    m = len(step.bias)
    for places in (pairs.plus, pairs.minus, pairs.high, pairs.low):
        convolution.weight[:, places] = 0
    convolution.weight[:m, pairs.plus, middle, middle] = weight
    convolution.weight[:m, pairs.minus, middle, middle] = -weight
    convolution.bias[:m] = step.bias.to(norm.weight)


def _spread_codes(autoencoder: Autoencoder, latents: Tensor) -> None:
    """Take latents [N, c, h, w], evenly spaced, as codes; codes beyond their number stay as they are."""
    codes = autoencoder.quantize.embedding.weight
    vectors = autoencoder.quant_conv(latents.to(codes)).permute(0, 2, 3, 1).flatten(0, 2)  # [N h w, d]
    count = min(len(codes), len(vectors))
    codes[:count] = vectors[torch.linspace(0, len(vectors) - 1, count).long()].to(codes)
