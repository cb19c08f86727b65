"""Ten classes of photographs at 32 x 32 pixels, and a classifier of them.

The photographs are in the folder STIPPLE_PHOTOS, with `file_name`, `label` and `coarse_label` in metadata.jsonl.
docs/tasks/class.md names their source.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE = 32  # pixels
MOST = 400  # images per class, selected by a hash of their names
HELD_OUT = 6  # one image in 6 is held out
CLASSES = {  # by class: the column and value that define it
    "t-shirt": ("label", "T-Shirt"),
    "pants": ("label", "Pants"),
    "shoes": ("label", "Shoes"),
    "dress": ("label", "Dress"),
    "shorts": ("label", "Shorts"),
    "hat": ("label", "Hat"),
    "apple": ("coarse_label", "Apple"),
    "juice": ("coarse_label", "Juice"),
    "pepper": ("coarse_label", "Pepper"),
    "melon": ("coarse_label", "Melon"),
}


def photos() -> Path | None:
    """The folder STIPPLE_PHOTOS, or None."""
    return Path(os.environ["STIPPLE_PHOTOS"]) if os.environ.get("STIPPLE_PHOTOS") else None


def make_set(source: Path, folder: Path) -> None:
    """Write folder/train and folder/held_out, with images of 32 x 32 pixels and `class` in metadata.jsonl."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for name, (column, value) in CLASSES.items():
        files = sorted((row["file_name"] for row in rows if row[column] == value), key=_hash)
        for index, file in enumerate(files[:MOST]):
            part = folder / ("held_out" if index % HELD_OUT == 0 else "train")
            part.mkdir(parents=True, exist_ok=True)
            picture = f"{name}-{index:03d}.png"
            with Image.open(source / file) as image:
                image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(part / picture)
            with (part / "metadata.jsonl").open("a") as metadata:
                metadata.write(json.dumps({"file_name": picture, "class": name, "source": file}) + "\n")


def read_part(folder: Path) -> tuple[Tensor, Tensor]:
    """Read images [N, 3, 32, 32] in [-1, 1] and class numbers [N] of one part of the set."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pixels = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([list(CLASSES).index(row["class"]) for row in rows])


class Classifier(nn.Module):
    """Maps images [B, 3, 32, 32] in [-1, 1] to logits [B, 10] by three levels of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((3, 32), (32, 64), (64, 128)):
            for channels in (into, out):
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images).mean(dim=(2, 3)))


def train_classifier(folder: Path, epochs: int = 16, seed: int = 0) -> Classifier:
    """Train a classifier on folder/train, with random mirroring and slight blur."""
    images, labels = read_part(folder / "train")
    weight = 1 / torch.bincount(labels, minlength=len(CLASSES)).float()
    torch.manual_seed(seed)
    model = Classifier()
    steps = epochs * (len(images) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(32)[: len(images) // 32]:
            batch = F.pad(images[chosen], (2, 2, 2, 2), mode="replicate")
            top, left = torch.randint(5, (2,)).tolist()
            batch = batch[:, :, top : top + SIDE, left : left + SIDE]
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, _blurred(batch), batch)
            loss = F.cross_entropy(model(batch), labels[chosen], weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """The fraction of images that are classified correctly."""
    return (torch.cat([model(part) for part in images.split(64)]).argmax(1) == labels).float().mean().item()


def _blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
