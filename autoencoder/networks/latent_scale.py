"""Changing mean and scale of the networks' latents by changing the 1x1 convolutions around them, and the codebook."""

from __future__ import annotations

import math

from torch import Tensor, nn


def subtract_mean(encode: nn.Conv2d, decode: nn.Conv2d, codes: Tensor | None, mean: Tensor) -> None:
    """Subtract a mean [c] from the latents without changing reconstructions.

    Args:
        encode: the last layer before the latents, changed in place. Its first c outputs are their mean.
        decode: the first layer after the latents, changed in place.
        codes: the codebook [K, c], changed in place. None: there is none.
        mean: float64 [c].
    """
    encode.bias[: len(mean)] -= mean.to(encode.bias)
    decode.bias += (decode.weight[:, :, 0, 0].double() @ mean).to(encode.bias)
    if codes is not None:
        codes -= mean.to(encode.bias)


def rescale(encode: nn.Conv2d, decode: nn.Conv2d, codes: Tensor | None, shift: float, gain: float) -> None:
    """Replace the latents z by (z - shift) * gain without changing reconstructions; arguments as in `subtract_mean`."""
    c = decode.in_channels
    decode.bias += decode.weight[:, :, 0, 0].double().sum(1).mul(shift).to(decode.bias)
    decode.weight /= gain
    encode.weight[:c] *= gain
    encode.bias[:c] = (encode.bias[:c].double() - shift).mul(gain).to(encode.bias)
    if codes is None:
        encode.bias[c:] += 2 * math.log(gain)  # the log-variance
    else:
        codes.copy_((codes.double() - shift) * gain)
