"""From latents to images: decoded, or rough and at once for previews."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder, preview
from stipple_core.images.images import tensor_to_image


def decode_images(autoencoder: Autoencoder, latents: Tensor) -> list[Image.Image]:
    """Latents [B, c, h, w] as images. Raises ValueError where they are not finite."""
    images = autoencoder.decode(latents).float()  # [B, 3, f * h, f * w]
    if not images.isfinite().all():
        name = str(latents.dtype).removeprefix("torch.")
        mend = "use float32, or bfloat16 on a GPU"
        if latents.dtype == torch.float32:
            mend = "use a smaller guidance scale, or get the weights again if none helps"
        raise ValueError(f"a picture has values that are not finite in {name}; {mend}")
    return [tensor_to_image(image) for image in images]


def preview_images(autoencoder: Autoencoder, z_0: Tensor) -> list[Image.Image]:
    """Latents [B, c, h, w] as images of flat squares, by the autoencoder's `latent_rgb`."""
    colors = preview(z_0.cpu(), autoencoder.latent_rgb.cpu())  # [B, 3, h, w]
    f, (h, w) = autoencoder.downsampling, z_0.shape[2:]
    return [tensor_to_image(image).resize((w * f, h * f), Image.Resampling.NEAREST) for image in colors]
