"""Latent diffusion: schedules, predictions, the denoiser, its loss, guidance, samplers, the UNet and the pipeline."""

from __future__ import annotations

__all__ = ["TextToImage"]


def __getattr__(name: str):
    """Import the pipeline only when it is asked for, so that `import ldm` costs nothing."""
    if name == "TextToImage":
        from ldm.pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
