"""A model that makes images: its networks, its noise levels, its defaults, and what assists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoencoder import FirstStage
from conditioning.interface.conditioner import Conditioner
from ldm.denoising.denoiser import Denoiser
from ldm.formats.diffusers.network_kinds import Network
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.model_parts import check_parts
from ldm.networks.cached_unet import CachedUNet
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.sampling.gradient_guides import GRADIENT_GUIDES, GradientGuide
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import DecodedFiles, ImageSize
from ldm.schedules.noise_schedule import Schedule
from ldm.schedules.registry import make_schedule


@dataclass(eq=False, repr=False)
class Model:
    """A model that makes images, and what the settings of an image mean for it.

    Args:
        autoencoder, unet, conditioner: on one device, in one dtype, in evaluation mode. They are not copied.
        scheduling: the noise levels that the UNet was trained on, its prediction, and how it is sampled.
        defaults: default settings of an image.

    Attributes:
        schedule: the noise levels.
        denoiser: the UNet as an estimate of clean latents.
        weaker: the model that autoguidance moves away from, if there is one.
        prior: the model that samples image embeddings from prompts, if there is one.
        gradient_guides: guides by gradients, by the name of the setting that is their scale.
        files: decoded source images.

    Raises:
        ValueError: the parts do not fit together.
    """

    autoencoder: FirstStage
    unet: Network
    conditioner: Conditioner
    scheduling: Scheduling
    defaults: Settings | None = None
    schedule: Schedule = field(init=False)
    denoiser: Denoiser = field(init=False)
    weaker: Model | None = field(init=False, default=None)
    prior: Model | None = field(init=False, default=None)
    gradient_guides: dict[str, GradientGuide] = field(init=False, default_factory=dict)
    files: DecodedFiles = field(init=False, default_factory=DecodedFiles)

    def __post_init__(self) -> None:
        check_parts(self.autoencoder, self.unet, self.conditioner)
        self.conditioner.bind_encoder(_encoder_of(self.autoencoder))
        self.schedule = make_schedule(self.scheduling.schedule)
        side = self.unet.config.sample_size * self.autoencoder.downsampling
        defaults = self.defaults or Settings()
        sides = {"height": defaults.height or side, "width": defaults.width or side}
        self.defaults = replace(defaults, **sides, spacing=defaults.spacing or self.scheduling.spacing)
        self.denoiser = Denoiser(CachedUNet(self.unet), self.schedule, self.scheduling.prediction)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks; latents between steps are always float32."""
        return next(self.unet.parameters()).dtype

    @property
    def is_conditional(self) -> bool:
        """Whether the UNet has inputs besides z_t and t."""
        widths = (self.conditioner.context_dim, self.conditioner.vector_dim, self.conditioner.latent_channels)
        return any(widths)

    @property
    def reads_scale(self) -> bool:
        """Whether the UNet was distilled from a guided one and is conditioned on the guidance scale."""
        return self.unet.config.guidance_dim is not None

    @property
    def learned_variance(self) -> bool:
        """Whether the UNet also outputs the variance of DDPM's steps."""
        return self.unet.config.out_channels > self.autoencoder.latent_channels

    @property
    def factor(self) -> int:
        """How many times larger than its source an image is; 1 unless the model enlarges images."""
        return 1 if self.conditioner.hint is None else self.conditioner.hint.factor

    @property
    def hint_reads(self) -> frozenset[str]:
        """Which of image, mask, map and noise_level the model's hint is made of."""
        return frozenset() if self.conditioner.hint is None else self.conditioner.hint.reads

    @property
    def default_batch(self) -> int:
        """1 on a CPU, so that no byte depends on the batch (4 together take two thirds of the time); elsewhere 4."""
        return 1 if self.device.type == "cpu" else 4

    def size(self, picture: Settings) -> ImageSize:
        """The size of an image, and of its latents."""
        return ImageSize(height=picture.height, width=picture.width, downsampling=self.autoencoder.downsampling)

    def schedule_of(self, picture: Settings) -> Schedule:
        """The noise levels of an image: those of the model, shifted if the settings have a shift.

        Raises:
            ValueError: the settings have a shift, and the schedule is not `flow`.
        """
        if picture.shift is None:
            return self.schedule
        if self.schedule.config.name != "flow":
            rule = f"is for schedule flow, not {self.schedule.config.name}; leave it out"
            raise ValueError(f"shift {picture.shift} {rule}")
        return make_schedule(replace(self.schedule.config, shift=picture.shift))

    def sampling_times(self, picture: Settings) -> Tensor:
        """The times of an image's steps, float64 [S + 1], falling.

        With a strength below 1 these are the last `steps * strength`, rounded down, of the times from noise, as in
        CompVis' img2img.

        Raises:
            ValueError: there is not even one step, or there are more steps than noise levels.
        """
        time_defaults, scheduling = SAMPLERS[picture.sampler].time_defaults, self.scheduling
        ends = (scheduling.offset, scheduling.ends_clean)
        all_times = times(self.schedule_of(picture), picture.steps, picture.spacing, time_defaults, *ends)
        strength = 1.0 if picture.strength is None else picture.strength
        count = int(picture.steps * strength + 1e-9)  # 0.29 * 100 is 28.999999999999996
        if not count:
            least = f"{1 / picture.steps:.3g}"
            raise ValueError(f"strength {strength} of {picture.steps} steps is not even one; use {least} or more")
        return all_times[len(all_times) - 1 - count :]

    def is_blended(self, picture: Settings) -> bool:
        """Whether `ldm.sampling.known_latents` completes an image: it has a mask, which the model does not read."""
        return picture.mask is not None and "mask" not in self.hint_reads

    def reads_null(self, picture: Settings) -> bool:
        """Whether the UNet is also called with the negative prompt."""
        guided = picture.guidance().reads_null and not self.reads_scale
        return self.is_conditional and (guided or len(picture.prompts()) > 1)

    def guides_of(self, picture: Settings) -> list[GradientGuide]:
        """The guides by gradients that an image uses. Raises ValueError if the model lacks one."""
        used = {name: source for name, source in GRADIENT_GUIDES.items() if getattr(picture, name)}
        for name, source in used.items():
            if name not in self.gradient_guides:
                raise ValueError(f"{name.replace('_', ' ')} {getattr(picture, name)} needs {source}")
        return [self.gradient_guides[name] for name in used]


def _encoder_of(autoencoder: FirstStage) -> Callable[[Tensor], Tensor]:
    """Return a function from images [B, 3, H, W] on any device to latents; it keeps nothing else of a model alive."""

    def encode(images: Tensor) -> Tensor:
        weight = next(autoencoder.parameters(), None)  # None for an autoencoder without weights
        return autoencoder.encode(images if weight is None else images.to(weight.device, weight.dtype)).mode()

    return encode
