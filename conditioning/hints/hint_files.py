"""Files that a user passes for a hint, decoded, and their conversion to the size of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Files:
    """Decoded files that a picture is made from; their sizes may differ from that of the picture."""

    image: Tensor | None = None  # [3, h, w] in [-1, 1]
    mask: Tensor | None = None  # [1, h, w] from 0 to 1; values above 0.5 are painted
    map: Tensor | None = None  # [1, h, w] class numbers, or depths or edges on any scale
    noise_level: float = 0.0  # noise to add to a low-resolution image, 0 to 1


def fitted(x: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Scale [k, h, w] until it covers H x W, and return the center crop [k, H, W]."""
    scale = max(height / x.shape[1], width / x.shape[2])
    size = [max(round(side * scale), least) for side, least in zip(x.shape[1:], (height, width), strict=True)]
    if size != list(x.shape[1:]):
        smooth = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
        low, high = x.min(), x.max()
        x = F.interpolate(x[None], size=size, mode=mode, **smooth)[0].clamp(low, high)  # bicubic overshoots
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def required(x: Tensor | None, what: str, fix: str) -> Tensor:
    """Return x; raise ValueError if it is None."""
    if x is None:
        raise ValueError(f"this model requires {what}, and there is none; add {fix}")
    return x
