"""The linear start: initial weights with which an autoencoder computes a linear autoencoder, up to a few percent.

The convolutions outside residual branches compute the linear map in some of their channels. The last layers of residual
branches and attention are zero. All other channels keep their random initialization. The last normalization and SiLU of
the encoder and of the decoder would change the linear map. There, each feature is in two channels of one group, as x
and as -x:

- Their mean is zero, so the normalization subtracts nothing.
- Two more channels of the group are the constants K and -K, where K is a few times the features' standard deviation. So
  the group's standard deviation, and the gain of the normalization, is nearly the same for every image.
- silu(u) - silu(-u) = u, so the last convolution, with opposite weights for the two channels, computes a map of x.

The remaining error is that the gain depends on the image, by about 1 / (2 CONSTANT^2) of the variation of its energy.
The architecture and the file formats do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.autoencoder import Autoencoder
from autoencoder.linear import Affine, LinearAutoencoder, fit
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from autoencoder.networks.encoder_decoder import Decoder, Encoder

CONSTANT = 4.0  # K, relative to the root of the sum of the variances of a group's features
SMALLEST = 0.01  # least standard deviation of a feature, relative to the largest
SPREAD = 1.0  # standard deviation of the inputs of the last SiLU
LOG_VARIANCE = -5.0  # of the posterior of latents, which have variance 1


@dataclass(frozen=True)
class Pairs:
    """The channels of features as x and as -x, and those of the constants K and -K."""

    plus: Tensor  # [n]
    minus: Tensor  # [n]
    high: Tensor  # [groups]
    low: Tensor  # [groups]
    group: Tensor  # [n], of each feature

    @classmethod
    def of(cls, channels: int, groups: int, count: int) -> Pairs:
        """Distribute `count` features evenly over the groups: each group is K, -K, x, -x, x', -x', ..."""
        size, features = channels // groups, torch.arange(count)
        group, index = features % groups, features // groups  # index in its group
        first = torch.arange(groups) * size
        plus = group * size + 2 + 2 * index
        return cls(plus, plus + 1, first, first + 1, group)


def room(channels: int, groups: int) -> int:
    """The largest number of features for which `Pairs` has channels."""
    return (channels // groups - 2) // 2 * groups


def check_room(config: AutoencoderConfig) -> None:
    """Raise ValueError if the first or last level of an autoencoder has too few channels for a linear start."""
    groups, ends = config.norm_num_groups, (config.block_out_channels[0], config.block_out_channels[-1])
    for channels, features in zip(ends, (config.in_channels, config.latent_channels), strict=True):
        if room(channels, groups) < features:
            raise ValueError(
                "linear_start requires pairs of channels and two constants in each group of a norm: "
                f"{channels} channels in {groups} groups have room for {room(channels, groups)} features, not "
                f"{features}; use fewer autoencoder.norm_num_groups, more block_out_channels, or linear_start=0"
            )


@torch.no_grad()
def start_linearly(autoencoder: Autoencoder, images: Tensor) -> LinearAutoencoder:
    """Initialize an autoencoder as the linear autoencoder of images [N, C, H, W] in [-1, 1], and return the latter.

    Latents then have mean 0 and variance 1 over these images. The codes of a codebook are set to latents of the images.

    Raises:
        ValueError: the first or last level has too few channels (`check_room`), or all images have the same color.
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
        _write(convolution, Affine(torch.eye(*convolution.weight.shape[:2])[:, :, None, None], None), alone=True)
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
        _write_entry(entry, step, level, (pairs, constant) if last else None)
        _set_zero(level)
        if not last:
            entry, step = level.downsamplers[0].conv, following
    _set_zero(encoder.mid_block)
    c = config.latent_channels
    _write_output(encoder.conv_norm_out, encoder.conv_out, linear.to_latents, x, pairs, constant)
    encoder.conv_out.weight[c:] = 0
    encoder.conv_out.bias[c:] = LOG_VARIANCE


def _write_decoder(decoder: Decoder, linear: LinearAutoencoder, images: Tensor, config: AutoencoderConfig) -> None:
    x = images + linear.center.bias[:, None, None]  # the targets of the decoder
    pairs = Pairs.of(config.block_out_channels[0], config.norm_num_groups, x.shape[1])
    constant = _constant(x, pairs)
    entry, step = decoder.conv_in, linear.from_latents
    _set_zero(decoder.mid_block)
    for level, following in zip(decoder.up_blocks, (*linear.up, None), strict=True):
        last = following is None
        _write_entry(entry, step, level, (pairs, constant) if last else None)
        _set_zero(level)
        if not last:
            entry, step = level.upsamplers[0].conv, following
    back = Affine(torch.eye(x.shape[1])[:, :, None, None], -linear.center.bias)
    _write_output(decoder.conv_norm_out, decoder.conv_out, back, x, pairs, constant)


def _write_entry(entry: nn.Conv2d, step: Affine, level: nn.Module, paired: tuple[Pairs, float] | None) -> None:
    """Write a step into a convolution and the shortcut of the level after it.

    The features are in the first channels. In the last level, which has `paired`, they are in pairs, and all other
    channels are zero.
    """
    shortcut, count = level.resnets[0].conv_shortcut, len(step.bias)
    identity = Affine(torch.eye(count)[:, :, None, None], torch.zeros(count))
    if isinstance(shortcut, nn.Identity):
        _write(entry, step if paired is None else _paired(step, *paired, len(entry.bias)), alone=paired is not None)
        return
    _write(entry, step)
    _write(
        shortcut,
        identity if paired is None else _paired(identity, *paired, len(shortcut.bias)),
        alone=paired is not None,
    )


def _write(convolution: nn.Conv2d, step: Affine, alone: bool = False) -> None:
    """Write a step [m, n, k, k] into a convolution, for its first m outputs and first n inputs.

    A kernel of 2 pixels is written to the first 2 of 3, one of 1 pixel to the middle. `alone` zeroes all other outputs.
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
    """A step with `channels` outputs: those of `step` in pairs, and the constants."""
    weight, bias = step.weight.new_zeros(channels, *step.weight.shape[1:]), step.bias.new_zeros(channels)
    weight[pairs.plus], weight[pairs.minus] = step.weight, -step.weight
    bias[pairs.plus], bias[pairs.minus] = step.bias, -step.bias
    bias[pairs.high], bias[pairs.low] = constant, -constant
    return Affine(weight, bias)


def _set_zero(level: nn.Module) -> None:
    """Set the last layers of residual branches and attention of a level to zero."""
    last = [resnet.conv2 for resnet in level.resnets] + [attention.to_out[0] for attention in level.attentions]
    for layer in last:
        layer.weight.zero_()
        layer.bias.zero_()


def _constant(x: Tensor, pairs: Pairs) -> float:
    """K for features x [N, n, H, W]."""
    return CONSTANT * _energy(x, pairs).max().sqrt().item()


def _energy(x: Tensor, pairs: Pairs) -> Tensor:
    """The sum of the mean squares of the features x [N, n, H, W] in each group: [groups]."""
    return torch.zeros(len(pairs.high)).index_add(0, pairs.group, x.square().mean(dim=(0, 2, 3)))


def _write_output(
    norm: nn.GroupNorm, convolution: nn.Conv2d, step: Affine, x: Tensor, pairs: Pairs, constant: float
) -> None:
    """Make conv(silu(norm(.))) a 1x1 step of the features in pairs; x [N, n, H, W] are values of these features."""
    size = norm.num_channels // norm.num_groups
    deviation = ((2 * constant**2 + 2 * _energy(x, pairs)) / size).sqrt()[pairs.group]  # [n], of each feature's group
    spreads = x.square().mean(dim=(0, 2, 3)).sqrt()  # [n]
    gain = SPREAD * deviation / spreads.clamp(min=SMALLEST * spreads.max().item())
    norm.weight[pairs.plus] = norm.weight[pairs.minus] = gain.to(norm.weight)
    norm.weight[torch.cat([pairs.high, pairs.low])] = 0  # no layer reads the constants
    weight, middle = (step.weight[:, :, 0, 0] * deviation / gain).to(norm.weight), convolution.weight.shape[-1] // 2
    m = len(step.bias)
    for places in (pairs.plus, pairs.minus, pairs.high, pairs.low):
        convolution.weight[:, places] = 0
    convolution.weight[:m, pairs.plus, middle, middle] = weight
    convolution.weight[:m, pairs.minus, middle, middle] = -weight
    convolution.bias[:m] = step.bias.to(norm.weight)


def _spread_codes(autoencoder: Autoencoder, latents: Tensor) -> None:
    """Set codes to evenly spaced latents [N, c, h, w]; if there are more codes than latents, the last do not change."""
    codes = autoencoder.quantize.embedding.weight
    vectors = autoencoder.quant_conv(latents.to(codes)).permute(0, 2, 3, 1).flatten(0, 2)  # [N h w, d]
    count = min(len(codes), len(vectors))
    codes[:count] = vectors[torch.linspace(0, len(vectors) - 1, count).long()].to(codes)
