"""The patch discriminator of reconstructions (Isola et al. 2017, section 3.2.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)


NORMS = {"group": _group_norm, "batch": nn.BatchNorm2d}


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Options of `PatchDiscriminator`."""

    channels: int = 64  # of the first layer; each further layer doubles them, up to eightfold
    layers: int = 3  # strided layers; the receptive field is 16, 34, 70 or 142 pixels for 1, 2, 3 or 4
    norm: str = "group"  # "group", or LDM's "batch", whose statistics depend on how a batch is split over processes


class PatchDiscriminator(nn.Module):
    """Maps images [B, 3, H, W] to logits [B, 1, h, w] of patches, and the activations of all layers, finest first.

    Raises:
        ValueError: the norm is unknown.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3):
        super().__init__()
        if config.norm not in NORMS:
            raise ValueError(f"discriminator norm {config.norm!r} is unknown; use one of {', '.join(NORMS)}")
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        stages = [nn.Sequential(nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2))]
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            convolution = nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, NORMS[config.norm](widths[i]), nn.LeakyReLU(0.2)))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        x = images
        for stage in self.stages:
            x = stage(x)  # [B, C, H, W] -> [B, C', H/2, W/2], the last at stride 1
            features.append(x)
        return self.head(x), features
