"""The parts of a latent diffusion model, and the folder that they are stored in: the layout of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autoencoder import FirstStage, Pixels, open_autoencoder
from conditioning.build import AnyConditioner
from conditioning.formats.unet_inputs import with_hints
from conditioning.readers.frame import NAME as FRAME
from conditioning.readers.frame import with_frame
from conditioning.readers.spatial import SpatialReader
from conditioning.text.text_conditioner import Conditioner
from ldm.formats.diffusers.known_unet_options import PLAIN
from ldm.formats.diffusers.network_kinds import KINDS, Network, folder_of
from ldm.formats.diffusers.networks_folder import load_scheduling, load_unet, save_scheduling, save_unet
from ldm.formats.diffusers.scheduler import CLASSES, Scheduling, as_pipeline, scheduling_to_diffusers
from ldm.sampling.settings import Settings
from stipple_core.files.json_file import read_json, write_json

INDEX = "model_index.json"
ZEROS = "force_zeros_for_empty_prompt"  # of diffusers' StableDiffusionXLPipeline
OWN = "_stipple"  # our key in model_index.json; diffusers ignores keys that begin with an underscore
TRAINED = "text_encoder_trained"  # in it: the text encoder was trained with the UNet
# settings that a model of ours has its own defaults for, and those of diffusers' pipelines for models of others
DEFAULTS = (
    *("guidance_scale", "guidance_rescale", "guidance_bound", "guidance_percentile"),
    *("steps", "sampler", "eta", "corrections"),
)
INPAINTING = "StableDiffusionInpaintPipeline"
VERSION, OF_NINE_CHANNELS = "_diffusers_version", "0.6.0"  # of INPAINTING; it wants a version
THEIR_AUTOENCODERS = ("AutoencoderKL", "VQModel")
PIXEL_PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}  # of diffusers, by scheduler
THEIR_DEFAULTS = {"guidance_scale": 7.5, "steps": 50}
THEIR_STUDENTS = {"guidance_scale": 8.5, "steps": 4}  # of networks that read the guidance scale


@dataclass(frozen=True)
class Parts:
    """What a latent diffusion model is made of; the networks are on the CPU and in evaluation mode when opened."""

    autoencoder: FirstStage
    unet: Network
    conditioner: AnyConditioner
    scheduling: Scheduling
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of a picture, where the caller says nothing

    @property
    def extra_channels(self) -> int:
        """How many channels the UNet reads besides those of z_t: of a mask, a picture, a map."""
        return self.unet.config.in_channels - self.autoencoder.latent_channels

    @property
    def settings(self) -> Settings:
        """How a picture is made where the caller says nothing: by our own defaults, else by diffusers'."""
        theirs = THEIR_DEFAULTS if self.unet.config.guidance_dim is None else THEIR_STUDENTS
        said = self.defaults or theirs | {"sampler": self.scheduling.sampler or Settings().sampler}
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
        variant: of a folder: such as "fp16", see `stipple_core.files.weights.read_folder`.
        config_yaml, tokenizer, prediction: of a file: see `ldm.formats.single_file.open_single_file`.

    Raises:
        FileNotFoundError, ValueError: in one line naming what is missing, or does not fit, or is not implemented; or an
            option of the other kind of source.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a model folder, or a .ckpt or .safetensors file")
    if Path(path).is_file():
        from ldm.formats.single_file import open_single_file  # which builds on this module

        _refuse(f"{path} is a single file", "a model folder", variant=variant)
        return open_single_file(path, config_yaml, tokenizer, prediction, dtype)
    index, folder = read_index(path), Path(path)
    said = {"config_yaml": config_yaml, "tokenizer": tokenizer, "prediction": prediction}
    _refuse(f"{path} is a model folder", "a single file", **said)
    scheduling = as_pipeline(load_scheduling(path), str(index.get("_class_name")))
    own = index.get(OWN) or {}
    conditioner = Conditioner.load(folder, dtype, bool(own.get(TRAINED)), variant)
    parts = Parts(
        open_autoencoder(folder, dtype=dtype, variant=variant).eval(),
        load_unet(folder, dtype, variant),
        conditioner,
        scheduling,
        {name: value for name, value in own.items() if name != TRAINED},
    )
    latents, f = parts.autoencoder.latent_channels, parts.autoencoder.downsampling
    framed = getattr(parts.unet.config, "frame_width", None)
    if parts.conditioner.prompts.zero_empty is not None:
        parts.conditioner.prompts.zero_empty = bool(index.get(ZEROS))
    try:
        conditioner = with_hints(parts.conditioner, parts.extra_channels, latents, f)
        return replace(parts, conditioner=with_frame(conditioner, framed).eval())
    except ValueError as error:
        raise ValueError(f"{path} can't be opened: {error}") from None


def save_model(parts: Parts, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a model folder in the diffusers layout; dtype None keeps that of the weights.

    model_index.json comes last, so that a folder without it is not whole. It names StableDiffusionPipeline where that
    makes the same pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts.autoencoder.save(folder, dtype)
    save_unet(parts.unet, folder, dtype)
    parts.conditioner.save(folder, dtype)
    save_scheduling(parts.scheduling, folder)
    write_json(_index(parts), folder / INDEX)


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """model_index.json of a model folder. Raises FileNotFoundError or ValueError, in one line."""
    absent = f"{folder} is not a model folder: there is no {INDEX} in it; give one that has it"
    return read_json(Path(folder) / INDEX, absent)


def _refuse(found: str, wanted: str, **options: Any) -> None:
    """Raise ValueError naming the first option that is given, which is of the other kind of source."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{found}, and {name} is an option of {wanted}; leave it out")


def _stable_pipeline(conditioner: AnyConditioner) -> str | None:
    """The pipeline for Stable Diffusion whose UNet reads the same, if there is one."""
    if second := conditioner.components.get("text_encoder_2"):
        projects = second[1] == "CLIPTextModelWithProjection"
        return "StableDiffusionXLPipeline" if projects and list(conditioner.readers) == [FRAME] else None
    if not conditioner.readers:
        return "StableDiffusionPipeline"
    shown = [(r.config.kind, r.config.convention) for r in conditioner.readers.values() if isinstance(r, SpatialReader)]
    inpainting = len(conditioner.readers) == 1 and shown == [("inpainting", "stable_diffusion")]
    return INPAINTING if inpainting else None


def _index(parts: Parts) -> dict[str, Any]:
    """model_index.json: the classes that diffusers is to load, and our defaults."""
    scheduler = scheduling_to_diffusers(parts.scheduling)["_class_name"]
    network = folder_of(parts.unet.config)
    unet, vae = KINDS[network].to_diffusers(parts.unet.config)["_class_name"], parts.autoencoder.class_name
    conditioner, components = parts.conditioner, parts.conditioner.components
    own = {**parts.defaults, **({TRAINED: True} if conditioner.prompts.trainable else {})}
    # StableDiffusionPipeline knows no codebook, no mask in cross-attention, no shift, none of our own schedules
    special = parts.autoencoder.shift_factor or conditioner.use_mask or scheduler not in CLASSES.values()
    text = components["text_encoder"][1]
    stable = not special and (vae, text) == ("AutoencoderKL", "CLIPTextModel") and _stable_pipeline(conditioner)
    # and their pipelines of pictures, whose UNet is told nothing, only the steps of DDPM and DDIM
    pixels = (vae, unet, text) == (Pixels.class_name, PLAIN, None) and not parts.extra_channels
    theirs = stable or (pixels and PIXEL_PIPELINES.get(scheduler))
    return {
        "_class_name": theirs or "TextToImage",
        **({VERSION: OF_NINE_CHANNELS} if theirs == INPAINTING else {}),
        OWN: own,
        **({} if conditioner.prompts.zero_empty is None else {ZEROS: conditioner.prompts.zero_empty}),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        network: ["diffusers", unet],
        "vae": ["diffusers", vae] if vae in THEIR_AUTOENCODERS else [None, None],
        **components,
    }
