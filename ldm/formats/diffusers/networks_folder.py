"""How the network and the noise schedule are stored: a model folder in diffusers' layout, as other programs read it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ldm.formats.diffusers.network_kinds import KINDS, Network, NetworkConfig, folder_of
from ldm.formats.diffusers.scheduler import Scheduling, scheduling_from_diffusers, scheduling_to_diffusers
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import find_weights, place, read_folder, rename_old_attention, write_weights

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"


def save_unet(unet: Network, model_folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write MODEL_FOLDER/unet, or prior: config.json and the weights, in `dtype` (None: as they are)."""
    name = folder_of(unet.config)
    folder = Path(model_folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(KINDS[name].to_diffusers(unet.config), folder / CONFIG)
    state = {name: value.to("cpu", dtype) for name, value in unet.state_dict().items()}
    write_weights(state, folder / f"{STEM}.safetensors")


def load_unet(
    model_folder: str | os.PathLike, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Network:
    """Read MODEL_FOLDER/unet, or prior, on the CPU, in evaluation mode; no weight is initialized on the way.

    Args:
        model_folder: as `save_unet` or diffusers wrote it.
        dtype: of the weights in memory, whatever the files hold.
        variant: such as "fp16", of the files; see `read_folder`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for an option that we don't implement, named; for weights that do not fit, the first five named.
    """
    name = next((name for name in KINDS if (Path(model_folder) / name).is_dir()), "unet")
    folder = Path(model_folder) / name
    unet = empty_unet(KINDS[name].from_diffusers(read_json(folder / CONFIG)))
    place(unet, rename_old_attention(read_folder(folder, STEM, variant)), find_weights(folder, STEM, variant))
    return unet.to(dtype).eval()


def empty_unet(config: NetworkConfig) -> Network:
    """A network without memory, for `place` to fill."""
    with torch.device("meta"):
        return KINDS[folder_of(config)].build(config)


def save_scheduling(scheduling: Scheduling, model_folder: str | os.PathLike) -> None:
    """Write MODEL_FOLDER/scheduler/scheduler_config.json."""
    folder = Path(model_folder) / "scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(scheduling_to_diffusers(scheduling), folder / "scheduler_config.json")


def load_scheduling(model_folder: str | os.PathLike) -> Scheduling:
    """Read MODEL_FOLDER/scheduler/scheduler_config.json. Raises FileNotFoundError, or ValueError naming the option."""
    return scheduling_from_diffusers(read_json(Path(model_folder) / "scheduler" / "scheduler_config.json"))
