"""Conditioning by concatenation (Rombach et al. 2022, section 3.3): a picture aligned with z, as channels beside z_t.

The picture is a `hint`, see `conditioning.hints.hints`: a semantic map, a masked picture, a smaller picture, depths, edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.hints.degradation import DegradationConfig
from conditioning.hints.hints import CONVENTIONS, HINTS
from conditioning.hints.masks import MaskConfig
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import Widths
from conditioning.readers.frame import waves

LEVEL_WIDTH = 128  # of the vector that tells the noise of a low-resolution picture
LEVEL_SCALE = 1000  # levels are embedded as timesteps are, which go from 0 to about 1000


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """Which dense picture a model reads beside z_t, and how it is told.

    Raises:
        ValueError: an unknown kind or convention, or numbers that go with no picture.
    """

    kind: str  # a key of HINTS: semantic | inpainting | low_resolution | depth | edges
    downsampling: int = 8  # pixels per latent along a side, as the autoencoder's; 1 for a model of pixels
    drop: bool = False  # caption dropout drops it, too, so that guidance strengthens it; else it is always told
    classes: int = 182  # semantic: of the maps; numbers from there on are of no class
    channels: int = 3  # semantic: that a trained 1x1 convolution makes of the classes
    latent_channels: int = 4  # inpainting: of the autoencoder
    convention: str = "stable_diffusion"  # inpainting: a key of CONVENTIONS, stable_diffusion | ldm
    noise: float = 0.0  # low_resolution: the most noise that training adds, 0 to 1; above 0 the UNet is told how much
    masks: MaskConfig = field(default_factory=MaskConfig)  # inpainting: as training draws them
    degradation: DegradationConfig = field(default_factory=DegradationConfig)  # low_resolution: as training makes it

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, HINTS), ("convention", self.convention, CONVENTIONS)):
            if value not in known:
                raise ValueError(f"spatial.{name} {value!r} is unknown; use one of {', '.join(known)}")
        for name in ("downsampling", "classes", "channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"spatial.{name} {getattr(self, name)} must be at least 1")
        if self.kind == "semantic" and self.downsampling & (self.downsampling - 1):
            raise ValueError(
                f"spatial.downsampling {self.downsampling} is no power of 2, but maps are halved to latents"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"spatial.noise {self.noise} must be between 0 (none) and 1 (nothing else)")
        factor = self.degradation.factor
        if self.kind == "low_resolution" and self.downsampling > factor:
            raise ValueError(
                f"spatial.degradation.factor {factor} is less than downsampling {self.downsampling}: latents would be "
                f"coarser than the picture that they are told; use a factor of {self.downsampling} or more"
            )


class SpatialReader(nn.Module):
    """Given.hint [B, k, H, W] -> Context with latents [B, c, h, w], and with a vector where noise was added.

    Attributes:
        hint: makes hints, in training and of a user's files.
        encode: images [B, 3, H, W] -> latents [B, c, h, w]; inpainting needs it, `CombinedConditioner.see_by` sets it.
    """

    Config = SpatialConfig

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.config = config
        self.hint = HINTS[config.kind](config)
        self.reads = frozenset({"hint", "map"}) if self.hint.needs_map else frozenset({"hint"})
        self.encode: Callable[[Tensor], Tensor] | None = None
        self.aligned = ALIGNED[config.kind](config)
        self.trainable, self.kept = any(True for _ in self.aligned.parameters()), not config.drop
        vector = LEVEL_WIDTH if self.hint.has_noise_level else 0
        self.widths = Widths(latents=self.aligned.channels, vector=vector)

    @property
    def hint_channels(self) -> int:
        """k of the hint [B, k, H, W]."""
        return self.hint.channels

    def forward(self, given: ConditionInputs) -> Context:
        """Latents of the hint; zeros for those that are dropped, if the config says so. Raises ValueError."""
        hint, f = given.hint, self.config.downsampling
        if hint.shape[1] != self.hint_channels or hint.shape[2] % f or hint.shape[3] % f:
            raise ValueError(
                f"a hint of shape {list(hint.shape[1:])} does not fit spatial.kind {self.config.kind}, which reads "
                f"{self.hint_channels} channels and sides that {f} divides"
            )
        latents = self.aligned(hint, self.encode)  # [B, k, H, W] -> [B, c, H / f, W / f]
        if self.config.drop:
            latents = latents.masked_fill(given.is_dropped.to(latents.device)[:, None, None, None], 0.0)
        vector = level_embedding(hint[:, -1, 0, 0]) if self.hint.has_noise_level else None
        return Context(latents=latents, vector=vector)


class RescaledMap(nn.Module):
    """Class numbers [B, 1, H, W] -> [B, c, h, w]: one-hot, halved by bilinear means, mapped (LDM's SpatialRescaler)."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.classes, self.channels = config.classes, config.channels
        self.halvings = config.downsampling.bit_length() - 1
        self.channel_mapper = nn.Conv2d(config.classes, config.channels, 1, bias=False)

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        known = torch.arange(self.classes, device=hint.device)[:, None, None]
        x = (hint.round() == known).to(self.channel_mapper.weight.dtype)  # [B, 1, H, W] -> [B, classes, H, W]
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")  # [B, classes, h, w]
        return self.channel_mapper(x)  # [B, c, h, w]


class MaskedLatents(nn.Module):
    """A picture and the mask of what is missing, [B, 4, H, W] -> its latents without that part, and the mask.

    The order, and the values that are put into the hole and for the mask, are a convention of those who train.
    """

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.convention, self.channels = CONVENTIONS[config.convention], config.latent_channels + 1

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        convention = self.convention
        with torch.no_grad():
            latents = encode(hint[:, :3])  # [B, 3, H, W] -> [B, c, h, w]
        mask = F.interpolate(hint[:, 3:], size=latents.shape[2:]).to(latents)  # [B, 1, H, W] -> [B, 1, h, w], nearest
        mask = convention.kept + (convention.missing - convention.kept) * mask
        return torch.cat([mask, latents] if convention.mask_first else [latents, mask], dim=1)


class Shrunk(nn.Module):
    """A low-resolution picture that was brought to H x W, [B, 3 or 4, H, W] -> [B, 3, h, w] by means over areas."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.channels, self.downsampling = 3, config.downsampling

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        return hint[:, :3] if self.downsampling == 1 else F.avg_pool2d(hint[:, :3], self.downsampling)


class Stretched(nn.Module):
    """Depths or edges [B, 1, H, W] -> [B, 1, h, w] from -1 to 1 in each picture (Stable Diffusion 2, depth)."""

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__()
        self.channels, self.downsampling = 1, config.downsampling

    def forward(self, hint: Tensor, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        size = [side // self.downsampling for side in hint.shape[2:]]
        x = F.interpolate(hint, size=size, mode="bicubic")  # [B, 1, H, W] -> [B, 1, h, w]
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        flat = high - low <= 1e-6 * high.abs()  # nothing is nearer than anything else
        return torch.where(flat, 0.0, 2 * (x - low) / (high - low).where(~flat, 1) - 1)


ALIGNED: dict[str, type[nn.Module]] = {
    "semantic": RescaledMap,
    "inpainting": MaskedLatents,
    "low_resolution": Shrunk,
    "depth": Stretched,
    "edges": Stretched,
}


def level_embedding(level: Tensor) -> Tensor:
    """Noise levels [B] from 0 to 1 as cosines, then sines [B, LEVEL_WIDTH] (Saharia et al. 2022, Imagen, sec. 2.4)."""
    return waves(LEVEL_SCALE * level.float(), LEVEL_WIDTH)
