"""From a prompt to an image: text encoder, guided sampling, decoder (Rombach et al. 2022, section 3).

A prompt passes three rooms, once each: `ldm.sampling.plan`, `ldm.sampling.run` and `ldm.sampling.decoding`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from conditioning import ConditionInputs
from ldm.formats.model_folder import save_model
from ldm.formats.model_parts import ModelParts
from ldm.formats.opening import open_model
from ldm.guidance.classifier_free import Denoise
from ldm.samplers.steps import Step
from ldm.sampling.compatibility import check_draws, check_prior, check_weaker
from ldm.sampling.decoding import FinishedImage, decode_images, finish, preview_images
from ldm.sampling.defaults import default_settings, stored_defaults
from ldm.sampling.model import Model
from ldm.sampling.plan import batches, plan
from ldm.sampling.prior_sampling import inputs_of
from ldm.sampling.run import run
from ldm.sampling.settings import Settings
from stipple_core.operators import winograd
from stipple_core.operators.winograd import lay_out


class TextToImage(Model):
    """A model that makes images from prompts.

    `Model` describes its arguments and attributes. `TextToImage.load` opens a stored model.
    """

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """Make images of one prompt or several; the arguments are those of `generate`."""
        return [picture.image for picture in self.generate(prompt, **settings)]

    def generate(
        self, prompt: str | Sequence[str], *, num_images: int = 1, batch_size: int | None = None, **settings: Any
    ) -> Iterator[FinishedImage]:
        """Make images, and yield each when it is finished.

        Args:
            prompt: one or several.
            num_images: images per prompt.
            batch_size: images computed together; None: `default_batch`.
            settings: fields of `Settings`, such as negative_prompt, guidance_scale, steps, sampler, height and width.
                `seed` is that of the first image, image i has seed + i; -1 draws a random one.

        Raises:
            ValueError: settings or prompts are invalid; raised before anything is computed.
        """
        check_draws(self)
        planned = self.plan(prompt, num_images=num_images, **settings)
        for batch in self.batches(planned, self.default_batch if batch_size is None else batch_size):
            for step in self.sample(batch):
                latents = step.z  # of the last step when the loop ends
            yield from self.finish(batch, latents)

    def plan(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        inputs: ConditionInputs | None = None,
        **settings: Any,
    ) -> list[Settings]:
        """Return the complete settings of each image that `generate` would make; warn of prompts that are too long.

        Args:
            prompt, num_images, settings: as in `generate`.
            inputs: what `sample` will be called with, if anything.

        Raises:
            ValueError: settings or prompts are invalid, or this model can't use them.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return plan(self, prompts, num_images, settings, has_inputs=inputs is not None)

    batches = staticmethod(batches)

    def steps(self, picture: Settings) -> int:
        """How many steps `sample` yields for an image."""
        return (len(self.sampling_times(picture)) - 1) * picture.resample

    @torch.inference_mode()
    def sample(
        self,
        batch: Sequence[Settings],
        around: Callable[[Denoise], Denoise] | None = None,
        inputs: ConditionInputs | None = None,
    ) -> Iterator[Step]:
        """Sample a batch of B images, from noise to latents [B, c, h, w]; each draws from its own CPU generator.

        Args:
            batch: as `batches` makes it.
            around: wraps the guided denoiser, for example with further guidance; `generate` uses none.
            inputs: of the conditioner, for B images. None: they are made from the settings, and the embedding of a
                missing image by the prior. Their prompts are replaced by those of the settings.
        """
        yield from run(self, batch, inputs_of(self, batch) if inputs is None else inputs, around)

    def finish(self, batch: Sequence[Settings], latents: Tensor) -> Iterator[FinishedImage]:
        """Decode latents [B, c, h, w] one by one. Images that are not at their own place in the batch are skipped.

        So `[settings] * settings.batch` makes one image of a batch again, to the bit, without the others.
        """
        yield from finish(self, batch, latents)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents [B, c, h, w]. Raises ValueError if a decoded value is not finite."""
        return decode_images(self.autoencoder, latents.to(self.dtype))

    @torch.inference_mode()
    def preview(self, z_0: Tensor) -> list[Image.Image]:
        """Show estimates of clean latents [B, c, h, w]: rough but at once if the autoencoder has `latent_rgb`."""
        return self.decode(z_0) if self.autoencoder.latent_rgb is None else preview_images(self.autoencoder, z_0)

    def guide_by(self, weaker: Model) -> None:
        """Set the model of autoguidance: smaller than this one, or trained for less (Karras et al. 2024).

        Raises:
            ValueError: its latents, its text encoder or its noise levels differ from this model's.
        """
        check_weaker(self, weaker)
        self.weaker = weaker

    def use_prior(self, prior: Model) -> None:
        """Set the prior that samples image embeddings from prompts (Ramesh et al. 2022).

        Raises:
            ValueError: this model is not conditioned on the embeddings that the prior makes.
        """
        check_prior(self, prior)
        self.prior = prior
        self.conditioner.readers["image"].reads_prompts = True

    @property
    def parts(self) -> ModelParts:
        """The parts of the model, as writers of model files take them."""
        scheduling = replace(self.scheduling, spacing=self.defaults.spacing)
        return ModelParts(self.autoencoder, self.unet, self.conditioner, scheduling, stored_defaults(self.defaults))

    def save(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write a model folder in the diffusers layout; dtype None keeps the dtype of the weights."""
        save_model(self.parts, folder, dtype)

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
        """Open a model folder (model_index.json, vae/, unet/, text_encoder/, ...), or a single file in CompVis' names.

        Args:
            path: a folder that `save` or diffusers wrote, or a .ckpt or .safetensors file.
            device: where the model computes.
            dtype: of the computation, whatever the files hold; on a CPU, half precision is many times slower.
            variant: of a folder: which weights, such as "fp16".
            config_yaml, tokenizer, prediction: of a single file: see `ldm.formats.single_file.open_single_file`.
            keep_transforms: use memory to save time on a CPU, see `stipple_core.operators.winograd.keep_transforms`.

        Raises:
            FileNotFoundError: the path or a file in the folder does not exist.
            ValueError: the model has an option that is not supported, or an argument is of the other kind of source.
        """
        if torch.device(device).type == "cpu" and dtype != torch.float32:
            warnings.warn(f"{dtype} is 40 to 100 times slower than float32 on most CPUs", stacklevel=2)
        parts = open_model(path, dtype, variant, config_yaml, tokenizer, prediction)
        autoencoder, unet = lay_out(parts.autoencoder.to(device)), lay_out(parts.unet.to(device))
        if keep_transforms:
            for network in (autoencoder, unet):
                winograd.keep_transforms(network)
        return cls(autoencoder, unet, parts.conditioner.to(device), parts.scheduling, default_settings(parts))
