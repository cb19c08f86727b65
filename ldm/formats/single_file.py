"""Whole models in one file, as CompVis' and Stability's programs store them: .ckpt or .safetensors, in CompVis' names.

Keys and shapes determine most of a model. The rest comes from the caller, a YAML of CompVis, the metadata of the file,
or a table of published models: see `_prediction` and `ldm.formats.compvis.compvis_unet.KNOWN`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from autoencoder.formats.compvis_first_stage import PREFIX as FIRST_STAGE
from autoencoder.formats.compvis_first_stage import SCALE, first_stage_keys, read_scale
from conditioning.formats.compvis_conditioner import conditioner_from_compvis
from conditioning.formats.unet_inputs import MAPPER, with_hints
from conditioning.interface.conditioner import Conditioner
from ldm.formats.compvis.compvis_schedule import schedule_from_compvis
from ldm.formats.compvis.compvis_unet import NETWORK, unet_config, unet_from_compvis, unet_keys
from ldm.formats.compvis.schedule_buffers import BUFFERS
from ldm.formats.diffusers.networks_folder import empty_unet
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.model_parts import ModelParts
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import ScheduleConfig
from stipple_core.config import read_yaml
from stipple_core.files.weights import AVERAGE, outline, place, read_metadata, read_weights

COND_STAGE = "cond_stage_model."
MARKS = {"v_pred": "predicts velocity", "ztsnr": "no signal at t = 1"}  # empty tensors, as ComfyUI writes them
OTHERS = {*BUFFERS, *MARKS, SCALE, "logvar", "lvlb_weights"}  # logvar: weights of the loss, not of the model
FIRST_LAYER = "encoder.conv_in.weight"  # of a first stage
SD2 = (320, 1024)  # features on the finest level and width of the context
SD2_NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def open_single_file(
    path: str | os.PathLike,
    config_yaml: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelParts:
    """Open a whole model on the CPU, in evaluation mode. Weights averaged over training are preferred.

    Args:
        path: .safetensors, or .ckpt with tensors only.
        config_yaml: CompVis' YAML of the model, for what keys and shapes do not determine; none of it is executed.
        tokenizer: a folder; None builds CLIP's offline, and downloads bert-base-uncased for LDM's transformer.
        prediction: what the UNet outputs, a key of PREDICTIONS; see `_prediction` for None.
        dtype: of the weights in memory, whatever the file holds.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a supported model; the message names up to five wrong keys.
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
        schedule, yaml_prediction = schedule_from_compvis(state, params)
        metadata = read_metadata(path)
        if prediction is None:
            in_yaml = "parameterization" in params
            prediction = yaml_prediction if in_yaml else _prediction(weights, config, metadata, "v_pred" in names)
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
    except (LookupError, RuntimeError) as error:  # from malformed shapes
        raise ValueError(f"{path} can't be opened: its shapes do not match a known network ({error})") from None
    del state, weights  # frees memory once the networks have another dtype
    if "ztsnr" in names:
        schedule = replace(schedule, zero_terminal_snr=True)
    sampling = _sampling(schedule, conditioner)
    scheduling = Scheduling(schedule=schedule, prediction=prediction, ends_clean=False, **sampling)
    return ModelParts(autoencoder.opened_in(dtype).eval(), unet.to(dtype).eval(), conditioner, scheduling)


def _sampling(schedule: ScheduleConfig, conditioner: Conditioner) -> dict[str, str | None]:
    """Sampler and spacing of a model: those of diffusers for Stable Diffusion, else LDM's DDIM."""
    if schedule.zero_terminal_snr:
        return {"spacing": "trailing", "sampler": "ddim"}
    if conditioner.components["text_encoder"][1] == "CLIPTextModel":
        return {"spacing": None, "sampler": "pndm"}
    return {"spacing": "leading", "sampler": "ddim"}


def compvis_params(path: str | os.PathLike) -> dict[str, Any]:
    """`model.params` of a CompVis YAML. Raises FileNotFoundError, or ValueError if it is missing."""
    node: Any = read_yaml(str(path))
    for key in ("model", "params"):
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or not isinstance(node.get("unet_config", {}), Mapping):
        raise ValueError(f"{path} has no model.params; use CompVis' YAML of this model")
    return dict(node)


def _require_whole(names: Collection[str]) -> None:
    """Raise ValueError unless the keys are exactly those of a UNet with its first stage."""
    prefixes = (NETWORK, AVERAGE, FIRST_STAGE, COND_STAGE)
    unknown = [name for name in names if not name.startswith(prefixes) and name not in OTHERS]
    missing = [prefix for prefix in (NETWORK, FIRST_STAGE) if not any(name.startswith(prefix) for name in names)]
    if missing and first_stage_keys(names):
        raise ValueError("it holds a first stage only; use it as autoencoder, or convert it to a folder")
    if missing:
        raise ValueError(f"no key begins with {missing[0]}; the first keys are {', '.join(sorted(names)[:5])}")
    if unknown:
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"keys of unknown parts: {', '.join(unknown[:5])}{more}")


def _conditioner(
    state: Mapping[str, Tensor], tokenizer: str | os.PathLike | None, dtype: torch.dtype
) -> tuple[Conditioner, Tensor | None]:
    """The conditioner of prompts, and the weight of the reader of semantic maps, if there is one."""
    weights = {name.removeprefix(COND_STAGE): value for name, value in state.items() if name.startswith(COND_STAGE)}
    mapper = weights.pop(MAPPER, None)
    if FIRST_LAYER in weights:  # the first stage again, with which LDM's inpainting model encodes the masked image
        weights = {}
    conditioner = conditioner_from_compvis(weights, None if tokenizer is None else str(tokenizer), dtype)
    return conditioner, None if mapper is None else mapper.to(dtype)


def _prediction(weights: Mapping[str, Tensor], config: UNetConfig, metadata: Mapping[str, str], marked: bool) -> str:
    """The prediction by metadata or marks; else noise, or for Stable Diffusion 2 a guess, with a warning.

    The guess is ComfyUI's: the last norm's biases have a deviation above 0.09 in the published velocity models.
    """
    value = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key"))
    named = {"epsilon": "noise", "v": "velocity", "clean": "clean"}.get(value)
    if named or marked:
        return named or "velocity"
    if (config.block_out_channels[0], config.cross_attention_dim) != SD2 or config.in_channels != 4:
        return "noise"
    guess = "velocity" if weights[SD2_NORM].float().std(correction=0) > 0.09 else "noise"
    warnings.warn(f"the file has no prediction type; its weights suggest {guess}", stacklevel=3)
    return guess


def _sample_size(config: UNetConfig, downsampling: int, prediction: str, metadata: Mapping[str, str]) -> int:
    """The side of the training latents: from the metadata, or of Stable Diffusion 2 at 768 pixels, or the config's."""
    side = metadata.get("modelspec.resolution", "").partition("x")[0]
    if side.isdecimal() and 0 < int(side) <= 1 << 14:
        return max(int(side) // downsampling, 1)
    sd2 = (config.block_out_channels[0], config.cross_attention_dim) == SD2
    return 96 if sd2 and prediction == "velocity" else config.sample_size
