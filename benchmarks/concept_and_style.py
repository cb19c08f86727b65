"""Is what is drawn what was asked for, and in the style that was asked for? Judged by features of another network.

python benchmarks/concept_and_style.py --checkpoint checkpoints/emoji --data data/emoji --output docs/emoji

Each generated picture is compared with all training pictures: whether the nearest one has the style of the prompt, and
whether the concept of the prompt is among the five nearest concepts. Real pictures are judged alike, each without
itself. The Fréchet distance is that of Gaussians over the first 64 principal components of the real features, between
the generated pictures and the training pictures that they were asked to be; of real pictures, between two halves.
Pictures are kept in --pictures, which prompt_recall.py shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import efficientnet
from benchmarks.prompt_recall import add_options, prepare, read_pictures, stack
from benchmarks.recall_prompts import concept_of, read_metadata
from storage.config import one_line_errors
from storage.dataset import ImageDataset

NEAREST = 5  # concepts
COMPONENTS = 64  # of features, for the Fréchet distance


class Judge:
    """Training pictures by features, style and concept.

    Args:
        features: [N, d], of length 1.
        styles, concepts: of each.
    """

    def __init__(self, features: Tensor, styles: Sequence[str], concepts: Sequence[str]):
        self.features, self.styles, self.concepts = features, styles, concepts

    def score(self, features: Tensor, wanted: Sequence[int], alone: bool = False) -> dict[str, float]:
        """Shares of pictures [Q, d] that have the style and the concept of the training pictures `wanted`.

        With `alone` those pictures themselves are not among the ones compared with.
        """
        likeness = features @ self.features.T  # [Q, N]
        if alone:
            likeness[range(len(wanted)), wanted] = -2.0
        style = concept = first = 0
        for row, index in zip(likeness.argsort(dim=1, descending=True).tolist(), wanted, strict=True):
            style += self.styles[row[0]] == self.styles[index]
            nearest = list(dict.fromkeys(self.concepts[place] for place in row[:200]))[:NEAREST]
            concept += self.concepts[index] in nearest
            first += self.concepts[index] == nearest[0]
        count = len(wanted)
        return {"style": style / count, "concept_at_1": first / count, f"concept_at_{NEAREST}": concept / count}


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of Gaussians fitted to features [N, d] and [M, d] (Dowson & Landau 1982)."""
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(left)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + left.trace() + right.trace() - 2 * cross).item()


def components(features: Tensor, count: int) -> Tensor:
    """The first principal components of features [N, d]: [d, count]."""
    return torch.linalg.eigh(torch.cov(features.double().T)).eigenvectors.flip(1)[:, :count].to(features)


def measure(options: argparse.Namespace) -> dict:
    """All that is measured."""
    gallery, records, config = prepare(options)
    rows, network = read_metadata(options.data), efficientnet.load()
    dataset = ImageDataset(records.train, config.data)
    chunks = torch.arange(len(dataset)).split(256)
    features = torch.cat([efficientnet.embed(network, read_pictures(dataset, chunk.tolist())) for chunk in chunks])
    known = [rows[record.name] for record in records.train]
    judge = Judge(features, [str(row.get("style")) for row in known], [concept_of(row) for row in known])
    limit = min(options.limit, len(gallery.cases))
    wanted = [case.index for case in gallery.cases[:limit]]
    basis, real = components(features, COMPONENTS), features[wanted]
    halves = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).split(limit)[:2]
    found = {"real pictures": judge.score(real, wanted, alone=True)}
    found["real pictures"]["frechet"] = frechet(*(features[half] @ basis for half in halves))
    for kind in options.kinds:
        made = stack(gallery.make(kind, gallery.model.defaults.guidance_scale, range(limit)))
        drawn = efficientnet.embed(network, made)
        found[kind] = judge.score(drawn, wanted) | {"frechet": frechet(drawn @ basis, real @ basis)}
    return {"pictures": limit, "training_pictures": len(features), "rows": found}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
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
