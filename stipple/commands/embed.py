"""Compute CLIP embeddings of a folder of images: a database for retrieval, and the statistics that a prior requires.

stipple embed --folder IMAGES --name ViT-L-14 --pretrained laion2b_s32b_b82k --output runs/embeddings

Use OUTPUT/embeddings.safetensors as `conditioner.retrieval.database`. OUTPUT/names.json lists the images, so that an
image that is trained on is not its own neighbor. Use OUTPUT as the `autoencoder` of unCLIP's prior, which is a model of
image embeddings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stipple.cli.argument_parser import Parser
from stipple_core.config import one_line_errors

BATCH = 32  # images that are embedded together


def embed(arguments: argparse.Namespace) -> None:
    """Write the embeddings of all training images, in the order of their names, and the encoder with its statistics."""
    import torch
    from tqdm import tqdm

    from autoencoder import ImageEmbeddings
    from conditioning.readers.retrieval import NAMES
    from stipple_core.data.dataset import ImageDataset
    from stipple_core.data.records.data_config import DataConfig
    from stipple_core.data.sources.scan import scan
    from stipple_core.embedders import EmbedderConfig, build_embedder
    from stipple_core.files.weights import write_weights

    config = EmbedderConfig(kind=arguments.kind, name=arguments.name, pretrained=arguments.pretrained)
    embedder = build_embedder(config, texts=False).to(arguments.device)
    size = embedder.config.network["size"]
    data = DataConfig(folder=arguments.folder, image_size=size, validation=arguments.validation, captions=[])
    images = ImageDataset(scan(data, captioned=False).train, data)
    embeddings, names = [], []
    with torch.no_grad():
        for first in tqdm(range(0, len(images), BATCH)):
            batch = {i: images.picture(i) for i in range(first, min(first + BATCH, len(images)))}
            readable = {i: image for i, image in batch.items() if image is not None}
            if readable:
                embeddings.append(embedder.images(torch.stack([*readable.values()]).to(arguments.device)).cpu())
                names += [images.records[i].name for i in readable]
    embeddings = torch.cat(embeddings)  # [N, d]
    if len(embeddings) < 2:
        raise ValueError(f"{arguments.folder} has {len(embeddings)} readable images; embeddings require at least 2")
    output, deviation = Path(arguments.output), embeddings.std(0).clamp(min=1e-4)
    ImageEmbeddings(embedder.cpu(), embeddings.mean(0), deviation).save(output)
    write_weights({"embeddings": embeddings}, output / "embeddings.safetensors")
    (output / NAMES).write_text(json.dumps(names), encoding="utf-8")
    print(f"{len(embeddings)} embeddings of width {embedder.dim} are in {output}")


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("embed", "--folder FOLDER --name NAME --output FOLDER [flags]", __doc__)
    first, others = parser.first, parser.add_argument_group("others")
    first.add_argument("--folder", required=True, help="folder of images, searched with all its subfolders")
    first.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    first.add_argument("--name", required=True, help="architecture, hf-hub:OWNER/NAME, local-dir:FOLDER, or a folder")
    first.add_argument("--pretrained", help="weights of an open_clip architecture: tag, file or random")
    parser.add_help_flag(first)
    others.add_argument("--kind", default="open_clip", help="open_clip (default) or transformers")
    others.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    others.add_argument(
        "--validation", type=float, default=0.02, help="share that is held out, as data.validation (default: 0.02)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after a user's mistake."""
    with one_line_errors():
        embed(make_parser().parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
