"""Whole models in one file, as CompVis' and Stability's programs keep them: .ckpt or .safetensors, in CompVis' names.

What a file is, is seen in its keys and shapes. What these don't tell is said by the caller, a YAML of CompVis', the
metadata of the file, or known of published models: see `_prediction` and `ldm.formats.compvis.compvis_unet.KNOWN`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from autoencoder.formats.compvis_first_stage import PREFIX as FIRST_STAGE
from autoencoder.formats.compvis_first_stage import SCALE, SCALES, first_stage_keys, read_scale, to_compvis
from conditioning.encoders.clip import Clip
from conditioning.formats.compvis_conditioner import conditioner_from_compvis, conditioner_to_compvis
from conditioning.formats.unet_inputs import MAPPER, hints_to_compvis, with_hints
from conditioning.interface.conditioner import Conditioner
from conditioning.text.text_conditioner import TextConditioner
from ldm.formats.compvis.compvis_schedule import schedule_from_compvis
from ldm.formats.compvis.compvis_unet import NETWORK, unet_config, unet_from_compvis, unet_keys, unet_to_compvis
from ldm.formats.compvis.schedule_buffers import BUFFERS, schedule_buffers
from ldm.formats.diffusers.networks_folder import empty_unet
from ldm.formats.diffusers.scheduler import PREDICTION_TYPES, Scheduling
from ldm.formats.model_parts import ModelParts
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.base import ScheduleConfig
from stipple_core.config import read_yaml
from stipple_core.files.weights import AVERAGE, outline, place, read_metadata, read_weights, write_weights

COND_STAGE = "cond_stage_model."
MARKS = {"v_pred": "predicts velocity", "ztsnr": "no signal at t = 1"}  # empty tensors, a habit of ComfyUI's
OTHERS = {*BUFFERS, *MARKS, SCALE, "logvar", "lvlb_weights"}  # logvar: weights of the loss, not of the model
FIRST_LAYER = "encoder.conv_in.weight"  # of a first stage
PROBE, PROBE_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]  # as CLIP's tokenizer has it
SD2 = (320, 1024)  # features on the finest level and width of the context
SD2_NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def open_single_file(
    path: str | os.PathLike,
    config_yaml: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelParts:
    """Open a whole model on the CPU, in evaluation mode; weights averaged over training are preferred.

    Args:
        path: .safetensors, or .ckpt with nothing but tensors in it.
        config_yaml: CompVis' YAML of the model, for what keys and shapes don't tell; nothing in it is executed.
        tokenizer: a folder; None makes CLIP's offline, and fetches bert-base-uncased for LDM's transformer.
        prediction: what the UNet outputs, a key of PREDICTIONS; see `_prediction` for None.
        dtype: of the weights in memory, whatever the file holds.

    Raises:
        FileNotFoundError, ValueError: in one line naming the file, and the first five keys that are wrong.
    """
    names = outline(path).keys()
    try:
        params = {} if config_yaml is None else compvis_params(config_yaml)
        _require_whole(names)
        network, stage = unet_keys(names), first_stage_keys(names)
        others = (name for name in names if name.startswith(COND_STAGE) or name in OTHERS)
        state = read_weights(path, {*network.values(), *stage.values(), *others}.__contains__)
        weights = {name: state[key] for name, key in network.items()}
        config = unet_config(weights, params.get("unet_config", {}).get("params"))
        schedule, said = schedule_from_compvis(state, params)
        metadata = read_metadata(path)
        if prediction is None:
            told = "parameterization" in params
            prediction = said if told else _prediction(weights, config, metadata, "v_pred" in names)
        scale = read_scale(state, params.get("scale_factor"))
        autoencoder = Autoencoder.from_compvis({name: state[key] for name, key in stage.items()}, scale)
        config = replace(config, sample_size=_sample_size(config, autoencoder.downsampling, prediction, metadata))
        side = config.sample_size * autoencoder.downsampling
        autoencoder.config = replace(autoencoder.config, sample_size=side)
        unet = empty_unet(config)
        place(unet, unet_from_compvis(weights, config), "the UNet")
        conditioner, mapper = _conditioner(state, tokenizer, dtype)
        if conditioner.context_dim != config.cross_attention_dim:
            dim = config.cross_attention_dim
            raise ValueError(f"the UNet reads tokens of width {dim}, its conditioner's have {conditioner.context_dim}")
        channels = autoencoder.latent_channels
        extra = config.in_channels - channels
        conditioner = with_hints(conditioner, extra, channels, autoencoder.downsampling, mapper).eval()
    except ValueError as error:
        raise ValueError(f"{path} can't be opened: {error}") from None
    except (LookupError, RuntimeError) as error:  # shapes where nobody would look for any
        raise ValueError(f"{path} can't be opened: its shapes are of no known network ({error})") from None
    del state, weights  # which the networks hold, until they are in another dtype
    if "ztsnr" in names:
        schedule = replace(schedule, zero_terminal_snr=True)
    habits = _habits(schedule, conditioner)
    scheduling = Scheduling(schedule=schedule, prediction=prediction, ends_clean=False, **habits)
    return ModelParts(autoencoder.opened_in(dtype).eval(), unet.to(dtype).eval(), conditioner, scheduling)


def _habits(schedule: ScheduleConfig, conditioner: Conditioner) -> dict[str, str | None]:
    """Sampler and spacing of a file: those that diffusers has for Stable Diffusion, else LDM's DDIM."""
    if schedule.zero_terminal_snr:
        return {"spacing": "trailing", "sampler": "ddim"}
    if conditioner.components["text_encoder"][1] == "CLIPTextModel":
        return {"spacing": None, "sampler": "pndm"}
    return {"spacing": "leading", "sampler": "ddim"}


def save_single_file(parts: ModelParts, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a whole model as programs for Stable Diffusion read it where the shapes are its, else as CompVis' do.

    Their fixed scale of latents is made right by moving ours into the 1x1 convolutions around them.

    Args:
        parts: is left as it is.
        path: .safetensors.
        dtype: of the weights; None: as they are.

    Raises:
        ValueError: CompVis has no such network, schedule, prediction or text encoder; the message says which.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: other single files are pickles, which are not written")
    schedule, prediction = parts.scheduling.schedule, parts.scheduling.prediction
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction {prediction!r} can't be said in a CompVis file; only noise, clean, velocity can")
    if not isinstance(parts.autoencoder, Autoencoder):
        kind = parts.autoencoder.class_name
        raise ValueError(f"a model of {kind} can't be said in a CompVis file, which has a first stage; keep the folder")
    text = isinstance(parts.conditioner.prompts, TextConditioner)
    kind, scale = parts.autoencoder.config.regularizer, parts.autoencoder.scaling_factor
    own_scale = kind == "kl" and not text  # programs read it from the file
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
    """Write an autoencoder alone, in CompVis' names without prefix, at the scale that its kind always has there."""
    state = _first_stage(autoencoder, SCALES[autoencoder.config.regularizer])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_weights({name: value.to(dtype) for name, value in state.items()}, path)


def modelspec(parts: ModelParts, title: str) -> dict[str, str]:
    """The header's metadata after Stability's model specification, version 1.0.0."""
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


def compvis_params(path: str | os.PathLike) -> dict[str, Any]:
    """`model.params` of a CompVis YAML. Raises FileNotFoundError, or ValueError where there is none."""
    node: Any = read_yaml(str(path))
    for key in ("model", "params"):
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or not isinstance(node.get("unet_config", {}), Mapping):
        raise ValueError(f"{path} has no model.params; give the YAML that CompVis has for this model")
    return dict(node)


def _first_stage(autoencoder: Autoencoder, scale: float) -> dict[str, Tensor]:
    """An autoencoder's weights at another scale of latents, in CompVis' names and the dtypes that they have."""
    rescaled = copy.deepcopy(autoencoder).float()
    rescaled.rescale(scale)
    given = autoencoder.state_dict()
    state = {name: value.to(given[name].dtype) for name, value in rescaled.state_dict().items()}
    return to_compvis(state, autoencoder.config)


def _require_whole(names: Collection[str]) -> None:
    """Raise ValueError unless the keys are those of a UNet with its first stage, and no others."""
    prefixes = (NETWORK, AVERAGE, FIRST_STAGE, COND_STAGE)
    unknown = [name for name in names if not name.startswith(prefixes) and name not in OTHERS]
    missing = [prefix for prefix in (NETWORK, FIRST_STAGE) if not any(name.startswith(prefix) for name in names)]
    if missing and first_stage_keys(names):
        raise ValueError("it holds a first stage only; give it as autoencoder, or convert it to a folder")
    if missing:
        raise ValueError(f"no key begins with {missing[0]}; the first keys are {', '.join(sorted(names)[:5])}")
    if unknown:
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"keys of no known part: {', '.join(unknown[:5])}{more}")


def _conditioner(
    state: Mapping[str, Tensor], tokenizer: str | os.PathLike | None, dtype: torch.dtype
) -> tuple[Conditioner, Tensor | None]:
    """The conditioner of prompts, and the one weight of what reads a semantic map, if there is one."""
    weights = {name.removeprefix(COND_STAGE): value for name, value in state.items() if name.startswith(COND_STAGE)}
    mapper = weights.pop(MAPPER, None)
    if FIRST_LAYER in weights:  # the first stage again, which LDM's inpainting model reads the masked picture with
        weights = {}
    conditioner = conditioner_from_compvis(weights, None if tokenizer is None else str(tokenizer), dtype)
    return conditioner, None if mapper is None else mapper.to(dtype)


def _cond_stage(parts: ModelParts) -> dict[str, Tensor]:
    """The weights that follow `cond_stage_model.`; ValueError where a program would not know their tokenizer."""
    prompts = parts.conditioner.prompts
    if isinstance(prompts, TextConditioner) and isinstance(prompts.encoder, Clip):
        tokens = prompts.tokenize([PROBE])
        if tokens.ids[tokens.mask].tolist() != PROBE_IDS[: prompts.max_length]:
            raise ValueError("the text encoder has a tokenizer of its own, which has no place in a single file")
    shown = hints_to_compvis(parts.conditioner, parts.extra_channels, parts.autoencoder.latent_channels)
    return {**conditioner_to_compvis(prompts), **shown}


def _prediction(weights: Mapping[str, Tensor], config: UNetConfig, metadata: Mapping[str, str], marked: bool) -> str:
    """What the UNet predicts: as the metadata or marks say; noise; of Stable Diffusion 2 a guess, with a warning.

    The guess is ComfyUI's: the last norm's biases spread wider than 0.09 in the published velocity models.
    """
    said = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key"))
    named = {"epsilon": "noise", "v": "velocity", "clean": "clean"}.get(said)
    if named or marked:
        return named or "velocity"
    if (config.block_out_channels[0], config.cross_attention_dim) != SD2 or config.in_channels != 4:
        return "noise"
    guess = "velocity" if weights[SD2_NORM].float().std(correction=0) > 0.09 else "noise"
    warnings.warn(f"the file does not say what it predicts; by its weights it is {guess}", stacklevel=3)
    return guess


def _sample_size(config: UNetConfig, downsampling: int, prediction: str, metadata: Mapping[str, str]) -> int:
    """Side of the latents trained on: from the metadata, or that of Stable Diffusion 2 at 768 pixels, or as known."""
    side = metadata.get("modelspec.resolution", "").partition("x")[0]
    if side.isdecimal() and 0 < int(side) <= 1 << 14:
        return max(int(side) // downsampling, 1)
    sd2 = (config.block_out_channels[0], config.cross_attention_dim) == SD2
    return 96 if sd2 and prediction == "velocity" else config.sample_size


def _family(parts: ModelParts) -> tuple[str, str]:
    """The specification's name of the architecture, and the repository of the program whose names the keys are."""
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
