"""Measures for fine-tuning: real images, a style classifier, and distances to the nearest real image."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import Autoencoder
from benchmarks.quality.recall import distances, small_rgb
from ldm import TextToImage
from stipple_core.images.crop import fit
from stipple_core.images.images import image_to_tensor, load_image

SIDE = 64
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
LEARNED = ("noto", "twemoji", "fluent 3d")  # styles in the training of the shipped model
NEW = "fluent high contrast"  # the style that a LoRA learns
THING, SHOWN = "Santa Claus", ("noto", "twemoji", "fluent 3d", "blobmoji", "emojitwo")  # five pictures of one thing


@dataclass(frozen=True)
class Real:
    """Real images [N, 3, 64, 64] in [-1, 1]."""

    images: Tensor
    names: list[str]
    styles: list[str]

    def find(self, names: Sequence[str], style: str) -> Tensor:
        """The images of these names in a style."""
        place = {(name, drawn): i for i, (name, drawn) in enumerate(zip(self.names, self.styles, strict=True))}
        return self.images[[place[name, style] for name in names]]


def read_real(folder: str) -> Real:
    """Read images of the shipped model's concepts in all styles, and of one object that it was not trained on."""
    rows = [json.loads(line) for line in (Path(folder) / "metadata.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["skin_tone"] is None and (row["group"] in GROUPS or row["name"] == THING)]
    images = [fit(load_image(f"{folder}/{row['file_name']}", (255, 255, 255)), (SIDE, SIDE), "center") for row in rows]
    return Real(torch.stack(images), [row["name"] for row in rows], [row["style"] for row in rows])


def choose_names(real: Real) -> tuple[list[str], list[str]]:
    """30 names for training the new style, and 200 others for evaluation; a fixed choice."""
    drawn = {
        style: {n for n, s in zip(real.names, real.styles, strict=True) if s == style} for style in (*LEARNED, NEW)
    }
    names = sorted((drawn[NEW] & drawn["fluent 3d"]) - {THING})
    random.Random(0).shuffle(names)
    return names[:30], names[30:230]


def train_classifier(real: Real, steps: int = 400) -> tuple[nn.Module, list[str], float]:
    """Train a style classifier; return it, the styles, and its accuracy on a held-out fifth of the names."""
    torch.manual_seed(0)
    styles = sorted(set(real.styles))
    labels, names = torch.tensor([styles.index(style) for style in real.styles]), sorted(set(real.names))
    held = set(random.Random(1).sample(names, len(names) // 5))
    is_held = torch.tensor([name in held for name in real.names])
    features = torch.cat([style_features(batch) for batch in real.images.split(256)])
    network = nn.Sequential(nn.BatchNorm1d(features.shape[1]), nn.Linear(features.shape[1], 128), nn.ReLU())
    network.extend([nn.Dropout(0.3), nn.Linear(128, len(styles))])
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    train = (~is_held).nonzero()[:, 0]
    for _ in range(steps):
        batch = train[torch.randint(len(train), (256,))]
        loss = F.cross_entropy(network(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    accuracy = (classify(network, real.images[is_held]) == labels[is_held]).float().mean().item()
    return network, styles, accuracy


def style_features(images: Tensor) -> Tensor:
    """Features of the style of images [B, 3, 64, 64]: histograms of colors and of edge strengths.

    They are computed at a quarter of the size, where the blur of the shipped model's autoencoder does not matter.
    """
    images = F.interpolate(images, size=(SIDE // 4, SIDE // 4), mode="area")
    levels = ((images + 1) * 3.999 / 2).long().clamp(0, 3)  # four of each channel
    colors = shares(levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2], 64)
    gray = images.mean(1)  # [B, 16, 16]
    steps = [(gray.roll(1, dim) - gray).abs() for dim in (1, 2)] + [(gray.roll(2, dim) - gray).abs() for dim in (1, 2)]
    bounds = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2])
    edges = [shares(torch.bucketize(step, bounds), 8) for step in steps]
    return torch.cat([colors, *edges], dim=1).sqrt()  # [B, 96]


def shares(numbers: Tensor, count: int) -> Tensor:
    """The relative frequency of each number below `count` in numbers [B, H, W]: [B, count]."""
    flat = numbers.flatten(1)
    return torch.zeros(len(flat), count).scatter_add_(1, flat, torch.ones(flat.shape)) / flat.shape[1]


@torch.no_grad()
def classify(network: nn.Module, images: Tensor) -> Tensor:
    """The number of the style of each image."""
    return torch.cat([network(style_features(batch)).argmax(1) for batch in images.split(256)])


def draw(model: TextToImage, prompts: Sequence[str], **settings: float) -> Tensor:
    """Generate an image for each prompt, [B, 3, 64, 64]."""
    pictures = model.generate(list(prompts), seed=0, batch_size=8, **settings)
    return torch.stack([image_to_tensor(picture.image) for picture in pictures])


def recall(images: Tensor, references: Tensor) -> dict[str, float]:
    """How often image i is nearest to reference i, among the nearest five, and nearer to it than to another one."""
    distance = distances(small_rgb(images), small_rgb(references))  # [Q, R]
    own = distance[torch.arange(len(images)), torch.arange(len(images))]
    place = (distance <= own[:, None]).sum(1)
    nearer = (len(references) - place).float() / (len(references) - 1)
    shares = {"at_1": (place <= 1).float(), "at_5": (place <= 5).float(), "nearer_than_another": nearer}
    return {name: value.mean().item() for name, value in shares.items()}


def nearer(images: Tensor, real: Real) -> dict[str, float]:
    """Compare images with the five images of the object.

    Returns the mean distance to the nearest of the five (in 8-bit gray levels), how often it is nearer than another
    real image of the same styles, and how often it is the nearest of all.
    """
    things = torch.tensor(
        [name == THING and style in SHOWN for name, style in zip(real.names, real.styles, strict=True)]
    )
    others = torch.tensor([style in SHOWN for style in real.styles]) & ~things
    own = distances(small_rgb(images), small_rgb(real.images[things])).amin(1)  # [B]
    other = distances(small_rgb(images), small_rgb(real.images[others]))  # [B, N]
    return {
        "distance": own.sqrt().mean().item() * 127.5,
        "than_another": (other > own[:, None]).float().mean().item(),
        "nearest": (own < other.amin(1)).float().mean().item(),
    }


@torch.inference_mode()
def reconstructed(autoencoder: Autoencoder, real: Real, each: int = 60) -> Real:
    """All images, and reconstructions of some of each style by an autoencoder, the best that a model can generate."""
    order = list(range(len(real.names)))
    random.Random(2).shuffle(order)
    chosen = [i for style in sorted(set(real.styles)) for i in [i for i in order if real.styles[i] == style][:each]]
    batches = real.images[chosen].split(20)
    images = torch.cat([autoencoder.decode(autoencoder.encode(batch).mode()).clamp(-1, 1) for batch in batches])
    names, styles = ([each[i] for i in chosen] for each in (real.names, real.styles))
    return Real(torch.cat([real.images, images]), real.names + names, real.styles + styles)
