"""The last of three rooms that a prompt passes: from latents to images, decoded in full or as a quick preview."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from autoencoder import FirstStage, preview
from ldm.sampling.model import Model
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import SourceImages
from stipple_core.images.images import tensor_to_image


@dataclass(frozen=True)
class FinishedImage:
    """A finished image, and the settings that make it again with the same model."""

    image: Image.Image
    settings: Settings


def finish(model: Model, batch: Sequence[Settings], latents: Tensor) -> Iterator[FinishedImage]:
    """Decode the latents [B, c, h, w] of a batch one by one, see `TextToImage.finish`."""
    for place, picture in enumerate(batch):
        if picture.place == place:
            (image,) = decode_images(model.autoencoder, latents[place : place + 1].to(model.dtype))
            yield FinishedImage(_fit_to_sources(model, picture, image), picture)


def _fit_to_sources(model: Model, picture: Settings, image: Image.Image) -> Image.Image:
    """Cut a decoded image to its size, and make it agree with the image that it enlarges or completes."""
    size = model.size(picture)
    if picture.back_projection:
        sources = SourceImages.of(picture, model.files)
        image = sources.back_projected(image, size, model.factor, picture.back_projection)
    image = image.crop((0, 0, size.width, size.height))
    if picture.mask is None:
        return image
    return SourceImages.of(picture, model.files).completed(image, size, picture.feather)


@torch.inference_mode()
def decode_images(autoencoder: FirstStage, latents: Tensor) -> list[Image.Image]:
    """Decode latents [B, c, h, w]. Raises ValueError if a decoded value is not finite."""
    images = autoencoder.decode(latents).float()  # [B, 3, f * h, f * w]
    if not images.isfinite().all():
        name = str(latents.dtype).removeprefix("torch.")
        fix = "use float32, or bfloat16 on a GPU"
        if latents.dtype == torch.float32:
            fix = "use a smaller guidance scale, or get the weights again if none helps"
        raise ValueError(f"a picture has values that are not finite in {name}; {fix}")
    return [tensor_to_image(image) for image in images]


def preview_images(autoencoder: FirstStage, z_0: Tensor) -> list[Image.Image]:
    """Turn latents [B, c, h, w] into images of flat squares, by the autoencoder's `latent_rgb`."""
    colors = preview(z_0.cpu(), autoencoder.latent_rgb.cpu())  # [B, 3, h, w]
    f, (h, w) = autoencoder.downsampling, z_0.shape[2:]
    return [tensor_to_image(image).resize((w * f, h * f), Image.Resampling.NEAREST) for image in colors]
