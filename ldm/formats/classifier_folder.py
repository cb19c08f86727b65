"""The folder of a classifier of noisy latents: its options in diffusers' names, and its weights."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch

from ldm.formats.diffusers.unet_options import unet_from_diffusers, unet_to_diffusers
from ldm.networks.classifier import Classifier, ClassifierConfig
from ldm.schedules.noise_schedule import ScheduleConfig
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import place, read_folder, write_weights

FOLDER, STEM, CLASS_NAME = "classifier", "model", "NoisyClassifier"


def save_classifier(classifier: Classifier, model_folder: str | os.PathLike) -> None:
    """Write `classifier/config.json` and `classifier/model.safetensors` into a folder."""
    folder = Path(model_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    config = classifier.config
    options = asdict(config) | {"_class_name": CLASS_NAME, "unet": unet_to_diffusers(config.unet)}
    write_json(options, folder / "config.json")
    weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
    write_weights(weights, folder / f"{STEM}.safetensors")


def load_classifier(path: str | os.PathLike) -> Classifier:
    """Load a classifier on the CPU, in evaluation mode, with frozen parameters.

    Args:
        path: the folder that `save_classifier` wrote into, or the `classifier` folder in it.

    Raises:
        FileNotFoundError: the folder has no config.json or no weights.
        ValueError: the folder is not a classifier's, or its weights do not fit its config.
    """
    folder = Path(path) / FOLDER if (Path(path) / FOLDER).is_dir() else Path(path)
    options = read_json(folder / "config.json", f"no config.json in {folder}; give the folder of a classifier")
    if options.pop("_class_name", None) != CLASS_NAME:
        raise ValueError(f"{folder} is not a classifier of noisy latents; use a folder of stipple train-classifier")
    unet, schedule = unet_from_diffusers(options.pop("unet")), ScheduleConfig(**options.pop("schedule"))
    with torch.device("meta"):
        classifier = Classifier(ClassifierConfig(unet=unet, schedule=schedule, **options))
    place(classifier, read_folder(folder, STEM), folder)
    return classifier.eval().requires_grad_(False)
