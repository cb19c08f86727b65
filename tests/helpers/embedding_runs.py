"""A CLIP, a prior, an unCLIP decoder and a retrieval-augmented model of colored shapes, trained from scratch.

Some 15 minutes of a core. EMBEDDING_RUNS names a folder to keep them in, where what is there is not trained again.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stipple_core.embedders import Embedder, EmbedderConfig, build_embedder
from tests.helpers.shapes import Scene, make_set, read
from tests.helpers.small_clip import HELD_OUT, STEPS, pictures, save, train
from tests.helpers.tiny_runs import launch

QUERIES: list[Scene] = sorted(HELD_OUT, key=str)  # pairs that no training of these models has seen


def folder_of(made: Path) -> Path:
    """Where the models are trained, or lie."""
    return Path(os.environ.get("EMBEDDING_RUNS", made))


def data(folder: Path) -> Path:
    """The captioned pictures, the CLIP of them, the autoencoder and the embeddings, made where they are not there."""
    if not (folder / "set").exists():
        make_set(folder / "set", 1500, HELD_OUT, seed=0)
    if not (folder / "clip").exists():
        torch.set_num_threads(1)
        save(train(STEPS), folder / "clip")
    if not (folder / "autoencoder").exists():
        said = [f"data.folder={folder / 'set'}", f"run={folder / 'autoencoder'}"]
        launch("train_autoencoder.py", "--config", "configs/autoencoder/shapes.yaml", *said)
    if not (folder / "embeddings").exists():
        said = ["--folder", str(folder / "set"), "--output", str(folder / "embeddings"), "--validation", "0.03"]
        launch("stipple.commands.embed", "--name", f"local-dir:{folder / 'clip'}", *said)
    return folder


def trained(folder: Path, kind: str, *settings: str) -> Path:
    """The model folder of configs/ldm/KIND-small.yaml on these data."""
    run = folder / kind
    if not (run / "model" / "model_index.json").exists():
        said = [f"data.folder={folder / 'set'}", f"run={run}", *settings]
        launch("train_ldm.py", "--config", f"configs/ldm/{kind}-small.yaml", *said)
    return run / "model"


def prior(folder: Path) -> Path:
    """The model that makes embeddings of captions."""
    clip = f"local-dir:{folder / 'clip'}"
    said = [f"conditioner.name={clip}", f"conditioner.text.encoder.name={clip}"]
    return trained(folder, "unclip-prior", f"autoencoder={folder / 'embeddings'}", *said)


def decoder(folder: Path) -> Path:
    """The model that makes pictures of embeddings."""
    said = [f"conditioner.image.encoder.name=local-dir:{folder / 'clip'}"]
    return trained(folder, "unclip-decoder", f"autoencoder={folder / 'autoencoder' / 'model'}", *said)


def augmented(folder: Path) -> Path:
    """The model that makes pictures of retrieved embeddings."""
    said = [
        f"conditioner.retrieval.encoder.name=local-dir:{folder / 'clip'}",
        f"conditioner.retrieval.database={folder / 'embeddings' / 'embeddings.safetensors'}",
    ]
    return trained(folder, "rdm", f"autoencoder={folder / 'autoencoder' / 'model'}", *said)


def unconditional(folder: Path) -> Path:
    """A model that draws shapes and is told nothing."""
    said = ["unet.in_channels=4", "unet.out_channels=4", "unet.block_out_channels=[32,64]", "trainer.steps=400"]
    said += ["trainer.batch_size=64", "optimizer.learning_rate=2e-3", "data.flip=false", "samples.every=0"]
    said += ["validation.every=0", f"autoencoder={folder / 'autoencoder' / 'model'}"]
    return trained(folder, "unconditional", *said)


def clip(folder: Path) -> Embedder:
    """The CLIP that all of them look through."""
    return build_embedder(EmbedderConfig(name=f"local-dir:{folder / 'clip'}"))


def truth(embedder: Embedder, scenes: list[Scene], each: int, seed: int = 7) -> Tensor:
    """Embeddings [scenes, each, d] of fresh pictures of each scene."""
    draws = random.Random(seed)
    drawn = [embedder.images(pictures([scene] * each, draws)) for scene in scenes]
    return torch.stack(drawn)


def colored(made: list[Image.Image], scenes: list[Scene]) -> float:
    """The share of pictures in which all colors of a scene are there, in their order, and no others."""
    pairs = zip(map(read, made), scenes, strict=True)
    return sum([a.color for a in seen] == [b.color for b in told] for seen, told in pairs) / len(made)
