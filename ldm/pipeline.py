"""From a prompt to a picture: text encoder, guided sampling, decoder, put together (Rombach et al. 2022, section 3).

A model is a folder in the diffusers layout, see `TextToImage.load`.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder, preview
from conditioning import Conditioner, Context
from ldm.denoiser import Denoiser
from ldm.guidance import Denoise
from ldm.guidances import Ingredients, guided
from ldm.learned_variance import LearnedVariance
from ldm.parts import DEFAULTS, Parts, open_model, purpose, save_model
from ldm.reading import Reader
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule, make_schedule
from ldm.scheduling import PREDICTION_TYPES, Scheduling
from ldm.settings import Settings, random_seed, with_usual_scale
from ldm.times import times
from ldm.unet import UNet
from ldm.walk import Step, initial_noise, walk
from operators import winograd
from operators.winograd import lay_out
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

    Attributes:
        weaker: what autoguidance leads away from, see `guide_by`.

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
        if unet.config.in_channels != channels or unet.config.out_channels not in (channels, 2 * channels):
            shape = f"{unet.config.in_channels} channels to {unet.config.out_channels}"
            raise ValueError(
                f"the UNet maps {shape}, the autoencoder's latents have {channels}; it must map "
                "these to as many, or to twice as many where it learned variances"
            )
        if dim != conditioner.context_dim:
            raise ValueError(f"the UNet reads tokens of width {dim}, the text encoder's have {conditioner.context_dim}")
        self.autoencoder, self.unet, self.conditioner = autoencoder, unet, conditioner
        self.scheduling, self.schedule = scheduling, make_schedule(scheduling.schedule)
        side = unet.config.sample_size * autoencoder.downsampling
        defaults = defaults or Settings()
        sides = {"height": defaults.height or side, "width": defaults.width or side}
        self.defaults = replace(defaults, **sides, spacing=defaults.spacing or scheduling.spacing)
        self.denoiser = Denoiser(Reader(unet), self.schedule, scheduling.prediction)
        self.weaker: TextToImage | None = None

    def guide_by(self, weaker: TextToImage) -> None:
        """Give autoguidance a weaker version of this model: smaller, or trained for less (Karras et al. 2024).

        Raises:
            ValueError: it reads other latents or other text than this model, or knows other noise levels.
        """
        if self.schedule.config != weaker.schedule.config:
            raise ValueError("the weaker model must have the same noise levels as this one")
        same = self.autoencoder.fingerprint() == weaker.autoencoder.fingerprint()
        if not same or self.conditioner.fingerprint() != weaker.conditioner.fingerprint():
            raise ValueError("the weaker model must have the same autoencoder and text encoder as this one")
        self.weaker = weaker

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
        given = with_usual_scale({name: value for name, value in settings.items() if value is not None})
        if given.get("seed") == -1:
            given["seed"] = random_seed()
        first = replace(self.defaults, **given)
        first = replace(first, spacing=first.spacing or SAMPLERS[first.sampler].habit.spacing)
        schedule = self._schedule(first)
        walk(times(schedule, first.steps, first.spacing, SAMPLERS[first.sampler].habit), schedule)  # raises
        self._check_able(first)
        for name in ("height", "width"):
            self._check_side(name, getattr(first, name))
        others = [prompt for prompt, _ in first.prompts()[1:]]
        texts = dict.fromkeys([*prompts, *others, *([first.negative_prompt] if self._reads_null(first) else [])])
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
        for shared, alike in itertools.groupby(pictures, _shared):
            alike, most = list(alike), 1 if SAMPLERS[shared.sampler].alone else size
            for batch in (alike[first : first + most] for first in range(0, len(alike), most)):
                yield [replace(picture, batch=len(batch), place=place) for place, picture in enumerate(batch)]

    @torch.inference_mode()
    def sample(self, batch: Sequence[Settings], around: Callable[[Denoise], Denoise] | None = None) -> Iterator[Step]:
        """Walk a batch of B pictures from noise to latents [B, c, h, w]; each draws from its own CPU generator.

        Args:
            batch: as `batches` makes it.
            around: what is put around the guided denoiser, such as guidance by a gradient; `generate` has none.
        """
        same, f = batch[0], self.autoencoder.downsampling
        sampler, habit, scheduling = SAMPLERS[same.sampler], SAMPLERS[same.sampler].habit, self.scheduling
        generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
        schedule = self._schedule(same)
        visited = times(schedule, same.steps, same.spacing, habit, scheduling.offset, scheduling.ends_clean)
        shape = (len(batch), self.autoencoder.latent_channels, same.height // f, same.width // f)
        noise_only = habit.noise_only and same.spacing != "leading"
        z = initial_noise(shape, generators, schedule, visited[0].item(), noise_only).to(self.device)
        network = _network(self, same)
        told = {"schedule": schedule, "at_levels": not habit.fractional}
        ingredients = Ingredients(
            denoiser=replace(self.denoiser, network=network, **told).prepared(visited),
            context=self._context([picture.prompt for picture in batch]),
            null=self._context([picture.negative_prompt for picture in batch]) if self._reads_null(same) else None,
            times=visited,
            weak=self.weaker
            and replace(self.weaker.denoiser, network=_network(self.weaker, same), **told).prepared(visited),
            others=[(self._context([prompt]), weight) for prompt, weight in same.prompts()[1:]],
        )
        denoise = guided(same.guidance(), ingredients)
        denoise = denoise if around is None else around(denoise)
        averaged = scheduling.prediction if scheduling.prediction in PREDICTION_TYPES else None  # as diffusers' PNDM
        known = {"averaged": averaged, "interpolation": getattr(network, "interpolation", None)}
        options = {name: known[name] if name in known else getattr(same, name) for name in sampler.options}
        yield from sampler.run(denoise, z, visited, schedule, generators, **options)

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
            mend = "use float32, or bfloat16 on a GPU"
            if self.dtype == torch.float32:
                mend = "use a smaller guidance scale, or get the weights again if none helps"
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
        keep_transforms: bool = False,
    ) -> TextToImage:
        """Open a model folder (model_index.json, vae/, unet/, text_encoder/, ...), or a single file of CompVis' kind.

        Args:
            path: as `save` or diffusers wrote it (our own defaults may be absent), or a .ckpt or .safetensors file.
            device: where to compute.
            dtype: to compute in, whatever the files hold; on a CPU half precision is many times slower.
            variant: such as "fp16": which weights of a folder that has several.
            config_yaml, tokenizer, prediction: of a single file: see `ldm.single_file.open_single_file`.
            keep_transforms: spend memory for time on a CPU, see `operators.winograd.keep_transforms`.

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
        autoencoder, unet = lay_out(parts.autoencoder.to(device)), lay_out(parts.unet.to(device))
        if keep_transforms:
            for network in (autoencoder, unet):
                winograd.keep_transforms(network)
        return cls(
            autoencoder,
            unet,
            parts.conditioner.to(device),
            parts.scheduling,
            parts.settings,
        )

    def _context(self, prompts: Sequence[str]) -> Context | None:
        """What the UNet is told, in its own dtype; None where that is nothing."""
        context = self.conditioner.encode(prompts)
        return None if self.conditioner.context_dim is None else context.to(self.device, self.dtype)

    def _schedule(self, picture: Settings) -> Schedule:
        """The noise levels that a picture walks over: the model's, shifted where it asks for that."""
        if picture.shift is None:
            return self.schedule
        if self.schedule.config.name != "flow":
            raise ValueError(
                f"shift {picture.shift} is for schedule flow, not {self.schedule.config.name}; leave it out"
            )
        return make_schedule(replace(self.schedule.config, shift=picture.shift))

    def _reads_null(self, picture: Settings) -> bool:
        """Whether the negative prompt is computed."""
        return self.conditioner.context_dim is not None and (
            picture.guidance().reads_null or len(picture.prompts()) > 1
        )

    def _check_able(self, picture: Settings) -> None:
        """Raise ValueError for what this model can't do."""
        learned = self.unet.config.out_channels > self.autoencoder.latent_channels
        if picture.variance == "learned" and not learned:
            raise ValueError("variance learned needs a model that learned it; use small or large")
        if picture.guidance_method == "autoguidance" and self.weaker is None:
            raise ValueError("guidance method autoguidance needs a weaker model: guide_by, or --guidance-model")
        if len(picture.prompts()) > 1 and self.conditioner.context_dim is None:
            raise ValueError(f"also {picture.also!r} is for models that read prompts; leave it out")

    def _check_side(self, name: str, side: int) -> None:
        f = self.autoencoder.downsampling
        if side < f or side % f:
            low = side // f * f
            mend = f"{low} or {low + f}" if low > 0 else f"{f} or more"
            raise ValueError(f"{name} {side} is not a multiple of {f} (autoencoder downsampling); use {mend}")


def _network(model: TextToImage, picture: Settings) -> Reader | LearnedVariance:
    """A model's network as a denoiser of one run wants it."""
    reader = Reader(model.unet, picture.reuse)
    learned = model.unet.config.out_channels > model.autoencoder.latent_channels
    return LearnedVariance(reader) if learned else reader


def _shared(picture: Settings) -> Settings:
    """What pictures of one batch must agree on."""
    return replace(picture, prompt="", negative_prompt="", seed=0, batch=1, place=0)
