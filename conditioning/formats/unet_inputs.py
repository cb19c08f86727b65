"""What the UNets of others read beside z_t: no file of theirs says it, the number of channels tells it.

Stable Diffusion's inpainting and depth models, and LDM's for inpainting, semantic maps and super-resolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from conditioning.build import AnyConditioner
from conditioning.classes.class_conditioner import Unconditional
from conditioning.hints.degradation import DegradationConfig
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.spatial import SpatialConfig, SpatialReader
from stipple_core.files.weights import place

MAPPER = "channel_mapper.weight"  # all that CompVis' file has of a semantic map's reader
OURS = "aligned.channel_mapper.weight"
NAME = "spatial"  # of the reader
USED = {"inpainting": ("convention",)}  # options by kind that the widths of what is read don't tell


def with_hints(
    conditioner: AnyConditioner, extra: int, latent_channels: int, downsampling: int, mapper: Tensor | None = None
) -> AnyConditioner:
    """The conditioner of a model of others, with the reader of what its UNet is shown besides.

    Args:
        conditioner: of the prompts; with a reader of hints already it stays as it is.
        extra: channels that the UNet reads beside those of z_t.
        latent_channels, downsampling: of the autoencoder.
        mapper: the weight [c, classes, 1, 1] of LDM's SpatialRescaler, if there is one.

    Raises:
        ValueError: so many channels have no meaning here.
    """
    if not extra or NAME in conditioner.readers:
        return conditioner
    shown = {"downsampling": downsampling}
    if mapper is not None:
        shown |= {"kind": "semantic", "channels": mapper.shape[0], "classes": mapper.shape[1]}
    elif extra == latent_channels + 1:
        convention = "ldm" if isinstance(conditioner.prompts, Unconditional) else "stable_diffusion"
        shown |= {"kind": "inpainting", "latent_channels": latent_channels, "convention": convention}
    elif extra == 3:
        shown |= {"kind": "low_resolution", "degradation": DegradationConfig(kind="bsrgan", factor=downsampling)}
    elif extra == 1:
        shown |= {"kind": "depth"}
    else:
        raise ValueError(f"its UNet reads {extra} channels beside the {latent_channels} of z_t, and none says of what")
    reader = SpatialReader(SpatialConfig(**shown))
    if mapper is not None:
        place(reader, {OURS: mapper}, "the semantic map's reader")
    return CombinedConditioner(conditioner.prompts, {NAME: reader.requires_grad_(False), **conditioner.readers})


def hints_to_compvis(conditioner: AnyConditioner, extra: int, latent_channels: int) -> Mapping[str, Tensor]:
    """What a single file has of a conditioner's readers; {} where the number of channels says it all.

    Raises:
        ValueError: a reader of which a single file would tell another story.
    """
    readers = conditioner.readers
    if others := [name for name in readers if name != NAME]:
        raise ValueError(f"what the model reads besides prompts ({', '.join(others)}) has no place in a single file")
    if NAME not in readers:
        return {}
    reader = readers[NAME]
    mapper = reader.state_dict().get(OURS)
    again = with_hints(conditioner.prompts, extra, latent_channels, reader.config.downsampling, mapper)
    if _meaning(again.readers[NAME]) != _meaning(reader):
        raise ValueError(f"spatial.kind {reader.config.kind} as it is here has no place in a single file")
    return {} if mapper is None else {MAPPER: mapper}


def _meaning(reader: SpatialReader) -> tuple[object, ...]:
    """What decides how a hint is read, without how training makes it."""
    config, widths = reader.config, reader.widths
    return config.kind, widths, *(getattr(config, name) for name in USED.get(config.kind, ()))
