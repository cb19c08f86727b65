"""Degradation of images to low resolution: bicubic, or with blur, noise and compression as in real photos.

BSRGAN (Zhang et al. 2021) shuffles the degradations; Real-ESRGAN (Wang et al. 2021) applies a chain of them twice. All
random values come from one generator, so the same seed gives the same image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZINGS = ("bicubic", "bilinear", "area")
ROUNDS = 3  # of back-projection


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """How an image is degraded to fewer pixels; values are drawn from the ranges [minimum, maximum].

    Raises:
        ValueError: An option is invalid.
    """

    kind: str = "bicubic"  # a key of DEGRADATIONS: bicubic | bsrgan | real_esrgan
    factor: int = 4  # by which height and width are divided
    blur: tuple[float, float] = (0.1, 1.0)  # standard deviation of blur, in pixels of the result
    noise: tuple[float, float] = (0.0, 0.05)  # standard deviation of Gaussian noise, for images from 0 to 1
    photons: tuple[float, float] = (100.0, 10000.0)  # of Poisson noise in a white pixel
    quality: tuple[int, int] = (40, 95)  # of JPEG

    def __post_init__(self) -> None:
        if self.kind not in DEGRADATIONS:
            raise ValueError(f"degradation.kind {self.kind!r} is unknown; use one of {', '.join(DEGRADATIONS)}")
        if self.factor < 1:
            raise ValueError(f"degradation.factor {self.factor} must be at least 1 (the same size)")
        for name, least, most in (("blur", 0, 100), ("noise", 0, 1), ("photons", 1, 1e9), ("quality", 1, 100)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 2 or not least <= getattr(self, name)[0] <= getattr(self, name)[1] <= most:
                values = list(getattr(self, name))
                raise ValueError(f"degradation.{name} {values} must be [minimum, maximum] between {least} and {most}")


def degrade(image: Tensor, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Degrade an image [3, H, W] to [3, ceil(H / factor), ceil(W / factor)], both in [-1, 1]."""
    size = math.ceil(image.shape[1] / config.factor), math.ceil(image.shape[2] / config.factor)
    return DEGRADATIONS[config.kind]((image + 1) / 2, size, config, generator).clamp(0, 1) * 2 - 1


def _bicubic(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    return resized(image, size, "bicubic")


def _bsrgan(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Two blurs, a resize, two kinds of noise and JPEG in random order, then JPEG again."""
    steps: list[Callable[..., Tensor]] = [_blur, _blur, _to_random_size, _gaussian_noise, _poisson_noise, _jpeg]
    for index in torch.randperm(len(steps), generator=generator).tolist():
        image = steps[index](image, size, config, generator).clamp(0, 1)
    return _jpeg(_to_size(image, size, generator), size, config, generator)


def _real_esrgan(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Blur, a resize, one kind of noise and JPEG, twice; the final resize is before or after the last JPEG."""
    for last in (False, True):
        noise = _choice((_gaussian_noise, _poisson_noise), generator)
        for step in (_blur, _to_random_size, noise, *(() if last else (_jpeg,))):
            image = step(image, size, config, generator).clamp(0, 1)
    if _uniform((0, 1), generator) < 0.5:
        return _jpeg(_to_size(image, size, generator), size, config, generator)
    return _to_size(_jpeg(image, size, config, generator), size, generator)


DEGRADATIONS: dict[str, Callable[[Tensor, tuple[int, int], DegradationConfig, torch.Generator], Tensor]] = {
    "bicubic": _bicubic,
    "bsrgan": _bsrgan,
    "real_esrgan": _real_esrgan,
}


def back_projected(images: Tensor, small: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Correct images [B, 3, H, W] so that they downsample to the small images [B, 3, h, w] (Irani & Peleg 1991).

    Each round adds the difference, enlarged by bicubic interpolation. This corrects colors and positions of edges, and
    keeps finer details. All images are in [-1, 1].
    """
    for _ in range(rounds):
        difference = small - F.interpolate(images, size=small.shape[2:], mode="bicubic", antialias=True)
        images = images + F.interpolate(difference, size=images.shape[2:], mode="bicubic")  # [B, 3, H, W]
    return images.clamp(-1, 1)


def gaussian_kernel(across: float, along: float, angle: float) -> Tensor:
    """Return an anisotropic Gaussian kernel [n, n] with sum 1: standard deviations in pixels, angle in radians."""
    radius = max(math.ceil(3 * max(across, along)), 1)
    line = torch.arange(-radius, radius + 1, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / max(across, 1e-3)).square() + (v / max(along, 1e-3)).square()))
    return (kernel / kernel.sum()).float()


def resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize an image [3, H, W] with antialiasing."""
    smooth = {} if mode == "area" else {"antialias": True}
    return F.interpolate(image[None], size=size, mode=mode, **smooth)[0]


def _blur(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Blur with an isotropic or an anisotropic kernel, with probability 1/2 each; it scales with the image size."""
    scale = image.shape[1] / size[0]
    across = along = _uniform(config.blur, generator) * scale
    if _uniform((0, 1), generator) < 0.5:
        along = _uniform(config.blur, generator) * scale
    kernel = gaussian_kernel(across, along, _uniform((0, math.pi), generator))
    pad = min(len(kernel) // 2, min(image.shape[1:]) - 1)  # reflection padding must be smaller than the image
    inner = len(kernel) // 2 - pad
    kernel = kernel[inner : len(kernel) - inner, inner : len(kernel) - inner]
    padded = F.pad(image[:, None], (pad,) * 4, mode="reflect")  # [3, 1, H, W] -> [3, 1, H + 2 pad, W + 2 pad]
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]  # [3, H, W]


def _to_random_size(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Resize to a random size between half of the final size and the current size, with a random filter."""
    least = min(0.5 * size[0] / image.shape[1], 1.0)
    scale = math.exp(_uniform((math.log(least), 0), generator))
    inner = tuple(max(round(side * scale), 1) for side in image.shape[1:])
    return _to_size(image, inner, generator)


def _to_size(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return resized(image, size, _choice(RESIZINGS, generator))


def _gaussian_noise(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Add Gaussian noise, gray or in color with probability 1/2 each."""
    shape = image.shape if _uniform((0, 1), generator) < 0.5 else (1, *image.shape[1:])
    return image + _uniform(config.noise, generator) * torch.randn(shape, generator=generator)


def _poisson_noise(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Add Poisson noise of a random number of photons; it is stronger in bright pixels."""
    low, high = (math.log(value) for value in config.photons)
    photons = math.exp(_uniform((low, high), generator))
    return torch.poisson(image.clamp(0, 1) * photons, generator=generator) / photons


def _jpeg(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    quality = int(torch.randint(config.quality[0], config.quality[1] + 1, (), generator=generator))
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # [3, H, W] -> [H, W, 3]
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    decoded = np.array(Image.open(file))  # [H, W, 3]
    return torch.from_numpy(decoded).permute(2, 0, 1) / 255


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _choice(options, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]
