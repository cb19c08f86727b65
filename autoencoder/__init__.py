"""The first stage: images to latents and back, and what it is trained with."""

from autoencoder.autoencoder import Autoencoder, Reconstruction
from autoencoder.config import AutoencoderConfig
from autoencoder.discriminator import DiscriminatorConfig, PatchDiscriminator
from autoencoder.embeddings import ImageEmbeddings
from autoencoder.pixels import Pixels, open_autoencoder
from autoencoder.regularizer import Posterior
from autoencoder.statistics import LatentStatistics, latent_rgb, preview

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
