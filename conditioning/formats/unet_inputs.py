"""Readers for the UNets of other programs, which read more inputs than their files describe.

The number of input channels identifies them: inpainting and depth models of Stable Diffusion, and LDM's models for
inpainting, semantic maps and super-resolution. The option `addition_embed_type` identifies SDXL's sizes and crops.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from conditioning.classes.class_conditioner import Unconditional
from conditioning.hints.degradation import DegradationConfig
from conditioning.hints.hints import SpatialConfig
from conditioning.interface.conditioner import Conditioner
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.frame import FrameConfig, FrameReader
from conditioning.readers.spatial import SpatialReader
from stipple_core.files.weights import place

MAPPER = "channel_mapper.weight"  # the only weight of a reader in CompVis' files: that of semantic maps
STIPPLE_MAPPER = "aligned.channel_mapper.weight"  # its name in `SpatialReader`
SPATIAL, FRAME = "spatial", "frame"  # names of the readers
USED = {"inpainting": ("convention",)}  # options by kind that widths do not determine


def with_hints(
    conditioner: Conditioner, extra: int, latent_channels: int, downsampling: int, mapper: Tensor | None = None
) -> Conditioner:
    """Add the reader of hints that a UNet requires to the conditioner of its prompts.

    Args:
        conditioner: If it has a reader of hints already, it is returned as it is.
        extra: Number of channels that the UNet reads besides those of z_t.
        latent_channels, downsampling: Those of the autoencoder.
        mapper: Weight [c, classes, 1, 1] of LDM's SpatialRescaler, if the file has one.

    Raises:
        ValueError: No known model has this number of channels.
    """
    if not extra or SPATIAL in conditioner.readers:
        return conditioner
    options = {"downsampling": downsampling}
    if mapper is not None:
        options |= {"kind": "semantic", "channels": mapper.shape[0], "classes": mapper.shape[1]}
    elif extra == latent_channels + 1:
        convention = "ldm" if isinstance(conditioner.prompts, Unconditional) else "stable_diffusion"
        options |= {"kind": "inpainting", "latent_channels": latent_channels, "convention": convention}
    elif extra == 3:
        options |= {"kind": "low_resolution", "degradation": DegradationConfig(kind="bsrgan", factor=downsampling)}
    elif extra == 1:
        options |= {"kind": "depth"}
    else:
        raise ValueError(f"its UNet reads {extra} channels beside the {latent_channels} of z_t; no known model does")
    reader = SpatialReader(SpatialConfig(**options))
    if mapper is not None:
        place(reader, {STIPPLE_MAPPER: mapper}, "the reader of semantic maps")
    return CombinedConditioner(conditioner.prompts, {SPATIAL: reader.requires_grad_(False), **conditioner.readers})


def with_frame(conditioner: Conditioner, width: int | None) -> Conditioner:
    """Add the reader of size and crop that a UNet requires to its conditioner.

    Args:
        conditioner: If it has such a reader already, it is returned as it is.
        width: Width of the embedding of each number; None if the UNet does not read them.
    """
    if width is None or FRAME in conditioner.readers:
        return conditioner
    reader = FrameReader(FrameConfig(width=width))
    return CombinedConditioner(conditioner.prompts, {**conditioner.readers, FRAME: reader})


def hints_to_compvis(conditioner: Conditioner, extra: int, latent_channels: int) -> Mapping[str, Tensor]:
    """Return the weights of the readers for a single file; {} if the number of channels determines the reader.

    Raises:
        ValueError: A single file would be read as another model.
    """
    readers = conditioner.readers
    if others := [name for name in readers if name != SPATIAL]:
        raise ValueError(f"a single file can't hold the readers {', '.join(others)} of this model; save a folder")
    if SPATIAL not in readers:
        return {}
    reader = readers[SPATIAL]
    mapper = reader.state_dict().get(STIPPLE_MAPPER)
    reopened = with_hints(conditioner.prompts, extra, latent_channels, reader.config.downsampling, mapper)
    if _meaning(reopened.readers[SPATIAL]) != _meaning(reader):
        raise ValueError(f"a single file can't hold the options of spatial.kind {reader.config.kind}; save a folder")
    return {} if mapper is None else {MAPPER: mapper}


def _meaning(reader: SpatialReader) -> tuple[object, ...]:
    """Return all options that determine how a hint is read, without those of training."""
    config, widths = reader.config, reader.widths
    return config.kind, widths, *(getattr(config, name) for name in USED.get(config.kind, ()))
