"""A UNet as samplers call it: again and again, with the same context, on halves that guidance makes alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.unet import UNet


class Reader:
    """A UNet in its own dtype, on latents in theirs, that does nothing twice: (z_t, timestep, context) -> output.

    It reads a context once for as long as it is told the same object. On a CPU it looks whether both halves of a batch
    are the same latents, told different things, as guidance wants them.
    """

    def __init__(self, unet: UNet):
        self.unet, self.context, self.read = unet, None, None

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The UNet's output [B, c, h, w] for z_t [B, c, h, w] at timesteps [B], told a context of B or none at all."""
        if context is None:  # an unconditional model
            return self.unet(z_t.to(self.unet.conv_in.weight.dtype), timestep)
        if context is not self.context:
            self.context, self.read = context, self.unet.read(context)
        half = len(z_t) // 2
        if z_t.is_cpu and self.read.keys_values and self.read.vector is None and self.read.latents is None:
            if torch.equal(z_t[:half], z_t[half:]) and torch.equal(timestep[:half], timestep[half:]):
                z_t, timestep = z_t[:half], timestep[:half]
        return self.unet(z_t.to(self.unet.conv_in.weight.dtype), timestep, self.read)
