"""Whether the network that a run names fits between its autoencoder and its conditioner, and these its data."""

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
        raise ValueError(f"autoencoder {config.autoencoder} makes no embeddings, as a prior needs; see stipple embed")
    if config.data.image_size != autoencoder.downsampling:
        size, side = config.data.image_size, autoencoder.downsampling
        raise ValueError(f"data.image_size {size} is not what the encoder of embeddings looks at; use {side}")
    if conditioner.latent_channels:
        raise ValueError("conditioner.spatial is read by no prior; leave it out")
    if conditioner.context_dim is None or conditioner.vector_dim is None:
        raise ValueError(
            "a prior reads tokens of the prompt and its embedding; give a text encoder and conditioner.text"
        )
    return {
        "embedding_dim": autoencoder.latent_channels,
        "token_dim": conditioner.context_dim,
        "vector_dim": conditioner.vector_dim,
        "text_tokens": conditioner.max_length,
    }


FITTING = {"unet": _unet_shape, "prior": _prior_shape}  # kind of network -> fields of its config, as they have to be


def check_shapes(config: LdmRunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Raise ValueError where the UNet does not fit between autoencoder and text encoder."""
    f, size, network = autoencoder.downsampling, config.data.image_size, config.network
    if size % f:
        raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
    check_step(config.data.buckets, f * network.downsampling, "downsampling of autoencoder and UNet together")
    for name, value in FITTING[folder_of(network)](config, autoencoder, conditioner).items():
        if (given := getattr(network, name)) != value:
            where = f"{folder_of(network)}.{name}"
            raise ValueError(f"{where} {given} does not fit autoencoder, image size and conditioner; use {value}")
    if config.samples.every and isinstance(autoencoder, ImageEmbeddings):
        raise ValueError(f"samples.every {config.samples.every} shows pictures, and this model makes embeddings; use 0")
    if conditioner.has_positions and (config.data.flip or config.data.crop != "center"):
        raise ValueError("data.flip and data.crop random move what lies in the boxes of layouts; leave them out")
    if "map" in conditioner.reads and config.data.maps is None:
        raise ValueError("data.maps has no value, and the conditioner reads maps; give the folder where they lie")
    if config.data.maps is not None and (conditioner.hint is None or "map" not in conditioner.hint.reads):
        raise ValueError(f"data.maps {config.data.maps} is of no use: the conditioner reads no maps; leave it out")
    if conditioner.reads and config.cache is not None:
        read = ", ".join(sorted(conditioner.reads - {"map"}))
        raise ValueError(f"cache {config.cache} holds no {read}, which the conditioner reads; use cache=null")
