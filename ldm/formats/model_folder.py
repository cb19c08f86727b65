"""The folder of a latent diffusion model, in the layout of diffusers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoencoder import Pixels, open_autoencoder
from conditioning.conditioners import load_conditioner
from conditioning.formats.unet_inputs import FRAME, with_frame, with_hints
from conditioning.interface.conditioner import Conditioner
from conditioning.readers.spatial import SpatialReader
from ldm.formats.diffusers.known_schedulers import CLASSES
from ldm.formats.diffusers.known_unet_options import PLAIN
from ldm.formats.diffusers.network_kinds import KINDS, folder_of
from ldm.formats.diffusers.networks_folder import load_scheduling, load_unet, save_scheduling, save_unet
from ldm.formats.diffusers.scheduler import as_pipeline, scheduling_to_diffusers
from ldm.formats.model_parts import ModelParts
from stipple_core.files.json_file import read_json, write_json

INDEX = "model_index.json"
ZEROS = "force_zeros_for_empty_prompt"  # of diffusers' StableDiffusionXLPipeline
OWN = "_stipple"  # Stipple's key in model_index.json; diffusers ignores keys that begin with an underscore
TRAINED = "text_encoder_trained"  # key in it: the text encoder was trained with the UNet
INPAINTING = "StableDiffusionInpaintPipeline"
VERSION, OF_NINE_CHANNELS = "_diffusers_version", "0.6.0"  # of INPAINTING, which requires a version
DIFFUSERS_AUTOENCODERS = ("AutoencoderKL", "VQModel")
PIXEL_PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}  # of diffusers, by scheduler


def open_model_folder(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> ModelParts:
    """Open a model folder on the CPU, in evaluation mode.

    Args:
        path: a folder with model_index.json, as `save_model` or diffusers writes it.
        dtype: of the weights in memory, whatever the files hold.
        variant: of the weights, such as "fp16"; see `stipple_core.files.weights.read_folder`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an option is not supported, or the parts do not fit together.
    """
    index, folder = read_index(path), Path(path)
    scheduling = as_pipeline(load_scheduling(path), str(index.get("_class_name")))
    stored = index.get(OWN) or {}
    conditioner = load_conditioner(folder, dtype, bool(stored.get(TRAINED)), variant)
    parts = ModelParts(
        open_autoencoder(folder, dtype=dtype, variant=variant).eval(),
        load_unet(folder, dtype, variant),
        conditioner,
        scheduling,
        {name: value for name, value in stored.items() if name != TRAINED},
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


def save_model(parts: ModelParts, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a model folder in the diffusers layout; dtype None keeps that of the weights.

    model_index.json is written last, so a folder without it is incomplete. It names a pipeline of diffusers if that
    makes the same images.
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
    absent = f"{folder} is not a model folder: there is no {INDEX} in it; use another"
    return read_json(Path(folder) / INDEX, absent)


def _stable_pipeline(conditioner: Conditioner) -> str | None:
    """The Stable Diffusion pipeline whose UNet has the same inputs, if there is one."""
    if second := conditioner.components.get("text_encoder_2"):
        projects = second[1] == "CLIPTextModelWithProjection"
        return "StableDiffusionXLPipeline" if projects and list(conditioner.readers) == [FRAME] else None
    if not conditioner.readers:
        return "StableDiffusionPipeline"
    shown = [(r.config.kind, r.config.convention) for r in conditioner.readers.values() if isinstance(r, SpatialReader)]
    inpainting = len(conditioner.readers) == 1 and shown == [("inpainting", "stable_diffusion")]
    return INPAINTING if inpainting else None


def _index(parts: ModelParts) -> dict[str, Any]:
    """model_index.json: the classes that diffusers loads, and the model's defaults."""
    scheduler = scheduling_to_diffusers(parts.scheduling)["_class_name"]
    network = folder_of(parts.unet.config)
    unet, vae = KINDS[network].to_diffusers(parts.unet.config)["_class_name"], parts.autoencoder.class_name
    conditioner, components = parts.conditioner, parts.conditioner.components
    stored = {**parts.defaults, **({TRAINED: True} if conditioner.prompts.trainable else {})}
    # StableDiffusionPipeline supports no codebook, no mask in cross-attention, no shift, and diffusers' schedules only
    special = parts.autoencoder.shift_factor or conditioner.use_mask or scheduler not in CLASSES.values()
    text = components["text_encoder"][1]
    stable = not special and (vae, text) == ("AutoencoderKL", "CLIPTextModel") and _stable_pipeline(conditioner)
    # diffusers' unconditional pipelines of pixels support only DDPM and DDIM
    pixels = (vae, unet, text) == (Pixels.class_name, PLAIN, None) and not parts.extra_channels
    pipeline = stable or (pixels and PIXEL_PIPELINES.get(scheduler))
    return {
        "_class_name": pipeline or "TextToImage",
        **({VERSION: OF_NINE_CHANNELS} if pipeline == INPAINTING else {}),
        OWN: stored,
        **({} if conditioner.prompts.zero_empty is None else {ZEROS: conditioner.prompts.zero_empty}),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        network: ["diffusers", unet],
        "vae": ["diffusers", vae] if vae in DIFFUSERS_AUTOENCODERS else [None, None],
        **components,
    }
