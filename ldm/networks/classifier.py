"""A classifier of noisy latents, log p(y | z_t, t): half a UNet and a head (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.denoising.prediction import per_image
from ldm.networks.attention import Attention, Signal
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import Schedule, ScheduleConfig
from stipple_core.nearest import did_you_mean
from stipple_core.operators.normalization import norm_silu
from stipple_core.operators.sinusoids import sinusoids


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The shape of a classifier, and what it was trained on.

    Raises:
        ValueError: a value is invalid.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)  # the config of which the down and mid blocks are used
    pool: str = "attention"  # a key of POOLS: from features of all places to features of the image
    names: tuple[str, ...] = ()  # of the classes, in the order of the logits
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # noise levels that it was trained on
    autoencoder: str = ""  # fingerprint of the autoencoder of its latents

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown; use one of {', '.join(POOLS)}")
        if self.unet.cross_attention_dim is not None or self.unet.vector_dim is not None:
            raise ValueError("a classifier has no context; set unet.cross_attention_dim and unet.vector_dim to null")

    def row(self, name: str) -> int:
        """The index of a class by its name, ignoring case. Raises ValueError for an unknown name."""
        rows = {name.lower(): row for row, name in enumerate(self.names)}
        if (text := name.strip().lower()) in rows:
            return rows[text]
        near = did_you_mean(text, rows, cutoff=0.6)
        fix = f"did you mean {near!r}?" if near else f"there are {', '.join(self.names[:20])}"
        raise ValueError(f"{name!r:.80} is no class of the classifier; {fix}")


class AttentionPool(nn.Module):
    """Attention of the mean to all places and itself: [B, C, h, w] -> [B, C] (Radford et al. 2021).

    It has no position embeddings, so images may have any size.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.attention = Attention(channels, heads, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)  # [B, h * w, C]
        mean = places.mean(1, keepdim=True)  # [B, 1, C]
        return self.attention(mean, torch.cat([mean, places], 1))[:, 0]  # [B, C]


class MeanPool(nn.Module):
    """The mean of all places: [B, C, h, w] -> [B, C]."""

    def __init__(self, channels: int, heads: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


POOLS: dict[str, Callable[[int, int], nn.Module]] = {"attention": AttentionPool, "mean": MeanPool}


class Classifier(nn.Module):
    """A classifier of noisy latents at a timestep; parameter names are those of the UNet, `pool` and `head`."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        shape, whole = config.unet, UNet(config.unet)
        self.conv_in, self.time_embedding = whole.conv_in, whole.time_embedding
        self.down_blocks, self.mid_block = whole.down_blocks, whole.mid_block
        channels = shape.block_out_channels[-1]
        self.norm_out = nn.GroupNorm(shape.norm_num_groups, channels, eps=shape.norm_eps)
        self.pool = POOLS[config.pool](channels, shape.attention_heads[-1])
        self.head = nn.Linear(channels, len(config.names))

    def forward(self, z_t: Tensor, timestep: Tensor) -> Tensor:
        """Logits [B, classes] of z_t [B, c, h, w] at timesteps [B], as `Schedule.timestep` returns them."""
        embedding = self.time_embedding(sinusoids(timestep, self.config.unet.block_out_channels[0]).to(z_t.dtype))
        signal, x = Signal(F.silu(embedding)), self.conv_in(z_t)  # [B, C0, h, w]
        for level in self.down_blocks:
            for index in range(len(level.resnets)):
                x = level.layer(index, x, signal)
            for downsampler in level.downsamplers:
                x = downsampler(x, signal.embedding)  # [B, C, h / 2, w / 2]
        for index in range(len(self.mid_block.resnets)):
            x = self.mid_block.layer(index, x, signal)
        return self.head(self.pool(norm_silu(self.norm_out, x)))  # [B, C, h, w] -> [B, classes]


def classify(network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, z_t: Tensor, t: Tensor | float) -> Tensor:
    """Logits [B, classes] of z_t [B, c, h, w] at times t (one, or [B]) of the network's schedule."""
    alpha, sigma = schedule(t, torch.float64)
    z_in = z_t / per_image(torch.hypot(alpha, sigma), z_t) if schedule.unit_input else z_t
    return network(z_in, schedule.timestep(t).to(z_t.device).expand(len(z_t)))


def translated(z_t: Tensor, t: float, schedule: Schedule, target: Schedule) -> tuple[Tensor, float]:
    """The same noisy latents on the schedule `target`: at the time of equal sigma / alpha, and in its scale."""
    if schedule.config == target.config:
        return z_t, t
    alpha, sigma = schedule(t, torch.float64)
    time = target.time(sigma / alpha).item()
    return z_t * (target(time)[0] / alpha).item(), time


def with_names(config: ClassifierConfig, names: list[str]) -> ClassifierConfig:
    """The config with the names of its classes. Raises ValueError for fewer than two classes."""
    if len(names) < 2:
        raise ValueError(f"a classifier needs at least two classes; found {', '.join(names) or 'none'}")
    return replace(config, names=tuple(names))
