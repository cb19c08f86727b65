"""How the UNet and the noise schedule are stored: a model folder in diffusers' layout, as other programs read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.options import (
    Scheduling,
    scheduling_from_diffusers,
    scheduling_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ldm.unet import UNet

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_unet(unet: UNet, model_folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write MODEL_FOLDER/unet: config.json and the weights, in `dtype` (None: as they are)."""
    folder = Path(model_folder) / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    _write_json({"_class_name": "UNet2DConditionModel", **unet_to_diffusers(unet.config)}, folder / CONFIG)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.state_dict().items()}
    unfinished = folder / f".{WEIGHTS}.{os.getpid()}"
    save_file(state, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / WEIGHTS)


def load_unet(model_folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> UNet:
    """Read MODEL_FOLDER/unet on the CPU, in evaluation mode; no weight is initialized on the way.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for an option that we don't implement, named; for weights that do not fit, the first five named.
    """
    folder = Path(model_folder) / "unet"
    options = _read_json(folder / CONFIG)
    kind = options.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{folder / CONFIG} describes a {kind}; only a UNet2DConditionModel can be read")
    config = unet_from_diffusers({name: value for name, value in options.items() if not name.startswith("_")})
    with torch.device("meta"):
        unet = UNet(config)
    place(unet, read_weights(folder / WEIGHTS), str(folder / WEIGHTS))
    return unet.to(dtype).eval()


def save_scheduling(scheduling: Scheduling, model_folder: str | os.PathLike) -> None:
    """Write MODEL_FOLDER/scheduler/scheduler_config.json."""
    folder = Path(model_folder) / "scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(scheduling_to_diffusers(scheduling), folder / "scheduler_config.json")


def load_scheduling(model_folder: str | os.PathLike) -> Scheduling:
    """Read MODEL_FOLDER/scheduler/scheduler_config.json. Raises FileNotFoundError, or ValueError naming the option."""
    return scheduling_from_diffusers(_read_json(Path(model_folder) / "scheduler" / "scheduler_config.json"))


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a safetensors file. Raises FileNotFoundError, or ValueError if it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a whole model?")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); get it again") from error


def place(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Make `weights` the parameters of `module`, all of them and no others.

    Raises:
        ValueError: naming the first five keys that are missing, left over or of another shape.
    """
    expected = module.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not known" for name in weights if name not in expected]
    wrong += [
        f"{name} is {list(weights[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(dict(weights), strict=True, assign=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a whole model?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; get it again")
    return value


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
