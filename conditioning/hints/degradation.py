"""How a low-resolution picture is made of a good one: bicubic, or blurred, noisy and compressed as real ones are.

BSRGAN (Zhang et al. 2021) shuffles the damages, Real-ESRGAN (Wang et al. 2021) does a chain of them twice. All is drawn
from one generator: the same address gives the same picture.
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
ROUNDS = 3  # of back-projection, as usual


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """What happens to a picture on its way to fewer pixels; ranges are of what is drawn, least and most.

    Raises:
        ValueError: an unknown kind, a factor below 1, or a range that is none.
    """

    kind: str = "bicubic"  # a key of DEGRADATIONS: bicubic | bsrgan | real_esrgan
    factor: int = 4  # by which the sides shrink
    blur: tuple[float, float] = (0.1, 1.0)  # standard deviation of blurs, in pixels of the result
    noise: tuple[float, float] = (0.0, 0.05)  # standard deviation of Gaussian noise; the picture goes from 0 to 1
    photons: tuple[float, float] = (100.0, 10000.0)  # that Poisson noise counts in a white pixel
    quality: tuple[int, int] = (40, 95)  # of JPEG

    def __post_init__(self) -> None:
        if self.kind not in DEGRADATIONS:
            raise ValueError(f"degradation.kind {self.kind!r} is unknown; use one of {', '.join(DEGRADATIONS)}")
        if self.factor < 1:
            raise ValueError(f"degradation.factor {self.factor} must be at least 1, which keeps the size")
        for name, least, most in (("blur", 0, 100), ("noise", 0, 1), ("photons", 1, 1e9), ("quality", 1, 100)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 2 or not least <= getattr(self, name)[0] <= getattr(self, name)[1] <= most:
                given = list(getattr(self, name))
                raise ValueError(f"degradation.{name} {given} must be [least, most], between {least} and {most}")


def degrade(image: Tensor, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """A small picture [3, ceil(H / factor), ceil(W / factor)] of a good one [3, H, W], both in [-1, 1]."""
    size = math.ceil(image.shape[1] / config.factor), math.ceil(image.shape[2] / config.factor)
    return DEGRADATIONS[config.kind]((image + 1) / 2, size, config, generator).clamp(0, 1) * 2 - 1


def _bicubic(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    return resized(image, size, "bicubic")


def _bsrgan(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Two blurs, a change of size, two kinds of noise and JPEG, in an order that is drawn; then JPEG once more."""
    steps: list[Callable[..., Tensor]] = [_blur, _blur, _to_random_size, _gaussian_noise, _poisson_noise, _jpeg]
    for index in torch.randperm(len(steps), generator=generator).tolist():
        image = steps[index](image, size, config, generator).clamp(0, 1)
    return _jpeg(_to_size(image, size, generator), size, config, generator)


def _real_esrgan(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Blur, a change of size, one kind of noise and JPEG, twice; at the end the size, before or after the last JPEG."""
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
    """Images [B, 3, H, W] changed so that they shrink to the small ones [B, 3, h, w] (Irani & Peleg 1991).

    What enlarging got wrong on a scale that the small pictures show is mended: colors, where edges are. What is finer
    stays. Both are in [-1, 1]; each round adds the difference, made large by bicubic interpolation.
    """
    for _ in range(rounds):
        missing = small - F.interpolate(images, size=small.shape[2:], mode="bicubic", antialias=True)
        images = images + F.interpolate(missing, size=images.shape[2:], mode="bicubic")  # [B, 3, H, W]
    return images.clamp(-1, 1)


def gaussian_kernel(across: float, along: float, angle: float) -> Tensor:
    """An odd square [n, n] that sums to 1: a Gaussian with two standard deviations in pixels, turned by an angle."""
    radius = max(math.ceil(3 * max(across, along)), 1)
    line = torch.arange(-radius, radius + 1, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / max(across, 1e-3)).square() + (v / max(along, 1e-3)).square()))
    return (kernel / kernel.sum()).float()


def resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """An image [3, H, W] at another size, with a filter wide enough for what it leaves out."""
    smooth = {} if mode == "area" else {"antialias": True}
    return F.interpolate(image[None], size=size, mode=mode, **smooth)[0]


def _blur(image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """By a round kernel or a longish one, half of the time each; wider where the picture has more pixels to lose."""
    scale = image.shape[1] / size[0]
    across = along = _uniform(config.blur, generator) * scale
    if _uniform((0, 1), generator) < 0.5:
        along = _uniform(config.blur, generator) * scale
    kernel = gaussian_kernel(across, along, _uniform((0, math.pi), generator))
    pad = min(len(kernel) // 2, min(image.shape[1:]) - 1)  # reflection needs that many pixels
    inner = len(kernel) // 2 - pad
    kernel = kernel[inner : len(kernel) - inner, inner : len(kernel) - inner]
    padded = F.pad(image[:, None], (pad,) * 4, mode="reflect")  # [3, 1, H, W] -> [3, 1, H + 2 pad, W + 2 pad]
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]  # [3, H, W]


def _to_random_size(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Between half of the last size and the size that the picture has, by a filter that is drawn."""
    least = min(0.5 * size[0] / image.shape[1], 1.0)
    scale = math.exp(_uniform((math.log(least), 0), generator))
    inner = tuple(max(round(side * scale), 1) for side in image.shape[1:])
    return _to_size(image, inner, generator)


def _to_size(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return resized(image, size, _choice(RESIZINGS, generator))


def _gaussian_noise(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Gray as often as in color."""
    shape = image.shape if _uniform((0, 1), generator) < 0.5 else (1, *image.shape[1:])
    return image + _uniform(config.noise, generator) * torch.randn(shape, generator=generator)


def _poisson_noise(
    image: Tensor, size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> Tensor:
    """Of counted photons: stronger where it is bright, relative to nothing but their number."""
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
