"""Small UNets with random weights, and their contexts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig

SMALL = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(True, False),
    attention_heads=(2, 4),
    cross_attention_dim=12,
    norm_num_groups=8,
)
# the options of LDM's churches model: attention without context, residual blocks between levels, AdaGN
PLAIN = replace(SMALL, attention="plain", cross_attention_dim=None, resample="residual", scale_shift=True)


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet with random values also in layers that are initialized to zero, so that all parameters matter."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return unet


def context(batch: int = 2, tokens: int = 5, width: int | None = 12, **parts) -> SimpleNamespace:
    """A context of random tokens [batch, tokens, width], and other parts."""
    words = None if width is None else torch.randn(batch, tokens, width)
    absent = dict.fromkeys(("mask", "vector", "latents", "guidance"))
    return SimpleNamespace(**({"tokens": words} | absent | parts))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors are equal up to a fraction of the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
