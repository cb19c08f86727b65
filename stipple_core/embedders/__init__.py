"""Pictures and texts as points of one space: frozen networks of others, such as CLIP (Radford et al. 2021)."""

from stipple_core.embedders.build import build_embedder
from stipple_core.embedders.embedder import Embedder, EmbedderConfig

__all__ = ["Embedder", "EmbedderConfig", "build_embedder"]
