"""Autoencoders on disk: the vae/ folder of a model, as diffusers writes it, or a single file in CompVis' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.formats import compvis_first_stage as compvis
from autoencoder.formats import diffusers_autoencoder as diffusers_format
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import (
    find_weights,
    outline,
    read_folder,
    read_weights,
    rename_old_attention,
    write_weights,
)

FOLDERS = ("vae", "vqvae")  # in a model folder; the second name is that of diffusers' LDM pipelines
STEM = "diffusion_pytorch_model"
DIFFUSERS_SCALE = 0.18215  # which diffusers does not write, because it is its default


@dataclass(frozen=True)
class StoredAutoencoder:
    """The contents of an autoencoder's folder."""

    config: AutoencoderConfig
    weights: Mapping[str, Tensor]
    scaling_factor: float
    shift_factor: float = 0.0
    latent_rgb: Tensor | None = None  # [c + 1, 3]


def read(folder: Path, variant: str | None = None) -> tuple[StoredAutoencoder, Path]:
    """Read an autoencoder's folder, or the one in a model folder; return also its weight file, for messages.

    Raises:
        FileNotFoundError: config.json or the weights do not exist.
        ValueError: an option is not supported, or the files are damaged.
    """
    source = next((path for path in (folder / name for name in FOLDERS) if path.is_dir()), folder)
    options = read_json(source / "config.json", f"no config.json in {source}; use a model folder with a vae folder")
    stored = StoredAutoencoder(
        config=diffusers_format.from_diffusers(options),
        weights=rename_old_attention(read_folder(source, STEM, variant)),
        scaling_factor=options.get("scaling_factor", DIFFUSERS_SCALE),
        shift_factor=options.get("shift_factor") or 0.0,
        latent_rgb=torch.tensor(options["_latent_rgb"]) if "_latent_rgb" in options else None,
    )
    return stored, find_weights(source, STEM, variant)


def write(stored: StoredAutoencoder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write vae/ into a model folder, readable by diffusers."""
    target = folder / FOLDERS[0]
    target.mkdir(parents=True, exist_ok=True)
    options = diffusers_format.to_diffusers(stored.config) | {"scaling_factor": stored.scaling_factor}
    if stored.shift_factor:
        options["shift_factor"] = stored.shift_factor
    if stored.latent_rgb is not None:
        options["_latent_rgb"] = stored.latent_rgb.tolist()
    write_json(options, target / "config.json")
    weights = {name: value.to("cpu", dtype) for name, value in stored.weights.items()}
    write_weights(weights, target / f"{STEM}.safetensors")


def read_compvis_file(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """Read the first stage's weights in CompVis' names, and the scale if there is one, from a single file."""
    keys = compvis.first_stage_keys(outline(path))
    state = read_weights(path, {compvis.SCALE, *keys.values()}.__contains__)
    return {name: state[key] for name, key in keys.items()}, compvis.read_scale(state)
