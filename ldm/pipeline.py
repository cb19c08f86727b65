"""From a prompt to a picture: text encoder, guided sampling, decoder, put together (Rombach et al. 2022, section 3).

A model is a folder in the diffusers layout, see `TextToImage.load`.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder, preview
from conditioning import Conditioner, Context
from kernels.winograd import lay_out
from ldm.denoiser import Denoiser
from ldm.guidance import classifier_free, extrapolate, rescaled
from ldm.parts import DEFAULTS, Parts, open_model, purpose, save_model
from ldm.reading import Reader
from ldm.samplers import SAMPLERS
from ldm.schedule import make_schedule
from ldm.scheduling import Scheduling
from ldm.settings import Settings, random_seed
from ldm.times import times
from ldm.unet import UNet
from ldm.walk import Step, initial_noise
from storage.images import tensor_to_image


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
        channels, dim = autoencoder.latent_channels, unet.config.cross_attention_dim
        if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
            shape = f"{unet.config.in_channels} channels to {unet.config.out_channels}"
            raise ValueError(f"the UNet maps {shape}, the autoencoder's latents have {channels}; they must be the same")
        if dim != conditioner.context_dim:
            raise ValueError(f"the UNet reads tokens of width {dim}, the text encoder's have {conditioner.context_dim}")
        self.autoencoder, self.unet, self.conditioner = autoencoder, unet, conditioner
        self.scheduling, self.schedule = scheduling, make_schedule(scheduling.schedule)
        side = unet.config.sample_size * autoencoder.downsampling
        defaults = defaults or Settings()
        sides = {"height": defaults.height or side, "width": defaults.width or side}
        self.defaults = replace(defaults, **sides, spacing=defaults.spacing or scheduling.spacing)
        self.denoiser = Denoiser(Reader(unet), self.schedule, scheduling.prediction)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks; latents between steps are float32 whatever it is."""
        return self.unet.conv_in.weight.dtype

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
        wanted = self.plan(prompt, num_images=num_images, **settings)
        for batch in self.batches(wanted, self.default_batch if batch_size is None else batch_size):
            for step in self.sample(batch):
                latents = step.z  # of the last step when the loop ends
            yield from self.finish(batch, latents)

    @property
    def default_batch(self) -> int:
        """1 on a CPU, so that no byte depends on the batch (4 together take two thirds of the time); elsewhere 4."""
        return 1 if self.device.type == "cpu" else 4

    def plan(self, prompt: str | Sequence[str], *, num_images: int = 1, **settings: Any) -> list[Settings]:
        """The complete settings of each picture that `generate` would make; warns of prompts that are too long.

        Raises:
            ValueError: in one line, for settings and prompts that this model can't take.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not isinstance(num_images, Integral) or num_images < 1:
            raise ValueError(f"num images {num_images!r} must be a whole number, at least 1")
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("seed") == -1:
            given["seed"] = random_seed()
        first = replace(self.defaults, **given)
        first = replace(first, spacing=first.spacing or SAMPLERS[first.sampler].habit.spacing)
        times(self.schedule, first.steps, first.spacing)
        for name in ("height", "width"):
            self._check_side(name, getattr(first, name))
        texts = dict.fromkeys([*prompts, *([first.negative_prompt] if first.guidance_scale != 1 else [])])
        self.conditioner.tokenize([*texts])  # what is no prompt to this model, no class, no layout, is found now
        for text in texts:
            if cut := self.conditioner.cut(text):
                limit = self.conditioner.max_length
                warnings.warn(f"a prompt is longer than {limit} tokens; not seen by the model: {cut!r}", stacklevel=2)
        order = enumerate(text for text in prompts for _ in range(num_images))
        return [replace(first, prompt=text, seed=first.seed + i) for i, text in order]

    @staticmethod
    def batches(pictures: Sequence[Settings], size: int) -> Iterator[list[Settings]]:
        """Neighbours that differ in nothing but prompts and seed, at most `size` together."""
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"batch size {size!r} must be a whole number, at least 1")
        for _, alike in itertools.groupby(pictures, _shared):
            alike = list(alike)
            for batch in (alike[first : first + size] for first in range(0, len(alike), size)):
                yield [replace(picture, batch=len(batch), place=place) for place, picture in enumerate(batch)]

    @torch.inference_mode()
    def sample(self, batch: Sequence[Settings]) -> Iterator[Step]:
        """Walk a batch of B pictures from noise to latents [B, c, h, w]; each draws from its own CPU generator."""
        same, f = batch[0], self.autoencoder.downsampling
        sampler, habit, scheduling = SAMPLERS[same.sampler], SAMPLERS[same.sampler].habit, self.scheduling
        generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
        context = null = self._context([picture.prompt for picture in batch])
        guidance_scale = 1.0 if context is None else same.guidance_scale  # nothing to be guided by
        if guidance_scale != 1:
            null = self._context([picture.negative_prompt for picture in batch])
        visited = times(self.schedule, same.steps, same.spacing, habit, scheduling.offset, scheduling.ends_clean)
        shape = (len(batch), self.autoencoder.latent_channels, same.height // f, same.width // f)
        noise_only = habit.noise_only and same.spacing != "leading"
        z = initial_noise(shape, generators, self.schedule, visited[0].item(), noise_only).to(self.device)
        denoiser = replace(self.denoiser, network=Reader(self.unet), at_levels=not habit.fractional)
        combine = rescaled(same.guidance_rescale, denoiser.coefficients) if same.guidance_rescale else extrapolate
        denoise = classifier_free(denoiser, context, null, guidance_scale, combine)
        known = {"eta": same.eta, "averaged": scheduling.prediction}
        options = {name: known[name] for name in sampler.options}
        yield from sampler.run(denoise, z, visited, self.schedule, generators, **options)

    def finish(self, batch: Sequence[Settings], latents: Tensor) -> Iterator[Picture]:
        """Decode latents [B, c, h, w], one by one; pictures that are not at their own place in the batch are left out.

        So `[settings] * settings.batch` makes one picture of a batch again, bit for bit, without the others of it.
        """
        for place, picture in enumerate(batch):
            if picture.place == place:
                yield Picture(self.decode(latents[place : place + 1])[0], picture)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, c, h, w] as images. Raises ValueError where they are not finite."""
        images = self.autoencoder.decode(latents.to(self.dtype)).float()  # [B, 3, f * h, f * w]
        if not images.isfinite().all():
            name = str(self.dtype).removeprefix("torch.")
            mend = "get the weights again" if self.dtype == torch.float32 else "use float32, or bfloat16 on a GPU"
            raise ValueError(f"a picture has values that are not finite in {name}; {mend}")
        return [tensor_to_image(image) for image in images]

    @torch.inference_mode()
    def preview(self, z_0: Tensor) -> list[Image.Image]:
        """Estimates of clean latents [B, c, h, w] as images: rough and at once where the autoencoder has its colors."""
        if self.autoencoder.latent_rgb is None:
            return self.decode(z_0)
        rough = preview(z_0.cpu(), self.autoencoder.latent_rgb.cpu())  # [B, 3, h, w]
        f, (h, w) = self.autoencoder.downsampling, z_0.shape[2:]
        return [tensor_to_image(image).resize((w * f, h * f), Image.Resampling.NEAREST) for image in rough]

    def save(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write a model folder in the diffusers layout; dtype None keeps that of the weights."""
        save_model(self.parts, folder, dtype)

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        scheduling = replace(self.scheduling, spacing=self.defaults.spacing)
        defaults = {name: value for name, value in asdict(self.defaults).items() if name in DEFAULTS}
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
    ) -> TextToImage:
        """Open a model folder (model_index.json, vae/, unet/, text_encoder/, ...), or a single file of CompVis' kind.

        Args:
            path: as `save` or diffusers wrote it (our own defaults may be absent), or a .ckpt or .safetensors file.
            device: where to compute.
            dtype: to compute in, whatever the files hold; on a CPU half precision is many times slower.
            variant: such as "fp16": which weights of a folder that has several.
            config_yaml, tokenizer, prediction: of a single file: see `ldm.single_file.open_single_file`.

        Raises:
            FileNotFoundError, ValueError: naming what is missing, or the option that we don't implement, or that is of
                the other kind of source.
        """
        if torch.device(device).type == "cpu" and dtype != torch.float32:
            warnings.warn(f"{dtype} is 40 to 100 times slower than float32 on most CPUs", stacklevel=2)
        parts = open_model(path, dtype, variant, config_yaml, tokenizer, prediction)
        if parts.extra_channels or parts.conditioner is None:
            raise ValueError(
                f"{path} draws from more than prompts: {purpose(parts)}; TextToImage gives it prompts only"
            )
        return cls(
            lay_out(parts.autoencoder.to(device)),
            lay_out(parts.unet.to(device)),
            parts.conditioner.to(device),
            parts.scheduling,
            parts.settings,
        )

    def _context(self, prompts: Sequence[str]) -> Context | None:
        """What the UNet is told, in its own dtype; None where that is nothing."""
        context = self.conditioner.encode(prompts)
        return None if self.conditioner.context_dim is None else context.to(self.device, self.dtype)

    def _check_side(self, name: str, side: int) -> None:
        f = self.autoencoder.downsampling
        if side < f or side % f:
            low = side // f * f
            mend = f"{low} or {low + f}" if low > 0 else f"{f} or more"
            raise ValueError(f"{name} {side} is not a multiple of {f} (autoencoder downsampling); use {mend}")


def _shared(picture: Settings) -> Settings:
    """What pictures of one batch must agree on."""
    return replace(picture, prompt="", negative_prompt="", seed=0, batch=1, place=0)
