"""Size and crop as a condition: how large a picture was, which part is seen (Podell et al. 2023, section 2.2).

Trained with them, a model need not throw small pictures away, and told that nothing was cut off, it cuts off no heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import CombinedConditioner, Widths

NAME = "frame"  # of the section in a config, and of the reader
NUMBERS = 6  # of Given.frame
LONGEST_PERIOD = 10000  # of a sinusoid, over 2 pi; as for timesteps


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """How six numbers become a vector.

    Raises:
        ValueError: the width is odd or not positive.
    """

    width: int = 256  # sines and cosines per number; SDXL: 256, so 1536 in all

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise ValueError(f"frame.width {self.width} must be even and at least 2: a cosine for each sine; try 256")


class FrameReader(nn.Module):
    """Given.frame [B, 6] in pixels -> Context with vector [B, 6 * width]; has no weights.

    The frame is kept where captions are dropped: a picture without a caption has a size, too.
    """

    reads = frozenset({"frame"})
    trainable = False
    kept = True
    Config = FrameConfig

    def __init__(self, config: FrameConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = Widths(vector=NUMBERS * config.width)

    def forward(self, given: ConditionInputs) -> Context:
        """Cosines, then sines, of each number in turn, as diffusers' StableDiffusionXLPipeline has them."""
        return Context(vector=waves(given.frame, self.config.width).flatten(1))  # [B, 6] -> [B, 6 * width]


def waves(numbers: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of each number [...], as timesteps are embedded: [..., width]."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[..., None] * torch.exp(steps * (-math.log(LONGEST_PERIOD) / half))  # [..., half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def with_frame(conditioner: nn.Module, width: int | None) -> nn.Module:
    """The conditioner of a model of others, with the reader of the frame that its UNet is told (None: it is not)."""
    if width is None or NAME in conditioner.readers:
        return conditioner
    return CombinedConditioner(
        conditioner.prompts, {**conditioner.readers, NAME: FrameReader(FrameConfig(width=width))}
    )
