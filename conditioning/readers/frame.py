"""Conditioning on image size and crop (Podell et al. 2023, section 2.2).

A model that reads them can be trained on small images too. When it is conditioned on an uncropped image, it does not
draw objects that are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

from conditioning.interface.context import Context
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from stipple_core.operators.sinusoids import sinusoids

NUMBERS = 6  # of ConditionInputs.frame


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """How size and crop are embedded as a vector.

    Raises:
        ValueError: The width is odd or less than 2.
    """

    width: int = 256  # sines and cosines per number; SDXL: 256, so 1536 in all

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise ValueError(f"frame.width {self.width} must be even and at least 2 (sines and cosines); try 256")


class FrameReader(InputReader):
    """ConditionInputs.frame [B, 6] in pixels -> Context with vector [B, 6 * width]; has no weights.

    The frame survives caption dropout, because images without a caption have a size too.
    """

    reads = frozenset({"frame"})
    survives_dropout = True
    Config = FrameConfig

    def __init__(self, config: FrameConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = Widths(vector=NUMBERS * config.width)

    def forward(self, inputs: ConditionInputs) -> Context:
        """Return cosines, then sines, of each number in turn, as diffusers' StableDiffusionXLPipeline."""
        return Context(vector=sinusoids(inputs.frame, self.config.width).flatten(1))  # [B, 6] -> [B, 6 * width]
