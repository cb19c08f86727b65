"""Pictures and texts as points of one space: frozen networks of others, such as CLIP (Radford et al. 2021)."""

from embedders.embedder import Embedder, EmbedderConfig
from embedders.sources import build_embedder

__all__ = ["Embedder", "EmbedderConfig", "build_embedder"]
