"""The parts of a latent diffusion model, and the folder that they are stored in: the layout of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning.conditioner import AnyConditioner, Conditioner
from ldm.interop import load_scheduling, load_unet, save_scheduling, save_unet
from ldm.options import unet_to_diffusers
from ldm.scheduling import CLASSES, Scheduling, as_pipeline, scheduling_to_diffusers
from ldm.settings import Settings
from ldm.unet import UNet
from storage.weights import read_json, read_weights, write_json, write_weights

INDEX = "model_index.json"
OWN = "_stipple"  # our key in model_index.json; diffusers ignores keys that begin with an underscore
TRAINED = "text_encoder_trained"  # in it: the text encoder was trained with the UNet
COND_STAGE = "cond_stage/model.safetensors"
# settings that a model of ours has its own defaults for, and those of diffusers' pipelines for models of others
DEFAULTS = ("guidance_scale", "guidance_rescale", "steps", "sampler", "eta")
THEIR_DEFAULTS = {"guidance_scale": 7.5, "steps": 50}


@dataclass(frozen=True)
class Parts:
    """What a latent diffusion model is made of; the networks are on the CPU and in evaluation mode when opened."""

    autoencoder: Autoencoder
    unet: UNet
    conditioner: AnyConditioner | None  # None: what the UNet is told besides z_t has no module of ours yet
    scheduling: Scheduling
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of a picture, where the caller says nothing
    cond_stage: Mapping[str, Tensor] = field(default_factory=dict)  # the weights of such a conditioner, CompVis' names

    @property
    def extra_channels(self) -> int:
        """How many channels the UNet reads besides those of z_t: of a mask, a picture, a map."""
        return self.unet.config.in_channels - self.autoencoder.latent_channels

    @property
    def settings(self) -> Settings:
        """How a picture is made where the caller says nothing: by our own defaults, else by diffusers'."""
        said = self.defaults or THEIR_DEFAULTS | {"sampler": self.scheduling.sampler or Settings().sampler}
        return Settings(**{name: said[name] for name in DEFAULTS if name in said})


def open_model(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    config_yaml: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
) -> Parts:
    """Open a model folder, or a single file of CompVis' or Stability's, on the CPU.

    Args:
        path: a folder with model_index.json in it, or a .ckpt or .safetensors file.
        dtype: of the weights in memory, whatever the files hold.
        variant: of a folder: such as "fp16", see `storage.weights.read_folder`.
        config_yaml, tokenizer, prediction: of a file: see `ldm.single_file.open_single_file`.

    Raises:
        FileNotFoundError, ValueError: in one line naming what is missing, or does not fit, or is not implemented; or an
            option of the other kind of source.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a model folder, or a .ckpt or .safetensors file")
    if Path(path).is_file():
        from ldm.single_file import open_single_file  # which builds on this module

        _refuse(f"{path} is a single file", "a model folder", variant=variant)
        return open_single_file(path, config_yaml, tokenizer, prediction, dtype)
    index, folder = read_index(path), Path(path)
    said = {"config_yaml": config_yaml, "tokenizer": tokenizer, "prediction": prediction}
    _refuse(f"{path} is a model folder", "a single file", **said)
    scheduling = as_pipeline(load_scheduling(path), str(index.get("_class_name")))
    own = index.get(OWN) or {}
    cond_stage = read_weights(folder / COND_STAGE) if (folder / COND_STAGE).is_file() else {}
    conditioner = None if cond_stage else Conditioner.load(folder, dtype, bool(own.get(TRAINED)), variant).eval()
    return Parts(
        Autoencoder.load(folder, dtype=dtype, variant=variant).eval(),
        load_unet(folder, dtype, variant),
        conditioner,
        scheduling,
        {name: value for name, value in own.items() if name != TRAINED},
        cond_stage,
    )


def save_model(parts: Parts, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a model folder in the diffusers layout; dtype None keeps that of the weights.

    model_index.json comes last, so that a folder without it is not whole. It names StableDiffusionPipeline where that
    makes the same pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts.autoencoder.save(folder, dtype)
    save_unet(parts.unet, folder, dtype)
    if parts.conditioner is not None:
        parts.conditioner.save(folder, dtype)
    if parts.cond_stage:
        (folder / COND_STAGE).parent.mkdir(exist_ok=True)
        write_weights({name: value.to(dtype) for name, value in parts.cond_stage.items()}, folder / COND_STAGE)
    save_scheduling(parts.scheduling, folder)
    write_json(_index(parts), folder / INDEX)


def purpose(parts: Parts) -> str:
    """What a model is for that is told more than prompts, in a few words."""
    latents, extra = parts.autoencoder.latent_channels, parts.extra_channels
    wants = f"its UNet reads {extra} channels beside the {latents} of z_t"
    if extra == latents + 1:
        return f"{wants}, a masked picture and the mask (inpainting)"
    return f"{wants}, of a picture or a map (super-resolution, a semantic map)"


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """model_index.json of a model folder. Raises FileNotFoundError or ValueError, in one line."""
    absent = f"{folder} is not a model folder: there is no {INDEX} in it; give one that has it"
    return read_json(Path(folder) / INDEX, absent)


def _refuse(found: str, wanted: str, **options: Any) -> None:
    """Raise ValueError naming the first option that is given, which is of the other kind of source."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{found}, and {name} is an option of {wanted}; leave it out")


def _index(parts: Parts) -> dict[str, Any]:
    """model_index.json: the classes that diffusers is to load, and our defaults."""
    scheduler = scheduling_to_diffusers(parts.scheduling)["_class_name"]
    vae = "AutoencoderKL" if parts.autoencoder.config.regularizer == "kl" else "VQModel"
    conditioner, own = parts.conditioner, dict(parts.defaults)
    components = {"text_encoder": [None, None], "tokenizer": [None, None]}
    if conditioner is not None:
        components = conditioner.components
        own |= {TRAINED: True} if conditioner.trainable else {}
    # StableDiffusionPipeline knows no codebook, no mask in cross-attention, no shift, none of our own schedules
    special = parts.autoencoder.shift_factor or parts.extra_channels or conditioner is None or conditioner.use_mask
    text = components["text_encoder"][1]
    stable = not special and (vae, text) == ("AutoencoderKL", "CLIPTextModel") and scheduler in CLASSES.values()
    return {
        "_class_name": "StableDiffusionPipeline" if stable else "TextToImage",
        OWN: own,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", unet_to_diffusers(parts.unet.config)["_class_name"]],
        "vae": ["diffusers", vae],
        **components,
    }
