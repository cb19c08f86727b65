"""Measurements of an autoencoder: the scale of its latents, and the quality of its reconstructions."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from autoencoder import Autoencoder, LatentStatistics, latent_rgb
from autoencoder.balance import balance
from autoencoder.losses.color_axes import ExplainedVariance
from autoencoder.losses.similarity import psnr, ssim
from autoencoder.networks.vector_quantizer import perplexity, usage
from stipple.training.trainer import Trainer
from stipple_core.data.dataset import ImageDataset
from stipple_core.images.images import grid, tensor_to_image
from stipple_core.randomness import generator

BALANCE_IMAGES = 32  # training images on which the sensitivity to latents is measured


@dataclass(frozen=True, kw_only=True)
class AutoencoderValidationConfig:
    """The schedule and the size of the validation on held-out images, and the measurement of the latent scale."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 256  # held-out images, at most
    grid: int = 8  # of them in the sample image, each above its reconstruction
    scale_images: int = 4096  # training images from which the latent scale is measured at the end

    def __post_init__(self):
        for name, least in (("every", 0), ("grid", 0), ("scale_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"validation.{name} {getattr(self, name)} must be at least {least}")
        if self.every and self.images < 1:
            raise ValueError(f"validation.images {self.images} must be at least 1; or use validation.every=0")


@torch.no_grad()
def measure_scale(
    autoencoder: Autoencoder, dataset: ImageDataset, count: int, device: torch.device, degree: float = 0.0
) -> Autoencoder:
    """Copy the autoencoder, and scale its latents to unit scale, measured on `count` evenly spaced training images.

    If `degree` is not 0, the latents are balanced first (`autoencoder.balance`).
    """
    autoencoder = copy.deepcopy(autoencoder).eval()
    if degree:
        indices = torch.linspace(0, len(dataset) - 1, min(BALANCE_IMAGES, len(dataset))).long().tolist()
        images = torch.stack([dataset[0, index].image for index in indices]).to(device)
        balance(autoencoder, images, generator(dataset.seed, "balance"), degree)
    statistics = LatentStatistics(autoencoder.latent_channels)
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    shown = []  # a few evenly spaced images, for the colors of previews
    for first in range(0, len(indices), 16):
        images = torch.stack([dataset[0, index].image for index in indices[first : first + 16]]).to(device)
        posterior = autoencoder.posterior(images)
        statistics.update(posterior)
        if first % (len(indices) // 8 // 16 * 16 or 16) == 0:
            shown.append((posterior.mode(), images))
    autoencoder.set_scale(statistics.mean.float(), statistics.std)
    latents, images = (torch.cat(parts) for parts in zip(*shown, strict=True))
    latents = (latents - statistics.mean.to(latents)[:, None, None]) / statistics.std
    autoencoder.latent_rgb = latent_rgb(latents, images)
    return autoencoder


@torch.no_grad()
def validate(
    trainer: Trainer, autoencoder: Autoencoder, dataset: ImageDataset, config: AutoencoderValidationConfig
) -> None:
    """Measure PSNR, SSIM, explained colors, and KL or codebook usage on held-out images, and save a grid of them.

    The images are divided among the processes; every process has to call it. Explained colors are the fractions of the
    variance of brightness and of the two color axes that reconstructions explain (`ExplainedVariance`).
    """
    count = min(config.images, len(dataset))
    counts = torch.zeros(autoencoder.config.codebook_size, dtype=torch.int64, device=trainer.device)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)  # psnr, ssim, kl, images
    colors = ExplainedVariance()
    for index in range(trainer.rank, count, trainer.world):
        image = dataset.picture(index)
        if image is None:
            continue
        images = image[None].to(trainer.device)
        reconstruction = autoencoder(images)
        decoded, posterior = reconstruction.images, reconstruction.posterior
        values = [psnr(images, decoded), ssim(images, decoded), posterior.kl()]
        sums += torch.cat([*values, torch.ones_like(values[0])])
        colors.update(images, decoded)
        if reconstruction.indices is not None:
            counts += autoencoder.quantize.counts(reconstruction.indices)
    sums, counts = trainer.sum(sums), trainer.sum(counts)
    colors.sums = trainer.sum(colors.sums.to(trainer.device)).cpu()
    means = (sums / sums[-1].clamp(min=1)).tolist()
    measured = {"validation_psnr": means[0], "validation_ssim": means[1]}
    measured |= {f"validation_{name}": value for name, value in colors.fractions().items()}
    if autoencoder.config.regularizer == "vq":
        measured |= {"validation_usage": usage(counts), "validation_perplexity": perplexity(counts)}
    else:
        measured["validation_kl"] = means[2]
    trainer.record(**measured)
    trainer.print(f"step {trainer.step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    if trainer.is_main and config.grid:
        save_grid(trainer, autoencoder, dataset, config.grid)


def save_grid(trainer: Trainer, autoencoder: Autoencoder, dataset: ImageDataset, count: int) -> None:
    """Save a grid of the first held-out images, each above its reconstruction."""
    decoded = (dataset.picture(index) for index in range(min(count, len(dataset))))
    images = [image for image in decoded if image is not None]
    reconstructions = [autoencoder(image[None].to(trainer.device)).images[0].cpu() for image in images]
    if images:
        grid([tensor_to_image(image) for image in images + reconstructions], len(images)).save(trainer.sample_path())
