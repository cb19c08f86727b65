"""Conditioning by concatenation (Rombach et al. 2022, section 3.3): a hint, aligned with z, is concatenated to z_t.

`conditioning.hints.hints` lists the hints: semantic maps, masked images, small images, depths and edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.hints.hints import HINTS, SpatialConfig
from conditioning.hints.masks import CONVENTIONS
from conditioning.interface.context import Context
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from stipple_core.operators.sinusoids import sinusoids

LEVEL_WIDTH = 128  # of the embedding of the noise level of a low-resolution image
LEVEL_SCALE = 1000  # noise levels are embedded like timesteps, which go from 0 to about 1000


class SpatialReader(InputReader):
    """ConditionInputs.hint [B, k, H, W] -> Context with latents [B, c, h, w], and a vector if noise was added.

    Attributes:
        hint: Makes hints from training images and from a user's files.
        encode: Images [B, 3, H, W] -> latents [B, c, h, w], required for inpainting; `bind_encoder` sets it.
    """

    Config = SpatialConfig

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.config = config
        self.hint = HINTS[config.kind](config)
        self.reads = frozenset({"hint", "map"}) if self.hint.needs_map else frozenset({"hint"})
        self.encode: Callable[[Tensor], Tensor] | None = None
        self.aligned = ALIGNED[config.kind](config)
        self.trainable, self.survives_dropout = any(True for _ in self.aligned.parameters()), not config.drop
        vector = LEVEL_WIDTH if self.hint.has_noise_level else 0
        self.widths = Widths(latents=self.aligned.channels, vector=vector)

    @property
    def hint_channels(self) -> int:
        """k of the hint [B, k, H, W]."""
        return self.hint.channels

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Set the encoder of masked images: [B, 3, H, W] -> latents [B, c, h, w]."""
        self.encode = encode

    def forward(self, inputs: ConditionInputs) -> Context:
        """Return the latents of the hint; with `config.drop`, zeros for dropped members. Raises ValueError."""
        hint, f = inputs.hint, self.config.downsampling
        if hint.shape[1] != self.hint_channels or hint.shape[2] % f or hint.shape[3] % f:
            raise ValueError(
                f"a hint of shape {list(hint.shape[1:])} does not fit spatial.kind {self.config.kind}, which requires "
                f"{self.hint_channels} channels, and height and width divisible by {f}"
            )
        latents = self.aligned(hint, self.encode)  # [B, k, H, W] -> [B, c, H / f, W / f]
        if self.config.drop:
            latents = latents.masked_fill(inputs.is_dropped.to(latents.device)[:, None, None, None], 0.0)
        vector = level_embedding(hint[:, -1, 0, 0]) if self.hint.has_noise_level else None
        return Context(latents=latents, vector=vector)


class RescaledMap(nn.Module):
    """Class numbers [B, 1, H, W] -> [B, c, h, w]: one-hot, halving, 1x1 convolution (LDM's SpatialRescaler)."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.classes, self.channels = config.classes, config.channels
        self.halvings = config.downsampling.bit_length() - 1
        self.channel_mapper = nn.Conv2d(config.classes, config.channels, 1, bias=False)

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        numbers = torch.arange(self.classes, device=hint.device)[:, None, None]
        x = (hint.round() == numbers).to(self.channel_mapper.weight.dtype)  # [B, 1, H, W] -> [B, classes, H, W]
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")  # [B, classes, h, w]
        return self.channel_mapper(x)  # [B, c, h, w]


class MaskedLatents(nn.Module):
    """An image without its masked pixels, and the mask, [B, 4, H, W] -> latents of the image and small mask.

    The order of the two, and the values of masked pixels and of the mask, are the model's `Convention`.
    """

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.convention, self.channels = CONVENTIONS[config.convention], config.latent_channels + 1

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        convention = self.convention
        with torch.no_grad():
            latents = encode(hint[:, :3])  # [B, 3, H, W] -> [B, c, h, w]
        mask = F.interpolate(hint[:, 3:], size=latents.shape[2:]).to(latents)  # [B, 1, H, W] -> [B, 1, h, w], nearest
        mask = convention.unmasked + (convention.masked - convention.unmasked) * mask
        return torch.cat([mask, latents] if convention.mask_first else [latents, mask], dim=1)


class Shrunk(nn.Module):
    """A small image that was enlarged to H x W, [B, 3 or 4, H, W] -> [B, 3, h, w], by area means."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.channels, self.downsampling = 3, config.downsampling

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        return hint[:, :3] if self.downsampling == 1 else F.avg_pool2d(hint[:, :3], self.downsampling)


class Stretched(nn.Module):
    """Depths or edges [B, 1, H, W] -> [B, 1, h, w], scaled to -1 to 1 in each member (Stable Diffusion 2, depth)."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.channels, self.downsampling = 1, config.downsampling

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        size = [side // self.downsampling for side in hint.shape[2:]]
        x = F.interpolate(hint, size=size, mode="bicubic")  # [B, 1, H, W] -> [B, 1, h, w]
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        flat = high - low <= 1e-6 * high.abs()  # constant
        return torch.where(flat, 0.0, 2 * (x - low) / (high - low).where(~flat, 1) - 1)


ALIGNED: dict[str, type[nn.Module]] = {
    "semantic": RescaledMap,
    "inpainting": MaskedLatents,
    "low_resolution": Shrunk,
    "depth": Stretched,
    "edges": Stretched,
}


def level_embedding(level: Tensor) -> Tensor:
    """Embed noise levels [B] from 0 to 1 as [B, LEVEL_WIDTH] (Saharia et al. 2022, Imagen, section 2.4)."""
    return sinusoids(LEVEL_SCALE * level.float(), LEVEL_WIDTH)
