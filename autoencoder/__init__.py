"""The first stage: images to latents and back, and what it is trained with."""

from autoencoder.autoencoder import Autoencoder, Reconstruction
from autoencoder.image_embeddings import ImageEmbeddings
from autoencoder.latent_statistics import LatentStatistics, latent_rgb, preview
from autoencoder.losses.discriminator import DiscriminatorConfig, PatchDiscriminator
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from autoencoder.networks.regularizer import Posterior
from autoencoder.pixels import Pixels, open_autoencoder

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "DiscriminatorConfig",
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
