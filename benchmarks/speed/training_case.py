"""The inputs of `training_step`: a UNet, and a batch of images and captions with their latents and contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared import contest, models
from benchmarks.shared.inputs import PROMPT
from benchmarks.shared.model_folder import model_folder
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import ScheduleConfig
from stipple_core.config import read_yaml
from stipple_core.files.weights import read_weights, write_weights

FILE = "batch.safetensors"


@dataclass(frozen=True)
class Case:
    """The model to train, and the folder of its first stage and text encoder."""

    unet: UNetConfig
    batch_size: int
    size: int  # latent pixels along one side
    folder: Callable[[str], Path]  # folder of autoencoder and text encoder in the --workdir
    schedule: ScheduleConfig = ScheduleConfig(beta_start=0.00085, beta_end=0.012)


EMOJI = UNetConfig(**read_yaml(str(contest.ROOT / "configs/ldm/emoji.yaml"))["unet"])
CASES = {
    "emoji": Case(EMOJI, 32, 8, lambda workdir: contest.ROOT / "checkpoints/emoji"),
    "sd15": Case(models.SD.unet, 2, 32, lambda workdir: model_folder(workdir, tiny=False)),
    "tiny": Case(models.TINY.unet, 2, 8, lambda workdir: model_folder(workdir, tiny=True)),
}


@dataclass(frozen=True)
class Batch:
    """The input of a step, raw and as it is cached."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    ids: Tensor  # [B, L] of the captions
    moments: Tensor  # [B, 2c, h, w] of unit-scale latents
    tokens: Tensor  # [B, L, d]
    mask: Tensor | None  # [B, L] bool; None: all tokens count
    posterior_noise: Tensor  # [B, c, h, w]
    noise: Tensor  # [B, c, h, w]
    timesteps: Tensor  # [B], 0 to 999

    @classmethod
    def read(cls, folder: str | Path) -> Batch:
        """Load a batch that `write_batch` wrote."""
        tensors = read_weights(Path(folder) / FILE)
        return cls(**{field.name: tensors.get(field.name) for field in fields(cls)})


@torch.inference_mode()
def write_batch(case: Case, model: Path, folder: Path) -> None:
    """Write random images and some captions, encoded with the networks of the model folder."""
    from autoencoder import Autoencoder
    from conditioning.conditioners import load_conditioner

    autoencoder, conditioner = Autoencoder.load(model).eval(), load_conditioner(model)
    draws = torch.Generator().manual_seed(0)
    side = case.size * autoencoder.downsampling
    images = torch.rand(case.batch_size, 3, side, side, generator=draws) * 2 - 1
    words = conditioner.tokenize([f"{PROMPT}, number {i}" for i in range(case.batch_size)])
    context, moments = conditioner(words.ids, words.mask), autoencoder.encode(images).moments
    shape = (case.batch_size, autoencoder.latent_channels, case.size, case.size)
    tensors = {
        "images": images,
        "ids": words.ids,
        "moments": moments,
        "tokens": context.tokens,
        "mask": context.mask,
        "posterior_noise": torch.randn(shape, generator=draws),
        "noise": torch.randn(shape, generator=draws),
        "timesteps": torch.randint(1000, (case.batch_size,), generator=draws),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_weights({name: value for name, value in tensors.items() if value is not None}, folder / FILE)
