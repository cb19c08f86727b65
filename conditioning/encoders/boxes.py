"""Boxes as sines of their corners' coordinates, a token per object (Li et al. 2023, arXiv:2301.07093, GLIGEN).

LDM's layout model learns a vector for each cell of a grid. Here near corners are alike from the start, which a small
model learns from far fewer pictures (docs/tasks/layout.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.bert import empty_embedding

MODEL_TYPE = "boxes"  # our mark in text_encoder/config.json
MARK = {"model_type": MODEL_TYPE, "architectures": ["BoxEncoder"]}
FREQUENCIES = 8  # sines and cosines per coordinate; GLIGEN's
BASE = 100.0  # frequency k is BASE ** (k / FREQUENCIES), in radians per side of the picture; GLIGEN's temperature
HIDDEN = "hidden_layers"  # of the perceptron, in config.json


class BoxEncoder(nn.Module):
    """Ids [B, 3 n + 2] of `LayoutTokenizer` -> tokens [B, n + 1, d] of n objects and of the whole picture.

    Where there is no object, the class that stands for none goes without coordinates. The last token is there for what
    lies in no box.

    Args:
        config: "vocab_size", "d_model" (d), "hidden_layers" (of 4 d each); what config.json holds.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = {**config, **MARK}
        width, hidden = config["d_model"], config[HIDDEN]
        self.none, self.side = config["vocab_size"] - 1, math.isqrt(config["vocab_size"])
        self.classes = empty_embedding(config["vocab_size"], width)
        self.whole = nn.Parameter(torch.empty(width))  # in a class's place, of the whole picture
        widths = [width + 4 * 2 * FREQUENCIES, *[4 * width] * hidden, width]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, n + 1, d]; a layout has no mask."""
        objects, crop = ids[:, :-2].unflatten(1, (-1, 3)), ids[:, None, -2:]  # [B, n, 3], [B, 1, 2]
        names = torch.cat([self.classes(objects[..., 0]), self.whole.expand(len(ids), 1, -1)], 1)
        there = F.pad(objects[..., 0] != self.none, (0, 1), value=True)
        places = self._waves(torch.cat([objects[..., 1:], crop], 1)) * there[..., None]
        x = torch.cat([names, places], -1)  # [B, n + 1, d + 8 FREQUENCIES]
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.norm(self.layers[-1](x))

    def weights(self) -> dict[str, Tensor]:
        """Parameters by their names here: no other program has them."""
        return self.state_dict()

    def _waves(self, cells: Tensor) -> Tensor:
        """Cells [..., 2] of two corners -> sines, then cosines, of their coordinates from 0 to 1."""
        corners = torch.stack([cells % self.side, cells // self.side], -1).flatten(-2) / max(self.side - 1, 1)
        steps = torch.arange(FREQUENCIES, device=cells.device) / FREQUENCIES
        angles = (corners[..., None] * BASE**steps).flatten(-2)  # float32: half precision would miss by 0.1
        return torch.cat([angles.sin(), angles.cos()], -1).to(self.whole.dtype)


def boxes_config(config: dict[str, Any]) -> dict[str, Any]:
    """What of config.json makes a BoxEncoder. Raises KeyError where something is missing."""
    return {name: config[name] for name in ("vocab_size", "d_model", HIDDEN)}


def empty_boxes(config: dict[str, Any]) -> BoxEncoder:
    """A BoxEncoder whose parameters are not yet allocated; load_state_dict(assign=True) gives it some."""
    with torch.device("meta"):
        return BoxEncoder(config)


def random_boxes(vocab_size: int, width: int, hidden_layers: int, seed: int) -> BoxEncoder:
    """A BoxEncoder with weights drawn from the seed, no global state touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        boxes = BoxEncoder({"vocab_size": vocab_size, "d_model": width, HIDDEN: hidden_layers})
        for table in (boxes.classes.weight, boxes.whole):
            nn.init.normal_(table)
    return boxes
