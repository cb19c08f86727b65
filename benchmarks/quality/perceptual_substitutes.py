"""Perceptual distances for training without LPIPS' weights: the table of docs/perceptual.md.

python -m benchmarks.quality.perceptual_substitutes --help

It trains a small KL autoencoder with L1 alone. From there it continues on the same batches, with L1 alone and with L1
plus each substitute. The gradient of a substitute at the reconstructions is scaled to the norm of that of L1, times
--strength.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig, DiscriminatorConfig, PatchDiscriminator
from autoencoder.losses.adversarial_loss import discriminator_loss, feature_matching
from autoencoder.losses.generator_loss import LossConfig, generator_loss
from autoencoder.losses.perceptual import PerceptualConfig, make_perceptual
from autoencoder.losses.similarity import psnr, ssim
from autoencoder.losses.trained_features import FeatureConfig, train_features
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from stipple_core.images.images import grid, tensor_to_image
from stipple_core.randomness import generator

Distance = Callable[[Tensor, Tensor], Tensor]  # images and reconstructions to [B] or []

SMALL = AutoencoderConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64)
FEATURES = FeatureConfig(steps=200, batch_size=16)


def read_images(folder: str, size: int, train: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return training and held-out images, [N, 3, S, S] each, chosen with the seed."""
    config = DataConfig(folder=folder, image_size=size)
    records = scan(config)
    batches = []
    for part, count in ((records.train, train), (records.validation, held_out)):
        chosen = torch.randperm(len(part), generator=generator(seed, "subset"))[:count].tolist()
        dataset = ImageDataset([part[i] for i in chosen], config, seed)
        batches.append(torch.stack([dataset[(0, i)].image for i in range(len(chosen))]))
    return batches[0], batches[1]


def batches(images: Tensor, size: int, seed: int, purpose: str) -> Iterator[Tensor]:
    """Yield random batches [size, 3, S, S] in channels-last layout without end."""
    step = 0
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator(seed, purpose, step))
        yield images[chosen].contiguous(memory_format=torch.channels_last)
        step += 1


def trained_features(images: Tensor, seed: int) -> Distance:
    """Return the perceptual distance of a network that is trained on the images."""
    distance = make_perceptual(PerceptualConfig(kind="features", features=FEATURES))
    start = time.perf_counter()
    source = batches(images, FEATURES.batch_size, seed, "feature batches")
    losses = train_features(distance.network, source, FEATURES, generator(seed, "features"))
    seconds = time.perf_counter() - start
    print(f"features: loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} in {seconds:.0f} s", flush=True)
    return distance


class Critic:
    """A discriminator with its optimizer, for feature matching."""

    def __init__(self, learning_rate: float):
        config = DiscriminatorConfig(channels=16, layers=2)
        self.network = PatchDiscriminator(config).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Train the discriminator for one step on images and reconstructions."""
        loss = discriminator_loss(self.network(images)[0], self.network(reconstructions.detach())[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def distance(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the feature matching loss, a scalar."""
        return feature_matching(self.network(images)[1], self.network(reconstructions)[1])


def train(
    autoencoder: Autoencoder,
    source: Iterator[Tensor],
    learning_rates: list[float],
    distance: Distance | None = None,
    weight: float = 0.0,
    critic: Critic | None = None,
) -> Autoencoder:
    """Train the autoencoder in place with L1, KL and the weighted distance, one step per learning rate.

    A critic is trained along with it.
    """
    optimizer = torch.optim.Adam(autoencoder.parameters(), betas=(0.9, 0.99))
    for step, learning_rate in enumerate(learning_rates):
        optimizer.param_groups[0]["lr"] = learning_rate
        batch, f = next(source), autoencoder.downsampling
        shape = (len(batch), autoencoder.latent_channels, batch.shape[2] // f, batch.shape[3] // f)
        reconstruction = autoencoder(batch, torch.randn(shape, generator=generator(0, "noise", step)))
        loss = generator_loss(batch, reconstruction, LossConfig(perceptual=weight), distance)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if critic is not None:
            critic.update(batch, reconstruction.images)
    return autoencoder


def matched_weight(distance: Distance, images: Tensor, reconstructions: Tensor) -> float:
    """Return the weight at which the gradients of the distance and of the L1 error have equal norms."""
    reconstructions = reconstructions.detach().requires_grad_()
    (l1,) = torch.autograd.grad((images - reconstructions).abs().mean(), reconstructions)
    (other,) = torch.autograd.grad(distance(images, reconstructions).mean(), reconstructions)
    return (l1.norm() / other.norm()).item()


def sharpness(images: Tensor) -> Tensor:
    """Return the mean gradient magnitude of each image, [B]."""
    dx, dy = images[..., :-1, 1:] - images[..., :-1, :-1], images[..., 1:, :-1] - images[..., :-1, :-1]
    return (dx.square() + dy.square()).sum(dim=1).sqrt().mean(dim=(1, 2))


def spectrum_error(images: Tensor, reconstructions: Tensor) -> float:
    """Return the relative error of the amplitudes above half the Nyquist frequency: 0 is perfect, 1 means all lost."""
    frequencies = torch.fft.fftfreq(images.shape[-1])
    high = (frequencies[:, None].square() + frequencies.square()).sqrt() > 0.25
    reconstructed, original = torch.fft.fft2(reconstructions).abs()[..., high], torch.fft.fft2(images).abs()[..., high]
    return ((reconstructed - original).square().sum() / original.square().sum()).sqrt().item()


@torch.no_grad()
def measure(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, list[str]]:
    """Return reconstructions of held-out images and the cells of their row in the table."""
    reconstructions = autoencoder(images).images.clamp(-1, 1)
    cells = [
        f"{psnr(images, reconstructions).mean():.2f}",
        f"{ssim(images, reconstructions).mean():.4f}",
        f"{sharpness(reconstructions).mean() / sharpness(images).mean():.3f}",
        f"{spectrum_error(images, reconstructions):.3f}",
    ]
    return reconstructions, cells


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="image folder")
    parser.add_argument("--output", default="runs/perceptual", help="where table.md and grid.png go")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--first-steps", type=int, default=1000, help="with L1 alone")
    parser.add_argument("--steps", type=int, default=300, help="with each loss, from there on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], help="times the matched weight")
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--held-out", type=int, default=128, help="validation images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def first_stage(images: Tensor, options: argparse.Namespace) -> tuple[Autoencoder, Critic]:
    """Train the autoencoder with L1 only, and a critic on its reconstructions, so that losses can be weighted."""
    torch.manual_seed(options.seed)
    autoencoder = Autoencoder(SMALL).to(memory_format=torch.channels_last)
    source = batches(images, options.batch_size, options.seed, "first batches")
    train(autoencoder, source, [options.learning_rate] * options.first_steps)
    critic = Critic(options.learning_rate / 4)
    for batch in islice(batches(images, 16, options.seed, "critic batches"), 100):
        with torch.no_grad():
            reconstructions = autoencoder(batch).images
        critic.update(batch, reconstructions)
    return autoencoder, critic


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    images, held_out = read_images(options.folder, options.size, options.images, options.held_out, options.seed)
    start, critic = first_stage(images, options)
    blurred, cells = measure(start, held_out)
    distances: dict[str, Distance] = {
        "ssim": make_perceptual(PerceptualConfig(kind="ssim")),
        "focal_frequency": make_perceptual(PerceptualConfig(kind="focal_frequency")),
        "features": trained_features(images, options.seed),
        "feature_matching": critic.distance,
    }
    titles = ("loss", "weight", "PSNR dB", "SSIM", "sharpness", "HF spectrum error", "seconds")
    table = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", f"| start | | {' | '.join(cells)} | |"]
    columns = [held_out]
    rates = [options.learning_rate / 2 * (1 - i / options.steps) for i in range(options.steps)]
    for name, strength in [("L1", 0.0), *((name, x) for x in options.strength for name in distances)]:
        distance = distances.get(name)
        weight = strength * matched_weight(distance, held_out, blurred) if distance else 0.0
        source = batches(images, options.batch_size, options.seed, "batches")
        began = time.perf_counter()
        scorer = critic if name == "feature_matching" else None
        autoencoder = train(copy.deepcopy(start), source, rates, distance, weight, scorer)
        seconds = time.perf_counter() - began
        reconstructions, cells = measure(autoencoder, held_out)
        columns.append(reconstructions)
        label = f"L1 + {name} x{strength:g}" if distance else "L1"
        table.append(f"| {label} | {weight:.3g} | {' | '.join(cells)} | {seconds:.0f} |")
        print(table[-1], flush=True)
    target = Path(options.output)
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text("\n".join(table) + "\n")
    shown = [tensor_to_image(column[i]) for i in range(min(12, len(held_out))) for column in columns]
    grid(shown, columns=len(columns)).save(target / "grid.png")


if __name__ == "__main__":
    main()
