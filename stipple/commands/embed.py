"""Embed a folder's pictures by CLIP: a database for retrieval, and the scale of embeddings for a prior.

stipple embed --folder PICTURES --name ViT-L-14 --pretrained laion2b_s32b_b82k --output runs/embeddings

OUTPUT/embeddings.safetensors is what `conditioner.retrieval.database` names; names.json beside it keeps pictures of the
folder, where they are trained on, from being their own neighbors. OUTPUT itself is the `autoencoder` of a model of
embeddings (unCLIP's prior).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from autoencoder import ImageEmbeddings
from conditioning.readers.retrieval import NAMES
from stipple_core.config import one_line_errors
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from stipple_core.embedders import EmbedderConfig, build_embedder
from stipple_core.files.weights import write_weights

BATCH = 32  # pictures at a time


@torch.no_grad()
def embed(arguments: argparse.Namespace) -> None:
    """Write the embeddings of all training pictures, in the order of their names, and the encoder with their scale."""
    config = EmbedderConfig(kind=arguments.kind, name=arguments.name, pretrained=arguments.pretrained)
    embedder = build_embedder(config, texts=False).to(arguments.device)
    size = embedder.config.network["size"]
    data = DataConfig(folder=arguments.folder, image_size=size, validation=arguments.validation, captions=[])
    pictures = ImageDataset(scan(data, captioned=False).train, data)
    points, names = [], []
    for first in tqdm(range(0, len(pictures), BATCH)):
        batch = {i: pictures.picture(i) for i in range(first, min(first + BATCH, len(pictures)))}
        seen = {i: image for i, image in batch.items() if image is not None}
        if seen:
            points.append(embedder.images(torch.stack([*seen.values()]).to(arguments.device)).cpu())
            names += [pictures.records[i].name for i in seen]
    points = torch.cat(points)  # [N, d]
    if len(points) < 2:
        raise ValueError(f"{arguments.folder} has {len(points)} pictures that can be read; a scale needs at least 2")
    output = Path(arguments.output)
    ImageEmbeddings(embedder.cpu(), points.mean(0), points.std(0).clamp(min=1e-4)).save(output)
    write_weights({"embeddings": points}, output / "embeddings.safetensors")
    (output / NAMES).write_text(json.dumps(names), encoding="utf-8")
    print(f"{len(points)} embeddings of width {embedder.dim} are in {output}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of pictures, searched with all its subfolders")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--kind", default="open_clip", help="open_clip (default) or transformers")
    parser.add_argument("--name", required=True, help="architecture, hf-hub:OWNER/NAME, local-dir:FOLDER; or a folder")
    parser.add_argument("--pretrained", help="of an open_clip architecture: tag, file or random")
    parser.add_argument("--validation", type=float, default=0.02, help="share held out, as data.validation (0.02)")
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        embed(arguments)


if __name__ == "__main__":
    main()
