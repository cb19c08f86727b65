"""The first stage: autoencoders from images to latents and back, and their training losses."""

from autoencoder.autoencoder import Autoencoder
from autoencoder.autoencoder_opening import open_autoencoder
from autoencoder.image_embeddings import ImageEmbeddings
from autoencoder.interface import FirstStage
from autoencoder.latent_statistics import LatentStatistics, latent_rgb, preview
from autoencoder.losses.discriminator import DiscriminatorConfig, PatchDiscriminator
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from autoencoder.networks.posterior import Posterior, Reconstruction
from autoencoder.pixels import Pixels

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "DiscriminatorConfig",
    "FirstStage",
    "ImageEmbeddings",
    "LatentStatistics",
    "PatchDiscriminator",
    "Pixels",
    "Posterior",
    "Reconstruction",
    "latent_rgb",
    "open_autoencoder",
    "preview",
]
