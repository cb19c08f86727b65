"""Embeddings of pictures as latents: what unCLIP's prior is trained on (Ramesh et al. 2022, section 2.2).

An encoder without a decoder, whose scale is measured, as an autoencoder's is. stipple embed makes it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.networks.regularizer import Posterior
from stipple_core.embedders import Embedder, EmbedderConfig, build_embedder
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import place, read_folder, write_weights

CLASS = "ImageEmbeddings"  # _class_name in vae/config.json
STEM = "diffusion_pytorch_model"


class ImageEmbeddings(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, d, 1, 1] of unit scale; has the public members of `Autoencoder`.

    Args:
        embedder: of pictures.
        mean, std: [d], of the embeddings of what a model is trained on.
    """

    scaling_factor, shift_factor, latent_rgb, class_name = 1.0, 0.0, None, CLASS
    decodes = False

    def __init__(self, embedder: Embedder, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.embedder = embedder
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @property
    def downsampling(self) -> int:
        """Pixels of the picture that becomes one latent, along a side: what the encoder looks at."""
        return self.embedder.config.network["size"]

    @property
    def latent_channels(self) -> int:
        """d."""
        return self.embedder.dim

    @property
    def last_layer(self) -> Tensor:
        """A weight, which tells the device."""
        return next(self.embedder.parameters())

    def encode(self, images: Tensor) -> Posterior:
        """The latents as a posterior that is a point."""
        latents = ((self.embedder.images(images) - self.mean) / self.std)[..., None, None]  # [B, d, 1, 1]
        return Posterior(latents, torch.full_like(latents, -math.inf))

    def decode(self, latents: Tensor) -> Tensor:
        """Raises ValueError: embeddings are no pictures."""
        raise ValueError("this model makes embeddings, not pictures; it serves a decoder: stipple draw --prior")

    def points(self, latents: Tensor) -> Tensor:
        """Latents [B, d, 1, 1] as embeddings [B, d], on the sphere where those of pictures are."""
        points = latents.flatten(1).float() * self.std + self.mean
        return F.normalize(points, dim=-1) * self.latent_channels**0.5

    def fingerprint(self) -> str:
        """SHA-256 over encoder and scale."""
        digest = hashlib.sha256(self.embedder.fingerprint().encode())
        for value in (self.mean, self.std):
            digest.update(value.detach().cpu().half().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `vae/` (config.json, diffusion_pytorch_model.safetensors) into a model folder."""
        target = Path(folder) / "vae"
        target.mkdir(parents=True, exist_ok=True)
        config = self.embedder.config
        write_json({"_class_name": CLASS, "kind": config.kind, "network": config.network}, target / "config.json")
        weights = {
            name: value.to("cpu", dtype if value.is_floating_point() else None)
            for name, value in self.state_dict().items()
        }
        write_weights(weights, target / f"{STEM}.safetensors")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> ImageEmbeddings:
        """Read the folder that has config.json and the weights in it. Raises FileNotFoundError or ValueError."""
        config = read_json(folder / "config.json")
        embedder = build_embedder(EmbedderConfig(kind=config["kind"], network=config["network"]), texts=False)
        embeddings = cls(embedder, torch.zeros(embedder.dim), torch.ones(embedder.dim))
        weights = read_folder(folder, STEM)
        place(embeddings, {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, folder)
        return embeddings
