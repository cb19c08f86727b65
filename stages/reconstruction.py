"""What is measured of an autoencoder: its latents' scale, and how near reconstructions of held-out images are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from autoencoder import Autoencoder, LatentStatistics, latent_rgb
from autoencoder.balance import balance
from autoencoder.color import ExplainedVariance
from autoencoder.regularizer import perplexity, usage
from storage.dataset import ImageDataset
from storage.images import grid, tensor_to_image
from storage.randomness import generator
from training.evaluation import psnr, ssim
from training.trainer import Trainer

BALANCED = 32  # pictures on which the effect of latents is measured


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on the held-out images, and how often."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 256  # held-out images measured, at most
    grid: int = 8  # of them shown, each above its reconstruction
    scale_images: int = 4096  # training images over which the latent scale is measured at the end

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
    """A copy of the autoencoder whose latents are unit-scale, measured over `count` training images spread evenly.

    Where `degree` is not 0 they are balanced before, see `autoencoder.balance`.
    """
    autoencoder = copy.deepcopy(autoencoder).eval()
    if degree:
        indices = torch.linspace(0, len(dataset) - 1, min(BALANCED, len(dataset))).long().tolist()
        images = torch.stack([dataset[0, index].image for index in indices]).to(device)
        balance(autoencoder, images, generator(dataset.seed, "balance"), degree)
    statistics = LatentStatistics(autoencoder.latent_channels)
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    shown = []  # the first pictures, spread evenly too, for the colors of previews
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
def validate(trainer: Trainer, autoencoder: Autoencoder, dataset: ImageDataset, config: ValidationConfig) -> None:
    """PSNR, SSIM, explained colors, KL or codebook usage on held-out images, over processes; a grid of reconstructions.

    Explained is the share of the variance of brightness and of the two axes of color, see `ExplainedVariance`.
    """
    count = min(config.images, len(dataset))
    counts = torch.zeros(autoencoder.config.codebook_size, dtype=torch.int64, device=trainer.device)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)  # psnr, ssim, kl, images
    colors = ExplainedVariance()
    for index in range(trainer.rank, count, trainer.world):
        picture = dataset.picture(index)
        if picture is None:
            continue
        images = picture[None].to(trainer.device)
        reconstruction = autoencoder(images)
        again, posterior = reconstruction.images, reconstruction.posterior
        values = [psnr(images, again), ssim(images, again), posterior.kl()]
        sums += torch.cat([*values, torch.ones_like(values[0])])
        colors.update(images, again)
        if reconstruction.indices is not None:
            counts += autoencoder.quantize.counts(reconstruction.indices)
    sums, counts = trainer.sum(sums), trainer.sum(counts)
    colors.sums = trainer.sum(colors.sums.to(trainer.device)).cpu()
    means = (sums / sums[-1].clamp(min=1)).tolist()
    measured = {"validation_psnr": means[0], "validation_ssim": means[1]}
    measured |= {f"validation_{name}": share for name, share in colors.shares().items()}
    if autoencoder.config.regularizer == "vq":
        measured |= {"validation_usage": usage(counts), "validation_perplexity": perplexity(counts)}
    else:
        measured["validation_kl"] = means[2]
    trainer.record(**measured)
    trainer.print(f"step {trainer.step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    if trainer.is_main and config.grid:
        show(trainer, autoencoder, dataset, config.grid)


def show(trainer: Trainer, autoencoder: Autoencoder, dataset: ImageDataset, count: int) -> None:
    """A grid of the first held-out images, each above its reconstruction."""
    pictures = (dataset.picture(index) for index in range(min(count, len(dataset))))
    shown = [picture for picture in pictures if picture is not None]
    again = [autoencoder(image[None].to(trainer.device)).images[0].cpu() for image in shown]
    if shown:
        grid([tensor_to_image(image) for image in shown + again], len(shown)).save(trainer.sample_path())
