"""From a prompt to a picture: text encoder, guided sampling, decoder, put together (Rombach et al. 2022, section 3).

A model is a folder in the diffusers layout, see `TextToImage.load`.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder, preview
from conditioning import Conditioner, Context
from ldm.denoiser import Denoiser
from ldm.guidance import classifier_free
from ldm.interop import load_scheduling, load_unet, save_scheduling, save_unet
from ldm.options import Scheduling, scheduling_to_diffusers
from ldm.samplers import SAMPLERS, Step, initial_noise
from ldm.schedule import Schedule, make_schedule, times
from ldm.settings import Settings, random_seed
from ldm.unet import UNet
from storage.images import tensor_to_image

INDEX = "model_index.json"
OWN = "_stipple"  # our key in model_index.json; diffusers ignores keys that begin with an underscore
DEFAULTS = ("guidance_scale", "steps", "sampler", "eta")  # settings that a model folder has its own defaults for


@dataclass(frozen=True)
class Picture:
    """A finished picture, and all that is needed to make it again with the same model."""

    image: Image.Image
    settings: Settings


class TextToImage:
    """A model that makes pictures from prompts.

    Args:
        autoencoder, unet, conditioner: on one device, in one dtype, in evaluation mode; they are used as they are.
        schedule: the noise levels that the UNet was trained on.
        prediction: what the UNet outputs, a key of PREDICTIONS.
        defaults: the settings of a picture where the caller does not say otherwise.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        unet: UNet,
        conditioner: Conditioner,
        schedule: Schedule,
        prediction: str,
        defaults: Settings | None = None,
    ):
        channels, dim = autoencoder.latent_channels, unet.config.cross_attention_dim
        if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
            shape = f"{unet.config.in_channels} channels to {unet.config.out_channels}"
            raise ValueError(f"the UNet maps {shape}, the autoencoder's latents have {channels}; they must be the same")
        if dim != conditioner.context_dim:
            raise ValueError(f"the UNet reads tokens of width {dim}, the text encoder's have {conditioner.context_dim}")
        self.autoencoder, self.unet, self.conditioner = autoencoder, unet, conditioner
        self.schedule, self.prediction = schedule, prediction
        side = unet.config.sample_size * autoencoder.downsampling
        defaults = defaults or Settings()
        self.defaults = replace(defaults, height=defaults.height or side, width=defaults.width or side)
        self.denoiser = Denoiser(self._network, schedule, prediction)

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
        """The complete settings of each picture that `generate` would make; warns of prompts that are too long."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not isinstance(num_images, Integral) or num_images < 1:
            raise ValueError(f"num images {num_images!r} must be a whole number, at least 1")
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("seed") == -1:
            given["seed"] = random_seed()
        first = replace(self.defaults, **given)
        times(self.schedule, first.steps, first.spacing)
        for name in ("height", "width"):
            self._check_side(name, getattr(first, name))
        for text in dict.fromkeys([*prompts, first.negative_prompt]):
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
        generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
        context = null = self._context([picture.prompt for picture in batch])
        if same.guidance_scale != 1:
            null = self._context([picture.negative_prompt for picture in batch])
        walk = times(self.schedule, same.steps, same.spacing)
        shape = (len(batch), self.autoencoder.latent_channels, same.height // f, same.width // f)
        z = initial_noise(shape, generators, self.schedule, walk[0].item()).to(self.device)
        denoise = classifier_free(self.denoiser, context, null, same.guidance_scale)
        yield from SAMPLERS[same.sampler](denoise, z, walk, self.schedule, generators, **same.options)

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
        """Write a model folder in the diffusers layout; dtype None keeps that of the weights.

        model_index.json comes last, so that a folder without it is not whole. It names StableDiffusionPipeline where
        that makes the same pictures.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save(folder, dtype)
        save_unet(self.unet, folder, dtype)
        self.conditioner.save(folder, dtype)
        scheduling = Scheduling(
            schedule=self.schedule.config, prediction=self.prediction, spacing=self.defaults.spacing
        )
        save_scheduling(scheduling, folder)
        unfinished = folder / f".{INDEX}.{os.getpid()}"
        unfinished.write_text(json.dumps(self._index(scheduling), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / INDEX)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextToImage:
        """Read a model folder: model_index.json, vae/, unet/, text_encoder/, tokenizer/, scheduler/.

        Args:
            folder: as `save` or diffusers wrote it; our own defaults in model_index.json may be absent.
            device: where to compute.
            dtype: to compute in, whatever the files hold; on a CPU half precision is many times slower.

        Raises:
            FileNotFoundError, ValueError: naming what is missing, or the option that we don't implement.
        """
        if torch.device(device).type == "cpu" and dtype != torch.float32:
            warnings.warn(f"{dtype} is 40 to 100 times slower than float32 on most CPUs", stacklevel=2)
        own, scheduling = read_index(folder).get(OWN) or {}, load_scheduling(folder)
        known = {name: own[name] for name in DEFAULTS if name in own}
        return cls(
            Autoencoder.load(folder, device=device, dtype=dtype).eval(),
            load_unet(folder, dtype).to(device),
            Conditioner.load(folder, dtype=dtype).to(device),
            make_schedule(scheduling.schedule),
            scheduling.prediction,
            Settings(**known, spacing=scheduling.spacing),
        )

    def _context(self, prompts: Sequence[str]) -> Context:
        """What the UNet is told, in its own dtype."""
        return self.conditioner.encode(prompts).to(self.device, self.dtype)

    def _network(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The UNet in its own dtype, on latents in theirs."""
        return self.unet(z_t.to(self.dtype), timestep, context)

    def _check_side(self, name: str, side: int) -> None:
        f = self.autoencoder.downsampling
        if side < f or side % f:
            low = side // f * f
            mend = f"{low} or {low + f}" if low > 0 else f"{f} or more"
            raise ValueError(f"{name} {side} is not a multiple of {f} (autoencoder downsampling); use {mend}")

    def _index(self, scheduling: Scheduling) -> dict[str, Any]:
        """model_index.json: the classes that diffusers is to load, and our defaults."""
        scheduler = scheduling_to_diffusers(scheduling)["_class_name"]
        encoder = self.conditioner.encoder.config.get("architectures") or ["AutoModel"]
        vae = "AutoencoderKL" if self.autoencoder.config.regularizer == "kl" else "VQModel"
        # StableDiffusionPipeline knows no codebook, no mask in cross-attention, no shift, none of our own schedules
        plain = not (self.conditioner.use_mask or self.autoencoder.shift_factor)
        parts = vae, scheduler, encoder[0]
        stable = plain and parts == ("AutoencoderKL", "DDIMScheduler", "CLIPTextModel")
        return {
            "_class_name": "StableDiffusionPipeline" if stable else "TextToImage",
            OWN: {name: value for name, value in asdict(self.defaults).items() if name in DEFAULTS},
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler],
            "text_encoder": ["transformers", encoder[0]],
            "tokenizer": ["transformers", self.conditioner.tokenizer.options.get("tokenizer_class", "AutoTokenizer")],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", vae],
        }


def _shared(picture: Settings) -> Settings:
    """What pictures of one batch must agree on."""
    return replace(picture, prompt="", negative_prompt="", seed=0, batch=1, place=0)


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """model_index.json of a model folder. Raises FileNotFoundError or ValueError, in one line."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: there is no {INDEX} in it; give one that has it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); get it again") from None
    if not isinstance(index, dict):
        raise ValueError(f"{path} holds no JSON object; get it again")
    return index
