"""Networks that also output the variance of DDPM steps (Nichol & Dhariwal 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class LearnedVariance:
    """Wraps a network of 2c output channels as one of c channels for `Denoiser`, and keeps the other half.

    `ddpm(..., variance="learned", interpolation=network.interpolation)` reads it after each call.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Any], Tensor]):
        self.network = network
        self.rest: Tensor | None = None  # the other c channels of the last call

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any = None) -> Tensor:
        """The first half of the network's output: [B, c, h, w] for z_t [B, c, h, w].

        Raises:
            ValueError: the network's output does not have twice the channels of z_t.
        """
        output = self.network(z_t, timestep, context)  # [B, 2 c, h, w]
        channels, expected = output.shape[1], 2 * z_t.shape[1]
        if channels != expected:
            raise ValueError(
                f"the network outputs {channels} channels, a learned variance needs {expected}, twice those of the "
                "latents; use variance small or large"
            )
        output, self.rest = output.chunk(2, 1)  # 2 x [B, c, h, w]
        return output

    def interpolation(self) -> Tensor:
        """v [B, c, h, w] of the last call, 0 for the small variance, 1 for the large (Nichol & Dhariwal 2021, eq. 15).

        Networks are trained to output it as 2 v - 1. v is not limited to [0, 1].

        Raises:
            ValueError: the network has not been called.
        """
        if self.rest is None:
            raise ValueError("the network has not been called yet, so there is no variance; call it first")
        return (self.rest + 1) / 2
