"""What the parts of a model, and models that work together, must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoencoder import Autoencoder
from conditioning import Conditioner
from ldm.networks.unet import UNet

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def check_parts(autoencoder: Autoencoder, unet: UNet, conditioner: Conditioner) -> None:
    """Raise ValueError for a UNet that does not map an autoencoder's latents, told what a conditioner says."""
    channels, dim = autoencoder.latent_channels, unet.config.cross_attention_dim
    told = channels + conditioner.latent_channels
    if unet.config.in_channels != told or unet.config.out_channels not in (channels, 2 * channels):
        shape = f"{unet.config.in_channels} channels to {unet.config.out_channels}"
        raise ValueError(
            f"the UNet maps {shape}, the autoencoder's latents have {channels} and the conditioner adds "
            f"{conditioner.latent_channels}; it must map {told} to {channels}, or to twice as many where it "
            "learned variances"
        )
    if dim != conditioner.context_dim:
        reads, makes = _wide("tokens", dim), _wide("tokens", conditioner.context_dim)
        raise ValueError(f"the UNet reads {reads}, the conditioner makes {makes}")
    if unet.config.vector_dim != conditioner.vector_dim:
        reads, makes = _wide("vectors", unet.config.vector_dim), _wide("vectors", conditioner.vector_dim)
        raise ValueError(f"the UNet reads {reads}, the conditioner makes {makes}")


def _wide(what: str, width: int | None) -> str:
    return f"no {what}" if width is None else f"{what} of width {width}"


def check_draws(model: TextToImage) -> None:
    """Raise ValueError for a model whose latents are no pictures."""
    if not model.autoencoder.decodes:
        raise ValueError("this model makes embeddings, not pictures; it serves a decoder: stipple draw --prior")


def check_weaker(model: TextToImage, weaker: TextToImage) -> None:
    """Raise ValueError for a model that can't guide another by autoguidance."""
    if model.schedule.config != weaker.schedule.config:
        raise ValueError("the weaker model must have the same noise levels as this one")
    same = model.autoencoder.fingerprint() == weaker.autoencoder.fingerprint()
    if not same or model.conditioner.fingerprint() != weaker.conditioner.fingerprint():
        raise ValueError("the weaker model must have the same autoencoder and text encoder as this one")


def check_prior(model: TextToImage, prior: TextToImage) -> None:
    """Raise ValueError for a prior that does not make the embeddings that a model reads."""
    mine = model.conditioner.readers["image"].embedder if "image" in model.conditioner.readers else None
    theirs = getattr(prior.autoencoder, "embedder", None)
    if mine is None or theirs is None or mine.fingerprint() != theirs.fingerprint():
        raise ValueError("a prior must make embeddings of the encoder by which this model looks at pictures")
