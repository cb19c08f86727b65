"""What leads a model's pictures by a gradient, opened: a classifier of noisy latents, a CLIP (see `ldm.sampling.gradient_guides`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from ldm.pipeline import TextToImage

LEADING = ("classifier", "clip_guidance", "clip_pretrained")  # fields of `stipple.commands.drawing.open_model.Opening`


def guide(model: TextToImage, said: Mapping[str, str]) -> None:
    """Give a model the leads that are said, by the names of LEADING.

    Raises:
        FileNotFoundError, ValueError: in one line, for what can't be opened or reads other latents than the model's.
    """
    if "clip_pretrained" in said and "clip_guidance" not in said:
        raise ValueError(f"--clip-pretrained {said['clip_pretrained']} says which weights of --clip-guidance NAME")
    if "classifier" in said:
        _guide_by_classifier(model, said["classifier"])
    if "clip_guidance" in said:
        _guide_by_clip(model, said["clip_guidance"], said.get("clip_pretrained"))


def _guide_by_classifier(model: TextToImage, path: str) -> None:
    from ldm.formats.classifier_folder import load_classifier
    from ldm.sampling.gradient_guides import ClassifierGuide

    classifier = load_classifier(path)
    if classifier.config.autoencoder != model.autoencoder.fingerprint():
        raise ValueError(f"classifier {path} reads latents of another autoencoder; train one on those of this model")
    model.gradient_guides["classifier_scale"] = ClassifierGuide(classifier.to(model.device))


def _guide_by_clip(model: TextToImage, name: str, pretrained: str | None) -> None:
    from ldm.sampling.gradient_guides import ClipGuide
    from stipple_core.embedders import EmbedderConfig, build_embedder

    kind = "open_clip"
    if Path(name).is_dir():
        kind, name = ("open_clip", f"local-dir:{name}") if _is_open_clip(name) else ("transformers", name)
    clip = build_embedder(EmbedderConfig(kind=kind, name=name, pretrained=pretrained)).to(model.device)
    decode = model.autoencoder.decode
    model.gradient_guides["clip_scale"] = ClipGuide(
        clip.images, clip.texts, lambda latents: decode(latents.to(model.dtype))
    )


def _is_open_clip(folder: str) -> bool:
    return (Path(folder) / "open_clip_config.json").is_file()
