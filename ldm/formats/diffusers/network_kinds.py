"""The kinds of networks that a model may have, and where each lies in a model folder, in whose options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm.formats.diffusers.prior_options import prior_from_diffusers, prior_to_diffusers
from ldm.formats.diffusers.unet_options import unet_from_diffusers, unet_to_diffusers
from ldm.networks.prior import PriorTransformer
from ldm.networks.prior_config import PriorConfig
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig

Network = UNet | PriorTransformer  # (z_t, timestep, context) -> output
NetworkConfig = UNetConfig | PriorConfig


@dataclass(frozen=True)
class Kind:
    """A kind of network."""

    config: type[NetworkConfig]  # of its shape
    build: Callable[[Any], Network]  # from such a config, with weights drawn by torch's generator
    to_diffusers: Callable[[Any], dict[str, Any]]  # config -> what diffusers' config.json says
    from_diffusers: Callable[[dict[str, Any]], NetworkConfig]  # and back; raises ValueError
    fit: Callable[[Any, Any], None] = lambda network, autoencoder: None  # note what it has to know of the autoencoder


def _tell_scale(prior: PriorTransformer, embeddings: Any) -> None:
    prior.tell_scale(embeddings.mean, embeddings.std)


KINDS = {  # the folder in a model folder, and the section of a run's config -> what is there
    "unet": Kind(UNetConfig, UNet, unet_to_diffusers, unet_from_diffusers),
    "prior": Kind(PriorConfig, PriorTransformer, prior_to_diffusers, prior_from_diffusers, _tell_scale),
}


def folder_of(config: NetworkConfig) -> str:
    """The key of KINDS whose networks have configs of this class."""
    return next(folder for folder, kind in KINDS.items() if isinstance(config, kind.config))
