"""Image embeddings as latents, on which unCLIP's prior is trained (Ramesh et al. 2022, section 2.2).

An encoder without a decoder, whose scale is measured like that of an autoencoder. `stipple embed` makes it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.networks.posterior import Posterior
from stipple_core.embedders import Embedder, EmbedderConfig, build_embedder
from stipple_core.files.hashing import raw_bytes
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import place, read_folder, write_weights

CLASS = "ImageEmbeddings"  # _class_name in vae/config.json
STEM = "diffusion_pytorch_model"


class ImageEmbeddings(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to unit-scale latents [B, d, 1, 1]; implements `autoencoder.interface.FirstStage`.

    Args:
        embedder: embeds images.
        mean, std: [d], of the embeddings of the training images.
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
        """The side in pixels of the image that becomes one latent: the input size of the embedder."""
        return self.embedder.config.network["size"]

    @property
    def latent_channels(self) -> int:
        """d, the dimension of embeddings."""
        return self.embedder.dim

    def encode(self, images: Tensor) -> Posterior:
        """Encode images [B, 3, H, W] to a posterior that is a point, [B, d, 1, 1]."""
        latents = ((self.embedder.images(images) - self.mean) / self.std)[..., None, None]  # [B, d, 1, 1]
        return Posterior(latents, torch.full_like(latents, -math.inf))

    def decode(self, latents: Tensor) -> Tensor:
        """Raise a ValueError: embeddings can't be decoded to images."""
        raise ValueError(
            "this model generates embeddings, not images; use it with a decoder model: stipple draw --prior"
        )

    def embeddings(self, latents: Tensor) -> Tensor:
        """Convert latents [B, d, 1, 1] to embeddings [B, d] of length sqrt(d)."""
        embeddings = latents.flatten(1).float() * self.std + self.mean
        return F.normalize(embeddings, dim=-1) * self.latent_channels**0.5

    def fingerprint(self) -> str:
        """SHA-256 of embedder, mean and std."""
        digest = hashlib.sha256(self.embedder.fingerprint().encode())
        for value in (self.mean, self.std):
            digest.update(raw_bytes(value.detach().cpu().half()))
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
        """Load from a folder with config.json and weights. Raises FileNotFoundError or ValueError."""
        config = read_json(folder / "config.json")
        embedder = build_embedder(EmbedderConfig(kind=config["kind"], network=config["network"]), texts=False)
        embeddings = cls(embedder, torch.zeros(embedder.dim), torch.ones(embedder.dim))
        weights = read_folder(folder, STEM)
        place(embeddings, {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, folder)
        return embeddings
