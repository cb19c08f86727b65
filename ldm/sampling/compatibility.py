"""Checks of models that work together: a model and its weaker version, a model and its prior."""

from __future__ import annotations

from ldm.sampling.model import Model


def check_draws(model: Model) -> None:
    """Raise ValueError for a model whose latents are not images."""
    if not model.autoencoder.decodes:
        raise ValueError("this model makes embeddings, not pictures; it serves a decoder: stipple draw --prior")


def check_weaker(model: Model, weaker: Model) -> None:
    """Raise ValueError if autoguidance of a model can't use a weaker one."""
    if model.schedule.config != weaker.schedule.config:
        raise ValueError("the weaker model must have the same noise levels as this one")
    same = model.autoencoder.fingerprint() == weaker.autoencoder.fingerprint()
    if not same or model.conditioner.fingerprint() != weaker.conditioner.fingerprint():
        raise ValueError("the weaker model must have the same autoencoder and text encoder as this one")


def check_prior(model: Model, prior: Model) -> None:
    """Raise ValueError if a prior does not make the embeddings that a model is conditioned on."""
    read = model.conditioner.readers["image"].embedder if "image" in model.conditioner.readers else None
    made = getattr(prior.autoencoder, "embedder", None)
    if read is None or made is None or read.fingerprint() != made.fingerprint():
        raise ValueError("a prior must make embeddings of the image encoder that this model is conditioned on")
