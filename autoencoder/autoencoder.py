"""The first stage: images to unit-scale latents and back, KL- or VQ-regularized (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.formats import compvis_first_stage as compvis
from autoencoder.formats import diffusers_autoencoder as interop
from autoencoder.networks import tiling
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from autoencoder.networks.encoder_decoder import Decoder, Encoder
from autoencoder.networks.regularizer import Posterior, VectorQuantizer
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import (
    find_weights,
    misfits,
    outline,
    place,
    read_folder,
    read_weights,
    rename_old_attention,
    require_fit,
    write_weights,
)

STEM = "diffusion_pytorch_model"
MEMORY = 2 << 30  # bytes
FOLDERS = ("vae", "vqvae")  # of the autoencoder in a model folder; the second is that of diffusers' LDM pipelines


@dataclass(frozen=True)
class Reconstruction:
    """What training needs of a pass through the autoencoder. Latents are those of the networks, not unit-scale."""

    images: Tensor  # [B, 3, H, W]
    posterior: Posterior  # [B, c, h, w]; with a codebook a point: the encoder's output
    codebook_loss: Tensor | None = None  # [], codebook + beta * commitment; None without a codebook
    indices: Tensor | None = None  # [B, h, w], the codes used; None without a codebook


class Autoencoder(nn.Module):
    """E and D. Outside this class latents are unit-scale: (z - shift_factor) * scaling_factor of the networks' z.

    Parameter names are those of diffusers' AutoencoderKL (`regularizer="kl"`) or VQModel (`"vq"`).

    Attributes:
        memory: bytes that the feature maps of a picture may take where there are no gradients; what would take more is
            computed in tiles, which changes no more than last bits (see `tiling`). None: always whole.
    """

    decodes = True  # latents to images; embeddings, which have the same members, do not

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.scaling_factor = 1.0  # 1 / std of the networks' latents, measured
        self.shift_factor = 0.0  # their mean; zero here (see set_scale), other programs' autoencoders may have one
        self.memory: int | None = MEMORY
        self.latent_rgb: Tensor | None = None  # [c + 1, 3], colors of latents for previews, measured
        self.before: str | None = None  # fingerprint of the weights that were rounded to bfloat16; None: they were not
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
        """f: pixels per latent, along one side."""
        return self.config.downsampling

    @property
    def latent_channels(self) -> int:
        """c, channels of the latents that `encode` gives."""
        return self.config.code_channels

    @property
    def class_name(self) -> str:
        """Its class in diffusers."""
        return interop.CLASSES[self.config.regularizer]

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight of the adversarial loss compares gradients."""
        return self.decoder.conv_out.weight

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass instead of kept."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = value

    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] to the posterior of unit-scale latents [B, c, H/f, W/f].

        With a codebook the posterior is a point; `decode` quantizes it (CompVis' VQModelInterface).

        Raises:
            ValueError: a side is not divisible by f.
        """
        return self.posterior(images).affine(self.shift_factor, self.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Unit-scale latents [B, c, h, w] to images [B, 3, f * h, f * w], about [-1, 1] but not clamped."""
        latents = latents / self.scaling_factor + self.shift_factor
        if self.config.regularizer == "vq":
            latents = self.quantize(latents).latents
        return self._draw(latents)

    def posterior(self, images: Tensor) -> Posterior:
        """The posterior of the networks' own latents, before the scale, in float32; for `LatentStatistics`."""
        self._check_size(images)
        features = self.quant_conv(self._through(self.encoder, images))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.config.regularizer == "kl":
            return Posterior.from_moments(features)
        return Posterior(features, torch.full_like(features, -math.inf))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encode and decode for training.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            noise: [B, c, h, w], samples the posterior; None takes its mode. A codebook ignores it.
        """
        posterior = self.posterior(images)
        if self.config.regularizer == "vq":
            quantized = self.quantize(posterior.mean)
            return Reconstruction(self._draw(quantized.latents), posterior, quantized.loss, quantized.indices)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return Reconstruction(self._draw(latents), posterior)

    @torch.no_grad()
    def set_scale(self, mean: Tensor | float, std: float) -> None:
        """Make latents unit-scale, given the measured mean (one, or per channel [c]) and std of the networks' latents.

        The mean goes into the 1x1 convolutions around the latents (and into the codes), which changes no
        reconstruction: diffusers' StableDiffusionPipeline and VQModel know a scaling_factor but no shift. To be called
        when training is over, on the weights that are saved.

        Raises:
            ValueError: std is not a positive number.
        """
        if not 0.0 < std < math.inf:
            raise ValueError(f"latent std {std} is not a positive number; measure it on images that differ")
        bias, weight = self.quant_conv.bias, self.post_quant_conv.weight
        mean = torch.as_tensor(mean, dtype=torch.float64).to(bias.device).expand(self.latent_channels)
        bias[: self.latent_channels] -= mean.to(bias)
        self.post_quant_conv.bias += (weight[:, :, 0, 0].double() @ mean).to(bias)
        if self.config.regularizer == "vq":
            self.quantize.embedding.weight -= mean.to(bias)
        self.scaling_factor, self.shift_factor = 1.0 / std, 0.0

    @torch.no_grad()
    def rescale(self, scaling_factor: float) -> None:
        """Give the networks' latents another scale, so that `scaling_factor` is this one and shift_factor 0.

        The unit-scale latents and all reconstructions stay: a program that always multiplies by 0.18215 reads them
        right. (A log-variance beyond [-30, 20], where it is clamped, moves with the bounds.)
        """
        gain, shift, c = self.scaling_factor / scaling_factor, self.shift_factor, self.latent_channels
        if gain == 1 and shift == 0:
            return
        before, after = self.quant_conv, self.post_quant_conv
        after.bias += after.weight[:, :, 0, 0].double().sum(1).mul(shift).to(after.bias)
        after.weight /= gain
        before.weight[:c] *= gain
        before.bias[:c] = (before.bias[:c].double() - shift).mul(gain).to(before.bias)
        if self.config.regularizer == "kl":
            before.bias[c:] += 2 * math.log(gain)
        else:
            codes = self.quantize.embedding.weight
            codes.copy_((codes.double() - shift) * gain)
        self.scaling_factor, self.shift_factor = scaling_factor, 0.0

    def fingerprint(self) -> str:
        """SHA-256 over weights, options and scale: latents of another autoencoder are not to be mixed with ours.

        Over weights rounded to half precision, so that it is the same in whatever precision they were saved or opened;
        of bfloat16, which has fewer digits, it is that from before the weights were rounded to it, see `opened_in`.
        """
        if self.before is not None:
            return self.before
        digest = hashlib.sha256(repr((self.config, self.scaling_factor, self.shift_factor)).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().half().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def opened_in(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Autoencoder:
        """The same with weights of another precision, on a device; it keeps its fingerprint."""
        if dtype == torch.bfloat16:
            self.before = self.fingerprint()
        return self.to(device, dtype)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `vae/` (config.json, diffusion_pytorch_model.safetensors) into a model folder, for diffusers too."""
        target = Path(folder) / "vae"
        target.mkdir(parents=True, exist_ok=True)
        options = interop.to_diffusers(self.config) | {"scaling_factor": self.scaling_factor}
        if self.shift_factor:
            options["shift_factor"] = self.shift_factor
        if self.latent_rgb is not None:
            options["_latent_rgb"] = self.latent_rgb.tolist()
        write_json(options, target / "config.json")
        weights = {name: value.to("cpu", dtype) for name, value in self.state_dict().items()}
        write_weights(weights, target / f"{STEM}.safetensors")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> Autoencoder:
        """Read a model folder, or the `vae` folder in it, as `save` or diffusers wrote it; or a file in CompVis' names.

        Args:
            folder: with config.json and weights in it, or with a folder `vae` or `vqvae` that has them; or the single
                file of a first stage or a whole model.
            device: where to.
            dtype: of the weights in memory, whatever the files hold.
            variant: such as "fp16", of the files; see `stipple_core.files.weights.read_folder`.

        Raises:
            FileNotFoundError: config.json or the weights are not there.
            ValueError: an option is unknown here, or weights are missing, left over or of another shape.
        """
        if Path(folder).is_file():
            try:
                keys = compvis.first_stage_keys(outline(folder))
                state = read_weights(folder, {compvis.SCALE, *keys.values()}.__contains__)
                weights = {name: state[key] for name, key in keys.items()}
                return cls.from_compvis(weights, compvis.read_scale(state)).opened_in(dtype, device)
            except ValueError as error:
                raise ValueError(f"{folder} can't be opened: {error}") from None
        inner = (Path(folder) / name for name in FOLDERS)
        source = next((path for path in inner if path.is_dir()), Path(folder))
        absent = f"no config.json in {source}; give a model folder with a vae folder in it"
        options = read_json(source / "config.json", absent)
        with torch.device("meta"):
            autoencoder = cls(interop.from_diffusers(options))
        file = find_weights(source, STEM, variant)
        place(autoencoder, rename_old_attention(read_folder(source, STEM, variant)), file)
        autoencoder.scaling_factor = options.get("scaling_factor", 0.18215)  # diffusers leaves its default out
        autoencoder.shift_factor = options.get("shift_factor") or 0.0
        if "_latent_rgb" in options:
            autoencoder.latent_rgb = torch.tensor(options["_latent_rgb"])
        return autoencoder.requires_grad_(True).opened_in(dtype, device)

    @classmethod
    def from_compvis(cls, weights: Mapping[str, Tensor], scaling_factor: float | None = None) -> Autoencoder:
        """The autoencoder of weights in CompVis' names (see `compvis.first_stage_keys`); None is their usual scale.

        Raises:
            ValueError: they are not those of a KL or VQ autoencoder, or not all of them.
        """
        config = compvis.compvis_config(weights)
        with torch.device("meta"):
            autoencoder = cls(config)
        expected = compvis.to_compvis(autoencoder.state_dict(), config)
        require_fit(misfits(expected, weights), "the first stage")
        place(autoencoder, compvis.from_compvis(weights), "the first stage")
        usual = compvis.SCALES[config.regularizer]
        autoencoder.scaling_factor = usual if scaling_factor is None else scaling_factor
        return autoencoder.requires_grad_(True)

    def _draw(self, latents: Tensor) -> Tensor:
        return self._through(self.decoder, self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def _through(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        if self.memory is None or torch.is_grad_enabled():
            return network(x)
        return tiling.run(network, x, self.memory)

    def _check_size(self, images: Tensor) -> None:
        f = self.downsampling
        for side in images.shape[-2:]:
            if side % f:
                low = side // f * f
                sizes = f"{low} or {low + f}" if low else f"{f}"
                raise ValueError(f"image size {side} is not divisible by {f} (autoencoder downsampling); use {sizes}")
