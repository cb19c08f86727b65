"""Checks that the network of a run fits its autoencoder and its conditioner, and that these fit its data."""

from __future__ import annotations

from autoencoder import Autoencoder, ImageEmbeddings
from conditioning.interface.conditioner import Conditioner
from ldm.formats.diffusers.network_kinds import folder_of
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.data.records.buckets import check_step


def _unet_shape(config: LdmRunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> dict[str, int | None]:
    return {
        "in_channels": autoencoder.latent_channels + conditioner.latent_channels,
        "out_channels": autoencoder.latent_channels,
        "sample_size": config.data.image_size // autoencoder.downsampling,
        "cross_attention_dim": conditioner.context_dim,
        "vector_dim": conditioner.vector_dim,
    }


def _prior_shape(config: LdmRunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> dict[str, int | None]:
    if not isinstance(autoencoder, ImageEmbeddings):
        raise ValueError(
            f"autoencoder {config.autoencoder} makes no image embeddings, which a prior requires; see stipple embed"
        )
    if config.data.image_size != autoencoder.downsampling:
        size, side = config.data.image_size, autoencoder.downsampling
        raise ValueError(f"data.image_size {size} is not the input size of the image encoder; use {side}")
    if conditioner.latent_channels:
        raise ValueError("conditioner.spatial is not supported by a prior; leave it out")
    if conditioner.context_dim is None or conditioner.vector_dim is None:
        raise ValueError(
            "a prior requires tokens and an embedding of the prompt; set a text encoder and conditioner.text"
        )
    return {
        "embedding_dim": autoencoder.latent_channels,
        "token_dim": conditioner.context_dim,
        "vector_dim": conditioner.vector_dim,
        "text_tokens": conditioner.max_length,
    }


REQUIRED_SHAPES = {"unet": _unet_shape, "prior": _prior_shape}  # kind of network -> required fields of its config


def check_shapes(config: LdmRunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Raise ValueError if network, autoencoder, conditioner and data do not fit together."""
    f, size, network = autoencoder.downsampling, config.data.image_size, config.network
    if size % f:
        raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
    check_step(config.data.buckets, f * network.downsampling, "downsampling of autoencoder and UNet together")
    for name, value in REQUIRED_SHAPES[folder_of(network)](config, autoencoder, conditioner).items():
        if (current := getattr(network, name)) != value:
            where = f"{folder_of(network)}.{name}"
            raise ValueError(f"{where} {current} does not fit autoencoder, image size and conditioner; use {value}")
    if config.samples.every and isinstance(autoencoder, ImageEmbeddings):
        raise ValueError(f"samples.every {config.samples.every} draws images, and this model makes embeddings; use 0")
    if conditioner.has_positions and (config.data.flip or config.data.crop != "center"):
        raise ValueError(
            "data.flip and data.crop=random would move objects out of the boxes of layouts; leave them out"
        )
    if "map" in conditioner.reads and config.data.maps is None:
        raise ValueError("data.maps has no value, and the conditioner reads maps; set it to their folder")
    if config.data.maps is not None and (conditioner.hint is None or "map" not in conditioner.hint.reads):
        raise ValueError(
            f"data.maps {config.data.maps} has no effect, because the conditioner reads no maps; leave it out"
        )
    if conditioner.reads and config.cache is not None:
        names = ", ".join(sorted(conditioner.reads - {"map"}))
        raise ValueError(f"cache {config.cache} has no {names}, which the conditioner reads; use cache=null")
