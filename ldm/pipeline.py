"""From a prompt to a picture: text encoder, guided sampling, decoder, put together (Rombach et al. 2022, section 3).

A model is a folder in the diffusers layout, see `TextToImage.load`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import Conditioner, ConditionInputs
from ldm.denoising.denoiser import Denoiser
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.model_folder import DEFAULTS, Parts, open_model, save_model
from ldm.guidance.base import Denoise
from ldm.networks.cached_unet import CachedUNet
from ldm.networks.unet import UNet
from ldm.samplers.steps import Step
from ldm.sampling.compatibility import check_draws, check_parts, check_prior, check_weaker
from ldm.sampling.decoding import decode_images, preview_images
from ldm.sampling.gradient_guides import GradientGuide
from ldm.sampling.plan import batches, plan, walked
from ldm.sampling.run import run
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import Size, Sources
from ldm.schedules.registry import make_schedule
from stipple_core.operators import winograd
from stipple_core.operators.winograd import lay_out


@dataclass(frozen=True)
class Picture:
    """A finished picture, and all that is needed to make it again with the same model."""

    image: Image.Image
    settings: Settings


class TextToImage:
    """A model that makes pictures from prompts.

    Args:
        autoencoder, unet, conditioner: on one device, in one dtype, in evaluation mode; they are used as they are.
        scheduling: the noise levels that the UNet was trained on, what it outputs, how it is to be sampled.
        defaults: the settings of a picture where the caller does not say otherwise.

    Attributes:
        weaker: what autoguidance leads away from, see `guide_by`.
        prior: what says the embedding of a picture where only a prompt is given, see `use_prior`.
        leads: what leads by a gradient, by the field of `Settings` that is its scale.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        unet: UNet,
        conditioner: Conditioner,
        scheduling: Scheduling,
        defaults: Settings | None = None,
    ):
        check_parts(autoencoder, unet, conditioner)
        conditioner.bind_encoder(_seen_by(autoencoder))
        self.autoencoder, self.unet, self.conditioner = autoencoder, unet, conditioner
        self.scheduling, self.schedule = scheduling, make_schedule(scheduling.schedule)
        side = unet.config.sample_size * autoencoder.downsampling
        defaults = defaults or Settings()
        sides = {"height": defaults.height or side, "width": defaults.width or side}
        self.defaults = replace(defaults, **sides, spacing=defaults.spacing or scheduling.spacing)
        self.denoiser = Denoiser(CachedUNet(unet), self.schedule, scheduling.prediction)
        self.weaker: TextToImage | None = None
        self.prior: TextToImage | None = None
        self.gradient_guides: dict[str, GradientGuide] = {}

    def guide_by(self, weaker: TextToImage) -> None:
        """Give autoguidance a weaker version of this model: smaller, or trained for less (Karras et al. 2024).

        Raises:
            ValueError: it reads other latents or other text than this model, or knows other noise levels.
        """
        check_weaker(self, weaker)
        self.weaker = weaker

    def use_prior(self, prior: TextToImage) -> None:
        """Give a decoder of image embeddings the prior that makes them of prompts (Ramesh et al. 2022).

        Raises:
            ValueError: this model reads no embeddings, or the other makes none, or those of another encoder.
        """
        check_prior(self, prior)
        self.prior = prior
        self.conditioner.readers["image"].reads_prompts = True

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks; latents between steps are float32 whatever it is."""
        return next(self.unet.parameters()).dtype

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """Pictures of one prompt or several; the arguments are those of `generate`."""
        return [picture.image for picture in self.generate(prompt, **settings)]

    def generate(
        self, prompt: str | Sequence[str], *, num_images: int = 1, batch_size: int | None = None, **settings: Any
    ) -> Iterator[Picture]:
        """Make pictures, and yield each when it is finished.

        Args:
            prompt: one or several.
            num_images: pictures per prompt.
            batch_size: pictures computed together; None: see `default_batch`.
            settings: fields of `Settings`, such as negative_prompt, guidance_scale, steps, sampler, height, width; seed
                is that of the first picture, picture i has seed + i; -1 draws one at random.

        Raises:
            ValueError: naming value, rule and mend, before anything is computed.
        """
        check_draws(self)
        wanted = self.plan(prompt, num_images=num_images, **settings)
        for batch in self.batches(wanted, self.default_batch if batch_size is None else batch_size):
            for step in self.sample(batch):
                latents = step.z  # of the last step when the loop ends
            yield from self.finish(batch, latents)

    @property
    def default_batch(self) -> int:
        """1 on a CPU, so that no byte depends on the batch (4 together take two thirds of the time); elsewhere 4."""
        return 1 if self.device.type == "cpu" else 4

    def plan(
        self, prompt: str | Sequence[str], *, num_images: int = 1, given: ConditionInputs | None = None, **settings: Any
    ) -> list[Settings]:
        """The complete settings of each picture that `generate` would make; warns of prompts that are too long.

        Args:
            prompt, num_images, settings: as of `generate`.
            given: what `sample` is to be given besides.

        Raises:
            ValueError: in one line, for settings and prompts that this model can't take, and what it needs.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return plan(self, prompts, num_images, given, settings)

    batches = staticmethod(batches)

    def steps(self, picture: Settings) -> int:
        """How many steps `sample` yields for a picture."""
        return (len(walked(self, picture)) - 1) * picture.resample

    def size(self, picture: Settings) -> Size:
        """Of a picture, and of what the autoencoder makes for it."""
        return Size(height=picture.height, width=picture.width, downsampling=self.autoencoder.downsampling)

    @torch.inference_mode()
    def sample(
        self,
        batch: Sequence[Settings],
        around: Callable[[Denoise], Denoise] | None = None,
        given: ConditionInputs | None = None,
    ) -> Iterator[Step]:
        """Walk a batch of B pictures from noise to latents [B, c, h, w]; each draws from its own CPU generator.

        Args:
            batch: as `batches` makes it.
            around: what is put around the guided denoiser, such as guidance by a gradient; `generate` has none.
            given: what there is besides prompts for a model that reads more; its own prompts don't count.
        """
        yield from run(self, batch, around, given)

    def finish(self, batch: Sequence[Settings], latents: Tensor) -> Iterator[Picture]:
        """Decode latents [B, c, h, w], one by one; pictures that are not at their own place in the batch are left out.

        So `[settings] * settings.batch` makes one picture of a batch again, bit for bit, without the others of it.
        """
        for place, picture in enumerate(batch):
            if picture.place == place:
                yield Picture(self.fitted(self.decode(latents[place : place + 1])[0], picture), picture)

    def fitted(self, made: Image.Image, picture: Settings) -> Image.Image:
        """A decoded image cut to the picture's size, in agreement with the image that it enlarges or completes."""
        size = self.size(picture)
        if picture.back_projection:
            made = Sources.of(picture).agreed(made, size, self.factor, picture.back_projection)
        made = made.crop((0, 0, size.width, size.height))
        return made if picture.mask is None else Sources.of(picture).completed(made, size, picture.feather)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, c, h, w] as images. Raises ValueError where they are not finite."""
        return decode_images(self.autoencoder, latents.to(self.dtype))

    @torch.inference_mode()
    def preview(self, z_0: Tensor) -> list[Image.Image]:
        """Estimates of clean latents [B, c, h, w] as images: rough and at once where the autoencoder has its colors."""
        return self.decode(z_0) if self.autoencoder.latent_rgb is None else preview_images(self.autoencoder, z_0)

    def save(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write a model folder in the diffusers layout; dtype None keeps that of the weights."""
        save_model(self.parts, folder, dtype)

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        scheduling = replace(self.scheduling, spacing=self.defaults.spacing)
        chosen = asdict(self.defaults)
        defaults = {name: chosen[name] for name in DEFAULTS if chosen[name] is not None}
        return Parts(self.autoencoder, self.unet, self.conditioner, scheduling, defaults)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        config_yaml: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
        prediction: str | None = None,
        keep_transforms: bool = False,
    ) -> TextToImage:
        """Open a model folder (model_index.json, vae/, unet/, text_encoder/, ...), or a single file of CompVis' kind.

        Args:
            path: as `save` or diffusers wrote it (our own defaults may be absent), or a .ckpt or .safetensors file.
            device: where to compute.
            dtype: to compute in, whatever the files hold; on a CPU half precision is many times slower.
            variant: such as "fp16": which weights of a folder that has several.
            config_yaml, tokenizer, prediction: of a single file: see `ldm.formats.single_file.open_single_file`.
            keep_transforms: spend memory for time on a CPU, see `stipple_core.operators.winograd.keep_transforms`.

        Raises:
            FileNotFoundError, ValueError: naming what is missing, or the option that we don't implement, or that is of
                the other kind of source.
        """
        if torch.device(device).type == "cpu" and dtype != torch.float32:
            warnings.warn(f"{dtype} is 40 to 100 times slower than float32 on most CPUs", stacklevel=2)
        parts = open_model(path, dtype, variant, config_yaml, tokenizer, prediction)
        autoencoder, unet = lay_out(parts.autoencoder.to(device)), lay_out(parts.unet.to(device))
        if keep_transforms:
            for network in (autoencoder, unet):
                winograd.keep_transforms(network)
        return cls(autoencoder, unet, parts.conditioner.to(device), parts.scheduling, parts.settings)

    @property
    def is_conditional(self) -> bool:
        """Whether the UNet is told anything besides z_t and t."""
        widths = (self.conditioner.context_dim, self.conditioner.vector_dim, self.conditioner.latent_channels)
        return any(widths)

    @property
    def reads_scale(self) -> bool:
        """Whether the UNet was distilled from a guided one, and is told the guidance scale."""
        return self.unet.config.guidance_dim is not None

    @property
    def factor(self) -> int:
        """How many times larger than the image a picture is; 1 but for models that enlarge."""
        return 1 if self.conditioner.hint is None else self.conditioner.hint.factor


def _seen_by(autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, H, W], wherever they are, -> latents; it holds nothing else of a model, however long it is kept."""

    def encode(images: Tensor) -> Tensor:
        weight = next(autoencoder.parameters(), None)  # pixels have none
        return autoencoder.encode(images if weight is None else images.to(weight.device, weight.dtype)).mode()

    return encode
