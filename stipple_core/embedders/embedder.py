"""CLIP as two functions that embed images and texts in one space (Radford et al. 2021).

Embeddings are normalized to length sqrt(d), so that their entries have unit scale like latents.
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

from stipple_core.files.hashing import hash_weights

KINDS = ("open_clip", "transformers")


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """Which CLIP model to use.

    Raises:
        ValueError: the kind is unknown.
    """

    kind: str = "open_clip"  # open_clip | transformers
    name: str = ""  # architecture ("ViT-L-14"), hf-hub:OWNER/NAME or local-dir:FOLDER; transformers: folder or hub name
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    network: dict[str, Any] | None = None  # the network's shape, which model folders contain; do not set it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"embedder kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")


class Embedder(nn.Module):
    """Embeds images [B, 3, H, W] in [-1, 1] and texts as vectors [B, d] of length sqrt(d). All weights are frozen.

    Gradients flow to the images, for CLIP guidance, but not to the weights.

    Args:
        config: with `network`: "dim", "context_length", "size" in pixels, "mean" and "std" of images in [0, 1].
        visual: normalized images -> [B, d]. None: images can't be embedded.
        text: ids [B, L] -> [B, d]. None: texts can't be embedded.
    """

    def __init__(self, config: EmbedderConfig, visual: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.config, self.visual, self.text = config, visual, text
        self.requires_grad_(False)
        self.train(False)

    @property
    def dim(self) -> int:
        """d, the dimension of embeddings."""
        return self.config.network["dim"]

    def train(self, mode: bool = True) -> Embedder:
        """Stay in evaluation mode, regardless of `mode`."""
        return super().train(False)

    def images(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] in [-1, 1] as [B, d]; they are center-cropped to a square and resized."""
        network, side = self.config.network, min(images.shape[-2:])
        top, left = ((length - side) // 2 for length in images.shape[-2:])
        x = (images[..., top : top + side, left : left + side].float() + 1) / 2  # [B, 3, side, side]
        if side != network["size"]:
            x = F.interpolate(x, (network["size"],) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(network[name], device=x.device).reshape(-1, 1, 1) for name in ("mean", "std"))
        return self._unit_scale(self.visual(((x - mean) / std).to(next(self.visual.parameters()).dtype)))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts as [B, d]; texts that are too long are truncated."""
        ids = _tokenizer(self.config.network["context_length"])(list(prompts))  # [B, L]
        return self._unit_scale(self.text(ids.to(next(self.text.parameters()).device)))

    def fingerprint(self) -> str:
        """SHA-256 of config and weights (rounded to float16), to detect embeddings of different networks."""
        digest = hashlib.sha256(json.dumps(self.config.network, sort_keys=True).encode())
        hash_weights(digest, self.state_dict(), half=True)
        return digest.hexdigest()

    def _unit_scale(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.float(), dim=-1) * self.dim**0.5


@functools.cache
def _tokenizer(length: int) -> Callable[[list[str]], Tensor]:
    """CLIP's byte-pair tokenizer, which pads ids to `length`."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)
