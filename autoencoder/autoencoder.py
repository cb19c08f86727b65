"""The autoencoder: images to unit-scale latents and back, KL- or VQ-regularized (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.formats import autoencoder_folder
from autoencoder.formats import compvis_first_stage as compvis
from autoencoder.formats.diffusers_autoencoder import CLASSES
from autoencoder.networks import latent_scale, tiling
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from autoencoder.networks.encoder_decoder import Decoder, Encoder
from autoencoder.networks.posterior import Posterior, Reconstruction
from autoencoder.networks.vector_quantizer import VectorQuantizer
from stipple_core.files.hashing import hash_weights
from stipple_core.files.weights import misfits, place, require_fit

MEMORY = 2 << 30  # bytes


class Autoencoder(nn.Module):
    """Encoder and decoder with a KL or VQ regularizer; implements `autoencoder.interface.FirstStage`.

    Outside this class latents are unit-scale: (z - shift_factor) * scaling_factor, where z are the networks' latents.
    Parameter names are those of diffusers' AutoencoderKL (`regularizer="kl"`) or VQModel (`"vq"`).

    Attributes:
        memory: bytes that the feature maps of an image may take if gradients are disabled. Larger images are computed
            in tiles, which changes only last bits (see `tiling`). None: never in tiles.
    """

    decodes = True

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.scaling_factor = 1.0  # 1 / std of the networks' latents, measured after training
        self.shift_factor = 0.0  # their mean; 0 after `set_scale`, but other programs' autoencoders may have one
        self.memory: int | None = MEMORY
        self.latent_rgb: Tensor | None = None  # [c + 1, 3], colors of latents for previews, measured after training
        self.exact_fingerprint: str | None = None  # of the weights before they were rounded to bfloat16
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        c, d = config.latent_channels, config.code_channels
        moments = 2 if config.regularizer == "kl" else 1
        self.quant_conv = nn.Conv2d(moments * c, moments * d, 1)
        self.post_quant_conv = nn.Conv2d(d, c, 1)
        if config.regularizer == "vq":
            self.quantize = VectorQuantizer(config.codebook_size, d, config.commitment)

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return self.config.downsampling

    @property
    def latent_channels(self) -> int:
        """c, the number of channels of the latents that `encode` returns."""
        return self.config.code_channels

    @property
    def class_name(self) -> str:
        """The name of the equivalent class in diffusers."""
        return CLASSES[self.config.regularizer]

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients determine the adaptive weight of the adversarial loss."""
        return self.decoder.conv_out.weight

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass instead of kept."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = value

    def encode(self, images: Tensor) -> Posterior:
        """Encode images [B, 3, H, W] in [-1, 1] to the posterior of unit-scale latents [B, c, H/f, W/f].

        With a codebook the posterior is a point, and `decode` quantizes it (CompVis' VQModelInterface).

        Raises:
            ValueError: a side is not divisible by f.
        """
        return self.posterior(images).affine(self.shift_factor, self.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unit-scale latents [B, c, h, w] to images [B, 3, f * h, f * w], in about [-1, 1], not clamped."""
        latents = latents / self.scaling_factor + self.shift_factor
        if self.config.regularizer == "vq":
            latents = self.quantize(latents).latents
        return self._decode(latents)

    def posterior(self, images: Tensor) -> Posterior:
        """Return the posterior of the networks' latents, which are not unit-scale, in float32."""
        self.config.check_size(*images.shape[-2:])
        features = self.quant_conv(self._run(self.encoder, images))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.config.regularizer == "kl":
            return Posterior.from_moments(features)
        return Posterior(features, torch.full_like(features, -math.inf))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encode and decode for training.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            noise: [B, c, h, w], samples the posterior. None uses its mode. It is ignored with a codebook.
        """
        posterior = self.posterior(images)
        if self.config.regularizer == "vq":
            quantized = self.quantize(posterior.mean)
            return Reconstruction(self._decode(quantized.latents), posterior, quantized.loss, quantized.indices)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return Reconstruction(self._decode(latents), posterior)

    @torch.no_grad()
    def set_scale(self, mean: Tensor | float, std: float) -> None:
        """Make latents unit-scale. Call it after training, on the weights that are saved.

        The mean is moved into the 1x1 convolutions around the latents (and into the codes), which changes no
        reconstruction: diffusers' StableDiffusionPipeline and VQModel support a scaling_factor but no shift_factor.

        Args:
            mean: measured mean of the networks' latents: a number, or [c].
            std: measured standard deviation.

        Raises:
            ValueError: std is not a positive number.
        """
        if not 0.0 < std < math.inf:
            raise ValueError(f"latent std {std} is not a positive number; measure it on images that differ")
        mean = torch.as_tensor(mean, dtype=torch.float64).to(self.quant_conv.bias.device).expand(self.latent_channels)
        latent_scale.subtract_mean(self.quant_conv, self.post_quant_conv, self._codes, mean)
        self.scaling_factor, self.shift_factor = 1.0 / std, 0.0

    @torch.no_grad()
    def rescale(self, scaling_factor: float) -> None:
        """Change the scale of the networks' latents so that `scaling_factor` has this value and `shift_factor` is 0.

        Unit-scale latents and reconstructions stay the same. Programs that always multiply by 0.18215 can then use the
        weights. (The bounds [-30, 20] of log-variances move with the scale.)
        """
        gain = self.scaling_factor / scaling_factor
        if gain != 1 or self.shift_factor != 0:
            latent_scale.rescale(self.quant_conv, self.post_quant_conv, self._codes, self.shift_factor, gain)
            self.scaling_factor, self.shift_factor = scaling_factor, 0.0

    def fingerprint(self) -> str:
        """SHA-256 of weights, options and scale, to detect latents of another autoencoder.

        Weights are rounded to float16, so that it does not depend on the precision in which they are saved or loaded.
        After rounding to bfloat16, which has fewer digits, it is that of the weights before (see `opened_in`).
        """
        if self.exact_fingerprint is not None:
            return self.exact_fingerprint
        digest = hashlib.sha256(repr((self.config, self.scaling_factor, self.shift_factor)).encode())
        hash_weights(digest, self.state_dict(), half=True)
        return digest.hexdigest()

    def opened_in(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Autoencoder:
        """Convert the weights to a dtype and device in place, keeping the fingerprint; return the autoencoder."""
        if dtype == torch.bfloat16:
            self.exact_fingerprint = self.fingerprint()
        return self.to(device, dtype)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write vae/ (config.json, diffusion_pytorch_model.safetensors) into a model folder, readable by diffusers."""
        scales = self.scaling_factor, self.shift_factor
        stored = autoencoder_folder.StoredAutoencoder(self.config, self.state_dict(), *scales, self.latent_rgb)
        autoencoder_folder.write(stored, Path(folder), dtype)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> Autoencoder:
        """Load an autoencoder that `save`, diffusers or CompVis wrote.

        Args:
            folder: a folder with config.json and weights, or a model folder with such a folder `vae` or `vqvae`; or a
                single file of a first stage or of a whole model, in CompVis' names.
            device: the device of the weights.
            dtype: the dtype of the weights in memory, regardless of the files.
            variant: the variant of the files, such as "fp16"; see `stipple_core.files.weights.read_folder`.

        Raises:
            FileNotFoundError: config.json or the weights do not exist.
            ValueError: an option is not supported, or weights are missing, unexpected or of another shape.
        """
        if Path(folder).is_file():
            try:
                return cls.from_compvis(*autoencoder_folder.read_compvis_file(Path(folder))).opened_in(dtype, device)
            except ValueError as error:
                raise ValueError(f"{folder} can't be opened: {error}") from None
        stored, file = autoencoder_folder.read(Path(folder), variant)
        autoencoder = cls._on_meta(stored.config)
        place(autoencoder, stored.weights, file)
        autoencoder.scaling_factor, autoencoder.shift_factor = stored.scaling_factor, stored.shift_factor
        autoencoder.latent_rgb = stored.latent_rgb
        return autoencoder.requires_grad_(True).opened_in(dtype, device)

    @classmethod
    def from_compvis(cls, weights: Mapping[str, Tensor], scaling_factor: float | None = None) -> Autoencoder:
        """Make an autoencoder from weights in CompVis' names (see `compvis_first_stage.first_stage_keys`).

        Args:
            weights: all weights of a first stage.
            scaling_factor: the scale of latents. None: the one of CompVis' published models.

        Raises:
            ValueError: they are not the weights of a KL or VQ autoencoder, or some are missing.
        """
        config = compvis.compvis_config(weights)
        autoencoder = cls._on_meta(config)
        expected = compvis.to_compvis(autoencoder.state_dict(), config)
        require_fit(misfits(expected, weights), "the first stage")
        place(autoencoder, compvis.from_compvis(weights), "the first stage")
        default = compvis.SCALES[config.regularizer]
        autoencoder.scaling_factor = default if scaling_factor is None else scaling_factor
        return autoencoder.requires_grad_(True)

    @classmethod
    def _on_meta(cls, config: AutoencoderConfig) -> Autoencoder:
        with torch.device("meta"):
            return cls(config)

    @property
    def _codes(self) -> Tensor | None:
        return self.quantize.embedding.weight if self.config.regularizer == "vq" else None

    def _decode(self, latents: Tensor) -> Tensor:
        return self._run(self.decoder, self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def _run(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        if self.memory is None or torch.is_grad_enabled():
            return network(x)
        return tiling.run(network, x, self.memory)
