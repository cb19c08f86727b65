"""Pretrained, frozen networks that embed images and texts in one space, such as CLIP (Radford et al. 2021)."""

from stipple_core.embedders.embedder import Embedder, EmbedderConfig
from stipple_core.embedders.embedder_sources import build_embedder

__all__ = ["Embedder", "EmbedderConfig", "build_embedder"]
