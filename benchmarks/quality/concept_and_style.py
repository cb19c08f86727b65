"""Whether generated pictures have the concept and the style of their prompts, by features of another network.

python -m benchmarks.quality.concept_and_style --checkpoint checkpoints/emoji --data data/emoji --output docs/emoji

Each generated picture is compared with all training pictures: whether the nearest one has the style of the prompt, and
whether the concept of the prompt is among the five nearest concepts. Real pictures are measured in the same way, each
without itself. The Fréchet distance is between Gaussians over the first 64 principal components of the real features:
of the generated pictures and of the training pictures of their prompts; for real pictures, of two halves. Pictures are
written to --pictures, the same folder as that of prompt_recall.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality import efficientnet
from benchmarks.quality.prompt_recall import add_options, prepare, read_pictures, stack
from benchmarks.quality.recall_prompts import concept_of, read_metadata
from stipple_core.config import one_line_errors
from stipple_core.data.dataset import ImageDataset

NEAREST = 5  # concepts
COMPONENTS = 64  # of features, for the Fréchet distance


class Comparison:
    """Compares pictures with N training pictures by their features.

    Args:
        features: of the training pictures, [N, d], of length 1.
        styles, concepts: of the training pictures.
    """

    def __init__(self, features: Tensor, styles: Sequence[str], concepts: Sequence[str]):
        self.features, self.styles, self.concepts = features, styles, concepts

    def score(self, features: Tensor, targets: Sequence[int], exclude_targets: bool = False) -> dict[str, float]:
        """Return the fractions of pictures that have the style and the concept of their target.

        Args:
            features: of the pictures, [Q, d], of length 1.
            targets: the index of a training picture for each.
            exclude_targets: do not compare a picture with its target, such as a training picture with itself.
        """
        similarity = features @ self.features.T  # [Q, N]
        if exclude_targets:
            similarity[range(len(targets)), targets] = -2.0
        style = concept = first = 0
        for row, index in zip(similarity.argsort(dim=1, descending=True).tolist(), targets, strict=True):
            style += self.styles[row[0]] == self.styles[index]
            nearest = list(dict.fromkeys(self.concepts[place] for place in row[:200]))[:NEAREST]
            concept += self.concepts[index] in nearest
            first += self.concepts[index] == nearest[0]
        count = len(targets)
        return {"style": style / count, "concept_at_1": first / count, f"concept_at_{NEAREST}": concept / count}


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features [N, d] and [M, d] (Dowson & Landau 1982)."""
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(left)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + left.trace() + right.trace() - 2 * cross).item()


def components(features: Tensor, count: int) -> Tensor:
    """Return the first principal components of features [N, d]: [d, count]."""
    return torch.linalg.eigh(torch.cov(features.double().T)).eigenvectors.flip(1)[:, :count].to(features)


def measure(options: argparse.Namespace) -> dict:
    """Measure real pictures, and pictures of each kind of prompt."""
    gallery, records, config = prepare(options)
    rows, network = read_metadata(options.data), efficientnet.load()
    dataset = ImageDataset(records.train, config.data)
    chunks = torch.arange(len(dataset)).split(256)
    features = torch.cat([efficientnet.embed(network, read_pictures(dataset, chunk.tolist())) for chunk in chunks])
    training = [rows[record.name] for record in records.train]
    styles, concepts = [str(row.get("style")) for row in training], [concept_of(row) for row in training]
    comparison = Comparison(features, styles, concepts)
    limit = min(options.limit, len(gallery.cases))
    targets = [case.index for case in gallery.cases[:limit]]
    basis, real = components(features, COMPONENTS), features[targets]
    halves = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).split(limit)[:2]
    scores = {"real pictures": comparison.score(real, targets, exclude_targets=True)}
    scores["real pictures"]["frechet"] = frechet(*(features[half] @ basis for half in halves))
    for kind in options.kinds:
        images = stack(gallery.make(kind, gallery.model.defaults.guidance_scale, range(limit)))
        drawn = efficientnet.embed(network, images)
        scores[kind] = comparison.score(drawn, targets) | {"frechet": frechet(drawn @ basis, real @ basis)}
    return {"pictures": limit, "training_pictures": len(features), "rows": scores}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = add_options(parser).parse_args(argv)
    with one_line_errors():
        results = measure(options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "concept_and_style.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, row in results["rows"].items():
        print(name, ", ".join(f"{measure} {value:.3f}" for measure, value in row.items()))


if __name__ == "__main__":
    main()
