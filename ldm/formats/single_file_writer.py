"""Writing whole models and first stages as single files in CompVis' names, for programs of Stable Diffusion."""

from __future__ import annotations

import copy
import os
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import Autoencoder
from autoencoder.formats.compvis_first_stage import PREFIX as FIRST_STAGE
from autoencoder.formats.compvis_first_stage import SCALE, SCALES, to_compvis
from conditioning.encoders.clip import Clip
from conditioning.formats.compvis_conditioner import conditioner_to_compvis
from conditioning.formats.unet_inputs import hints_to_compvis
from conditioning.text.text_conditioner import TextConditioner
from ldm.formats.compvis.compvis_unet import NETWORK, unet_to_compvis
from ldm.formats.compvis.schedule_buffers import schedule_buffers
from ldm.formats.diffusers.scheduler import PREDICTION_TYPES
from ldm.formats.model_parts import ModelParts
from ldm.formats.single_file import COND_STAGE
from stipple_core.files.weights import write_weights

PROBE, PROBE_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]  # of CLIP's tokenizer


def save_single_file(parts: ModelParts, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a whole model for programs of Stable Diffusion, or for CompVis' programs if the shapes differ.

    These programs have a fixed scale of latents, so the model's scale is moved into the 1x1 convolutions around them.

    Args:
        parts: of the model; they are not changed.
        path: .safetensors.
        dtype: of the weights; None keeps theirs.

    Raises:
        ValueError: CompVis has no such network, schedule, prediction or text encoder.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: other single files are pickles, which are not written")
    schedule, prediction = parts.scheduling.schedule, parts.scheduling.prediction
    if prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction {prediction!r} can't be stored in a CompVis file; only noise, clean, velocity can"
        )
    if not isinstance(parts.autoencoder, Autoencoder):
        kind = parts.autoencoder.class_name
        raise ValueError(
            f"a model of {kind} can't be stored in a CompVis file, which needs a first stage; keep the folder"
        )
    text = isinstance(parts.conditioner.prompts, TextConditioner)
    kind, scale = parts.autoencoder.config.regularizer, parts.autoencoder.scaling_factor
    own_scale = kind == "kl" and not text  # which programs read from the file
    networks = {
        NETWORK: unet_to_compvis(parts.unet.state_dict(), parts.unet.config),
        FIRST_STAGE: _first_stage(parts.autoencoder, scale if own_scale else SCALES[kind]),
        COND_STAGE: _cond_stage(parts),
    }
    state = {f"{prefix}{name}": value for prefix, part in networks.items() for name, value in part.items()}
    state = {name: value.to(dtype if value.is_floating_point() else None) for name, value in state.items()}
    state |= schedule_buffers(schedule)
    if own_scale:
        state[SCALE] = torch.tensor(scale)
    marks = {"v_pred": prediction == "velocity", "ztsnr": schedule.zero_terminal_snr}
    state |= {name: torch.empty(0) for name, holds in marks.items() if holds}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_weights(state, path, modelspec(parts, Path(path).stem))


def save_first_stage(autoencoder: Autoencoder, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write an autoencoder alone, in CompVis' names without prefix, at the fixed scale of its kind."""
    state = _first_stage(autoencoder, SCALES[autoencoder.config.regularizer])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_weights({name: value.to(dtype) for name, value in state.items()}, path)


def modelspec(parts: ModelParts, title: str) -> dict[str, str]:
    """The header's metadata by Stability's model specification, version 1.0.0."""
    family, home = _family(parts)
    side = parts.unet.config.sample_size * parts.autoencoder.downsampling
    predicts = {"noise": "epsilon", "velocity": "v"}.get(parts.scheduling.prediction, parts.scheduling.prediction)
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": family,
        "implementation": f"https://github.com/{home}",
        "title": title,
        "resolution": f"{side}x{side}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prediction_type": predicts,
    }
    return {f"modelspec.{name}": value for name, value in values.items()}


def _first_stage(autoencoder: Autoencoder, scale: float) -> dict[str, Tensor]:
    """An autoencoder's weights at another scale of latents, in CompVis' names and their own dtypes."""
    rescaled = copy.deepcopy(autoencoder).float()
    rescaled.rescale(scale)
    original = autoencoder.state_dict()
    state = {name: value.to(original[name].dtype) for name, value in rescaled.state_dict().items()}
    return to_compvis(state, autoencoder.config)


def _cond_stage(parts: ModelParts) -> dict[str, Tensor]:
    """The weights with prefix `cond_stage_model.`. Raises ValueError for a tokenizer other than CLIP's."""
    prompts = parts.conditioner.prompts
    if isinstance(prompts, TextConditioner) and isinstance(prompts.encoder, Clip):
        tokens = prompts.tokenize([PROBE])
        if tokens.ids[tokens.mask].tolist() != PROBE_IDS[: prompts.max_length]:
            raise ValueError("the text encoder has a tokenizer of its own, which a single file can't store")
    shown = hints_to_compvis(parts.conditioner, parts.extra_channels, parts.autoencoder.latent_channels)
    return {**conditioner_to_compvis(prompts), **shown}


def _family(parts: ModelParts) -> tuple[str, str]:
    """The name of the architecture in the specification, and the repository whose names the keys have."""
    config = parts.unet.config
    shape = config.block_out_channels, config.cross_attention_dim, parts.autoencoder.config.regularizer
    versions = {768: "1", 1024: "2"}
    wide = (320, 640, 1280, 1280)
    stable = shape[0] == wide and shape[1] in versions and shape[2] == "kl" and parts.extra_channels in (0, 5)
    prompts = parts.conditioner.prompts
    if not (stable and isinstance(prompts, TextConditioner) and isinstance(prompts.encoder, Clip)):
        return "latent-diffusion", "CompVis/latent-diffusion"
    if versions[shape[1]] == "1":
        return "stable-diffusion-v1" + "-inpainting" * bool(parts.extra_channels), "CompVis/stable-diffusion"
    kind = "768-v" if parts.scheduling.prediction == "velocity" else "512"
    return f"stable-diffusion-v2-{'inpainting' if parts.extra_channels else kind}", "Stability-AI/stablediffusion"
