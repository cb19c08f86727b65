"""Open what guides a model's sampling by gradients: a classifier of noisy latents, a CLIP.

`ldm.sampling.gradient_guides` has the guides themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from ldm.pipeline import TextToImage

GUIDES = ("classifier", "clip_guidance", "clip_pretrained")  # fields of `stipple.commands.drawing.open_model.Opening`


def open_guides(model: TextToImage, sources: Mapping[str, str]) -> None:
    """Add the gradient guides that `sources` names, by the names of GUIDES, to a model.

    Raises:
        FileNotFoundError, ValueError: for a guide that cannot be opened, or was trained on other latents.
    """
    if "clip_pretrained" in sources and "clip_guidance" not in sources:
        pretrained = sources["clip_pretrained"]
        raise ValueError(f"--clip-pretrained {pretrained} selects weights of --clip-guidance NAME; give both")
    if "classifier" in sources:
        _open_classifier(model, sources["classifier"])
    if "clip_guidance" in sources:
        _open_clip(model, sources["clip_guidance"], sources.get("clip_pretrained"))


def _open_classifier(model: TextToImage, path: str) -> None:
    from ldm.formats.classifier_folder import load_classifier
    from ldm.sampling.gradient_guides import ClassifierGuide

    classifier = load_classifier(path)
    if classifier.config.autoencoder != model.autoencoder.fingerprint():
        raise ValueError(f"classifier {path} reads latents of another autoencoder; train one on those of this model")
    model.gradient_guides["classifier_scale"] = ClassifierGuide(classifier.to(model.device))


def _open_clip(model: TextToImage, name: str, pretrained: str | None) -> None:
    from ldm.sampling.gradient_guides import ClipGuide
    from stipple_core.embedders import EmbedderConfig, build_embedder

    kind = "open_clip"
    if (Path(name) / "open_clip_config.json").is_file():
        name = f"local-dir:{name}"
    elif Path(name).is_dir():
        kind = "transformers"
    clip = build_embedder(EmbedderConfig(kind=kind, name=name, pretrained=pretrained)).to(model.device)
    decode = model.autoencoder.decode
    model.gradient_guides["clip_scale"] = ClipGuide(
        clip.images, clip.texts, lambda latents: decode(latents.to(model.dtype))
    )
