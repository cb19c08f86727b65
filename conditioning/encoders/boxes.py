"""Encoder of boxes: Fourier features of the corners, one token per object (Li et al. 2023, arXiv:2301.07093, GLIGEN).

LDM's layout model learns an embedding for each cell of a grid. Fourier features make nearby corners similar before
training, so a small model needs far fewer images (docs/tasks/layout.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.transformer_layers import empty_embedding

MODEL_TYPE = "boxes"  # Stipple's own, in text_encoder/config.json
MARK = {"model_type": MODEL_TYPE, "architectures": ["BoxEncoder"]}
FREQUENCIES = 8  # sines and cosines per coordinate; GLIGEN's
BASE = 100.0  # frequency k is BASE ** (k / FREQUENCIES), in radians per side of the picture; GLIGEN's temperature
HIDDEN = "hidden_layers"  # key in config.json: number of hidden layers of the perceptron


class BoxEncoder(nn.Module):
    """Ids [B, 3 n + 2] of `LayoutTokenizer` -> tokens [B, n + 1, d] of n objects and of the whole picture.

    Empty places have the null class and no coordinates. The last token describes what lies outside of all boxes.

    Args:
        config: Contents of config.json: "vocab_size", "d_model" (d) and "hidden_layers" (of width 4 d).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = {**config, **MARK}
        width, hidden = config["d_model"], config[HIDDEN]
        self.none, self.side = config["vocab_size"] - 1, math.isqrt(config["vocab_size"])
        self.classes = empty_embedding(config["vocab_size"], width)
        self.whole = nn.Parameter(torch.empty(width))  # class embedding of the whole picture
        widths = [width + 4 * 2 * FREQUENCIES, *[4 * width] * hidden, width]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, n + 1, d]; the mask is ignored."""
        objects, crop = ids[:, :-2].unflatten(1, (-1, 3)), ids[:, None, -2:]  # [B, n, 3], [B, 1, 2]
        names = torch.cat([self.classes(objects[..., 0]), self.whole.expand(len(ids), 1, -1)], 1)
        present = F.pad(objects[..., 0] != self.none, (0, 1), value=True)
        places = self._fourier_features(torch.cat([objects[..., 1:], crop], 1)) * present[..., None]
        x = torch.cat([names, places], -1)  # [B, n + 1, d + 8 FREQUENCIES]
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.norm(self.layers[-1](x))

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under the names of this module; no other library has this encoder."""
        return self.state_dict()

    def _fourier_features(self, cells: Tensor) -> Tensor:
        """Return sines, then cosines, of the coordinates (0 to 1) of two corners, which are cells [..., 2]."""
        corners = torch.stack([cells % self.side, cells // self.side], -1).flatten(-2) / max(self.side - 1, 1)
        steps = torch.arange(FREQUENCIES, device=cells.device) / FREQUENCIES
        angles = (corners[..., None] * BASE**steps).flatten(-2)  # float32: half precision has errors of 0.1
        return torch.cat([angles.sin(), angles.cos()], -1).to(self.whole.dtype)


def boxes_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a BoxEncoder in config.json. Raises KeyError if one is missing."""
    return {name: config[name] for name in ("vocab_size", "d_model", HIDDEN)}


def empty_boxes(config: dict[str, Any]) -> BoxEncoder:
    """Return a BoxEncoder on "meta", for load_state_dict(assign=True)."""
    with torch.device("meta"):
        return BoxEncoder(config)


def random_boxes(vocab_size: int, width: int, hidden_layers: int, seed: int) -> BoxEncoder:
    """Return a BoxEncoder with weights drawn from the seed, without a change to global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        boxes = BoxEncoder({"vocab_size": vocab_size, "d_model": width, HIDDEN: hidden_layers})
        for table in (boxes.classes.weight, boxes.whole):
            nn.init.normal_(table)
    return boxes
