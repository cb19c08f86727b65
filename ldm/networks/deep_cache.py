"""Reuse of the inner features of a UNet, which change slowly between steps (Ma et al. 2024, DeepCache)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm.networks.unet import UNet

OUTER = 2  # outermost layers: the input convolution and the first layer; and the last two layers, which read them


class DeepCache:
    """A UNet that computes its inner layers once in every `reuse` calls, and its outer layers at each call."""

    def __init__(self, unet: UNet, reuse: int):
        self.unet, self.reuse, self.calls = unet, reuse, 0
        self.features: Tensor | None = None  # [B, C, h, w], input of the last `OUTER` layers at the last full call

    def reset(self) -> None:
        """Make the next call a full one."""
        self.calls = 0

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The UNet's output [B, c, h, w], see `UNet.forward`; exact at every `reuse`th call."""
        full = self.calls % self.reuse == 0
        self.calls += 1
        return self._full(z_t, timestep, context) if full else self._outer(z_t, timestep, context)

    def _full(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        skip_channels = self.unet.config.block_out_channels[0]

        def keep(module: nn.Module, arguments: tuple) -> None:
            self.features = arguments[0][:, :-skip_channels]  # [B, C + S, h, w] without the skip connection

        handle = self.unet.up_blocks[-1].resnets[-OUTER].register_forward_pre_hook(keep)
        try:
            return self.unet(z_t, timestep, context)
        finally:
            handle.remove()

    def _outer(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        unet = self.unet
        signal = unet.signal(z_t, timestep, context)
        first = unet.conv_in(unet.concatenated(z_t, context))  # [B, C0, h, w]
        skips = [first, unet.down_blocks[0].layer(0, first, signal)]
        x, last = self.features, unet.up_blocks[-1]
        for index in range(len(last.resnets) - OUTER, len(last.resnets)):
            x = last.layer(index, x, signal, skips.pop())
        return unet.output(x)
