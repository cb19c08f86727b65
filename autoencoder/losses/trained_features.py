"""A perceptual distance without a download: features of a small network that is trained on the training images.

The network learns to predict how an image was rotated (Gidaris et al. 2018) and how it was degraded (blur, noise, ...).
The first task requires features of shapes, the second those of fine texture, which blurry reconstructions lack. The
distance is that of LPIPS with equal weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.losses.lpips import unit_difference


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options of `FeatureNetwork` and its training."""

    channels: tuple[int, ...] = (16, 32, 64, 64)  # per stage; all stages but the first halve the size
    steps: int = 400  # of training
    batch_size: int = 32  # images per step, in the iterator passed to train_features
    learning_rate: float = 2e-3  # of Adam, decreases linearly to 0


def _blur(images: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(images, (width // 2,) * 4, mode="replicate"), width, stride=1)


def _coarsen(images: Tensor, factor: int) -> Tensor:
    small = F.interpolate(images, scale_factor=1.0 / factor, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=generator).to(images)


DEGRADATIONS = {
    "none": lambda images, generator: images,
    "blur 3": lambda images, generator: _blur(images, 3),
    "blur 5": lambda images, generator: _blur(images, 5),
    "coarser 2": lambda images, generator: _coarsen(images, 2),
    "coarser 4": lambda images, generator: _coarsen(images, 4),
    "noise": _noise,
}
TURNS = 4


class FeatureNetwork(nn.Module):
    """A few convolutional stages, and two classification heads that are used only in training.

    Its weights lie in memory in the channels_last order from the beginning, and keep it when they are trained or
    loaded: the order chooses the kernels, and other kernels may give other bits.
    """

    def __init__(self, config: FeatureConfig):
        super().__init__()
        widths = (3, *config.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i else 1, padding=1),
                nn.ReLU(),
                nn.Conv2d(widths[i + 1], widths[i + 1], 3, padding=1),
            )
            for i in range(len(config.channels))
        )
        self.turn = nn.Linear(widths[-1], TURNS)
        self.degradation = nn.Linear(sum(config.channels), len(DEGRADATIONS))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the activations of the stages, [B, C, H / 2^i, W / 2^i], for images [B, 3, H, W]."""
        x, activations = images, []
        for stage in self.stages:
            x = stage(x).relu()
            activations.append(x)
        return activations

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of rotations [B, 4] and of degradations [B, 6]."""
        pooled = [activation.mean(dim=(2, 3)) for activation in self(images)]
        return self.turn(pooled[-1]), self.degradation(torch.cat(pooled, dim=1))


class FeatureDistance(nn.Module):
    """Distance [B] of images and reconstructions [B, 3, H, W] in features of a frozen `FeatureNetwork`."""

    def __init__(self, network: FeatureNetwork):
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        features = self.network(reconstructions)
        with torch.no_grad():
            image_features = self.network(images)
        pairs = zip(features, image_features, strict=True)
        distances = [unit_difference(a, b).sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(distances).mean(dim=0)  # [B]


def train_features(
    network: FeatureNetwork, images: Iterator[Tensor], config: FeatureConfig, generator: torch.Generator
) -> list[float]:
    """Initialize and train a network in place for `config.steps` batches; return the loss of each step.

    The result depends only on the arguments, so each process can train its own copy. Save the weights with the run.

    Args:
        network: the network. It is frozen afterwards.
        images: an endless iterator of square batches [B, 3, S, S] in [-1, 1].
        config: steps and learning rate.
        generator: a CPU generator for initial weights, rotations and degradations.
    """
    device = next(network.parameters()).device
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            weight = torch.randn(module.weight.shape, generator=generator) * (2.0 / fan_in) ** 0.5
            module.weight.data.copy_(weight)
            module.bias.data.zero_()
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    losses = []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1.0 - step / config.steps)
        batch = next(images).to(device, memory_format=torch.channels_last)
        turns = torch.randint(TURNS, (len(batch),), generator=generator)
        kinds = torch.randint(len(DEGRADATIONS), (len(batch),), generator=generator)
        turn_logits, kind_logits = network.classify(disturb(batch, turns, kinds, generator))
        loss = F.cross_entropy(turn_logits, turns.to(device)) + F.cross_entropy(kind_logits, kinds.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.requires_grad_(False)
    return losses


@torch.no_grad()
def disturb(images: Tensor, turns: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate images [B, 3, S, S] by 90 degrees `turns` [B] times, then apply the degradations numbered `kinds` [B]."""
    result = torch.empty_like(images)
    for turn in range(TURNS):
        for kind, degrade in enumerate(DEGRADATIONS.values()):
            chosen = ((turns == turn) & (kinds == kind)).to(images.device)
            result[chosen] = degrade(torch.rot90(images[chosen], turn, dims=(2, 3)), generator)
    return result
