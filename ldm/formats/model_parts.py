"""The parts of a latent diffusion model, as the readers and writers of model files exchange them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoencoder import FirstStage
from conditioning.interface.conditioner import Conditioner
from ldm.formats.diffusers.network_kinds import Network
from ldm.formats.diffusers.scheduler import Scheduling


@dataclass(frozen=True)
class ModelParts:
    """The parts of a latent diffusion model. Readers return networks on the CPU, in evaluation mode.

    Args:
        autoencoder: defines the latents.
        unet: the denoising network.
        conditioner: computes what the network is conditioned on.
        scheduling: noise levels, prediction, and how the model is sampled.
        defaults: stored default settings of images by name; empty if the source stores none.
    """

    autoencoder: FirstStage
    unet: Network
    conditioner: Conditioner
    scheduling: Scheduling
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extra_channels(self) -> int:
        """Number of input channels of the UNet besides those of z_t, for a mask, an image or a map."""
        return self.unet.config.in_channels - self.autoencoder.latent_channels


def check_parts(autoencoder: FirstStage, unet: Network, conditioner: Conditioner) -> None:
    """Raise ValueError if a UNet's inputs and outputs do not fit the autoencoder's latents and the conditioner."""
    channels, config = autoencoder.latent_channels, unet.config
    inputs = channels + conditioner.latent_channels
    if config.in_channels != inputs or config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"the UNet maps {config.in_channels} channels to {config.out_channels}, the autoencoder's latents have "
            f"{channels} and the conditioner adds {conditioner.latent_channels}; it must map {inputs} to {channels}, "
            "or to twice as many where it learned variances"
        )
    widths = (
        ("tokens", config.cross_attention_dim, conditioner.context_dim),
        ("vectors", config.vector_dim, conditioner.vector_dim),
    )
    for name, of_unet, of_conditioner in widths:
        if of_unet != of_conditioner:
            reads, makes = _describe(name, of_unet), _describe(name, of_conditioner)
            raise ValueError(f"the UNet reads {reads}, the conditioner makes {makes}")


def _describe(name: str, width: int | None) -> str:
    return f"no {name}" if width is None else f"{name} of width {width}"
