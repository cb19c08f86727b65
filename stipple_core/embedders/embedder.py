"""A CLIP as two functions, pictures and texts to points of one space (Radford et al. 2021).

What comes out has length sqrt(d), so that its entries have unit scale, as latents have; only the direction counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("open_clip", "transformers")


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """Which CLIP.

    Raises:
        ValueError: the kind is unknown.
    """

    kind: str = "open_clip"  # open_clip | transformers
    name: str = ""  # architecture ("ViT-L-14"), hf-hub:OWNER/NAME or local-dir:FOLDER; transformers: folder or hub name
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    network: dict[str, Any] | None = None  # the network's own shape, which model folders say besides; leave it out

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"embedder kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")


class Embedder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] and texts to points [B, d] of length sqrt(d); frozen.

    Gradients reach the pictures, for whoever is guided by them; never the weights.

    Args:
        config: with `network`: "dim", "context_length", "size" in pixels, "mean" and "std" of pictures in [0, 1].
        visual: pictures as the network wants them -> [B, d]; None where no pictures are to be embedded.
        text: ids [B, L] -> [B, d]; None where no texts are.
    """

    def __init__(self, config: EmbedderConfig, visual: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.config, self.visual, self.text = config, visual, text
        self.requires_grad_(False)
        self.train(False)

    @property
    def dim(self) -> int:
        """d."""
        return self.config.network["dim"]

    def train(self, mode: bool = True) -> Embedder:
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    def images(self, images: Tensor) -> Tensor:
        """Points [B, d] of pictures [B, 3, H, W] in [-1, 1], of which a square in the middle is seen, resized."""
        network, side = self.config.network, min(images.shape[-2:])
        top, left = ((length - side) // 2 for length in images.shape[-2:])
        x = (images[..., top : top + side, left : left + side].float() + 1) / 2  # [B, 3, side, side]
        if side != network["size"]:
            x = F.interpolate(x, (network["size"],) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(network[name], device=x.device).reshape(-1, 1, 1) for name in ("mean", "std"))
        return self._unit_scale(self.visual(((x - mean) / std).to(next(self.visual.parameters()).dtype)))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Points [B, d] of texts; the end of one that is too long is cut off."""
        ids = _tokenizer(self.config.network["context_length"])(list(prompts))  # [B, L]
        return self._unit_scale(self.text(ids.to(next(self.text.parameters()).device)))

    def fingerprint(self) -> str:
        """sha256 over weights, as half precision has them, and config: points of two networks are not to be mixed."""
        digest = hashlib.sha256(json.dumps(self.config.network, sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().half().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _unit_scale(self, points: Tensor) -> Tensor:
        return F.normalize(points.float(), dim=-1) * self.dim**0.5


@functools.cache
def _tokenizer(length: int) -> Callable[[list[str]], Tensor]:
    """CLIP's byte pairs, which all have alike, as ids padded to one length."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)
