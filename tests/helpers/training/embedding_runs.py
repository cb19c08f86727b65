"""CLIP, a prior, an unCLIP decoder and a retrieval-augmented model of colored shapes, trained in 15 minutes on one
core.

EMBEDDING_RUNS is a folder in which trained models are kept and reused.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stipple_core.embedders import Embedder, EmbedderConfig, build_embedder
from tests.helpers.data.shapes import Scene, make_set, read
from tests.helpers.models.small_clip import HELD_OUT, STEPS, pictures, save, train
from tests.helpers.training.tiny_runs import launch

QUERIES: list[Scene] = sorted(HELD_OUT, key=str)  # pairs that are not used for training


def folder_of(made: Path) -> Path:
    """The folder of the models."""
    return Path(os.environ.get("EMBEDDING_RUNS", made))


def data(folder: Path) -> Path:
    """Make captioned images, CLIP, autoencoder and embeddings, unless they exist."""
    if not (folder / "set").exists():
        make_set(folder / "set", 1500, HELD_OUT, seed=0)
    if not (folder / "clip").exists():
        torch.set_num_threads(1)
        save(train(STEPS), folder / "clip")
    if not (folder / "autoencoder").exists():
        options = [f"data.folder={folder / 'set'}", f"run={folder / 'autoencoder'}"]
        launch("train_autoencoder.py", "--config", "configs/autoencoder/shapes.yaml", *options)
    if not (folder / "embeddings").exists():
        options = ["--folder", str(folder / "set"), "--output", str(folder / "embeddings"), "--validation", "0.03"]
        launch("stipple.commands.embed", "--name", f"local-dir:{folder / 'clip'}", *options)
    return folder


def trained(folder: Path, kind: str, *settings: str) -> Path:
    """Train configs/ldm/KIND-small.yaml on these data, unless it exists; return the model folder."""
    run = folder / kind
    if not (run / "model" / "model_index.json").exists():
        options = [f"data.folder={folder / 'set'}", f"run={run}", *settings]
        launch("train_ldm.py", "--config", f"configs/ldm/{kind}-small.yaml", *options)
    return run / "model"


def prior(folder: Path) -> Path:
    """The model that generates embeddings from captions."""
    clip = f"local-dir:{folder / 'clip'}"
    options = [f"conditioner.name={clip}", f"conditioner.text.encoder.name={clip}"]
    return trained(folder, "unclip-prior", f"autoencoder={folder / 'embeddings'}", *options)


def decoder(folder: Path) -> Path:
    """The model that generates images from embeddings."""
    options = [f"conditioner.image.encoder.name=local-dir:{folder / 'clip'}"]
    return trained(folder, "unclip-decoder", f"autoencoder={folder / 'autoencoder' / 'model'}", *options)


def augmented(folder: Path) -> Path:
    """The model that generates images from retrieved embeddings."""
    options = [
        f"conditioner.retrieval.encoder.name=local-dir:{folder / 'clip'}",
        f"conditioner.retrieval.database={folder / 'embeddings' / 'embeddings.safetensors'}",
    ]
    return trained(folder, "rdm", f"autoencoder={folder / 'autoencoder' / 'model'}", *options)


def unconditional(folder: Path) -> Path:
    """An unconditional model of shapes."""
    options = ["unet.in_channels=4", "unet.out_channels=4", "unet.block_out_channels=[32,64]", "trainer.steps=400"]
    options += ["trainer.batch_size=64", "optimizer.learning_rate=2e-3", "data.flip=false", "samples.every=0"]
    options += ["validation.every=0", f"autoencoder={folder / 'autoencoder' / 'model'}"]
    return trained(folder, "unconditional", *options)


def clip(folder: Path) -> Embedder:
    """The CLIP that all these models use."""
    return build_embedder(EmbedderConfig(name=f"local-dir:{folder / 'clip'}"))


def truth(embedder: Embedder, scenes: list[Scene], each: int, seed: int = 7) -> Tensor:
    """Embeddings [scenes, each, d] of new images of each scene."""
    draws = random.Random(seed)
    drawn = [embedder.images(pictures([scene] * each, draws)) for scene in scenes]
    return torch.stack(drawn)


def colored(images: list[Image.Image], scenes: list[Scene]) -> float:
    """The fraction of images with exactly the colors of their scene, in order."""
    pairs = zip(map(read, images), scenes, strict=True)
    return sum([a.color for a in seen] == [b.color for b in expected] for seen, expected in pairs) / len(images)
