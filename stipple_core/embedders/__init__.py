"""Pretrained, frozen networks that embed images and texts in one space, such as CLIP (Radford et al. 2021)."""

from stipple_core.embedders.build import build_embedder
from stipple_core.embedders.embedder import Embedder, EmbedderConfig

__all__ = ["Embedder", "EmbedderConfig", "build_embedder"]
