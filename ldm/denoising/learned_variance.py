"""Networks that also say how much noise a DDPM step should draw (Nichol & Dhariwal 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class LearnedVariance:
    """A network of 2c output channels as the network of c that a `Denoiser` wants; it remembers the other half.

    `ddpm(..., variance="learned", interpolation=network.interpolation)` reads that after each call.
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
        channels, wanted = output.shape[1], 2 * z_t.shape[1]
        if channels != wanted:
            raise ValueError(
                f"the network outputs {channels} channels, a learned variance needs {wanted}, twice those of the "
                "latents; use variance small or large"
            )
        output, self.rest = output.chunk(2, 1)  # 2 x [B, c, h, w]
        return output

    def interpolation(self) -> Tensor:
        """v [B, c, h, w] of the last call, 0 for the small variance, 1 for the large (Nichol & Dhariwal 2021, eq. 15).

        Networks are trained to output it as 2 v - 1. Nothing holds v between 0 and 1.

        Raises:
            ValueError: the network has not been called.
        """
        if self.rest is None:
            raise ValueError("the network has said no variance yet; call it first")
        return (self.rest + 1) / 2
