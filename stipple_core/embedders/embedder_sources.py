"""Building embedders: from open_clip or transformers, or from the config in a model folder."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stipple_core.embedders.embedder import Embedder, EmbedderConfig
from stipple_core.files.json_file import read_json

VOCABULARY = 49408  # size of the byte-pair vocabulary that CLIP models share
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SETTINGS = "open_clip_config.json"


def build_embedder(config: EmbedderConfig, images: bool = True, texts: bool = True) -> Embedder:
    """Build the pretrained embedder that a config names; with `config.network`, build one with random weights.

    Args:
        config: which model.
        images: whether to build the image encoder.
        texts: whether to build the text encoder.

    Raises:
        ValueError: the config has no name, or the model has its own tokenizer.
        FileNotFoundError: the library does not have the model or can't download it.
    """
    if config.network is None and not config.name:
        raise ValueError("an embedder needs `name`: an open_clip architecture, or a folder or hub name of a CLIP")
    try:
        with torch.device("cpu"), _quiet():  # never on "meta": constant masks are computed when the model is built
            network, visual, text = SOURCES[config.kind](config, images, texts)
    except Exception as error:  # errors of the hub, torch and the libraries
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{config.kind} {config.name!r} with pretrained {config.pretrained!r} can't be loaded: "
            f"{type(error).__name__}: {reason}; if you are offline, use a downloaded folder or file"
        ) from None
    if texts and network["vocabulary"] != VOCABULARY:
        raise ValueError(
            f"{config.name} has its own tokenizer, and only CLIP's tokenizer is supported; use a CLIP model"
        )
    return Embedder(replace(config, network=network), visual if images else None, text if texts else None)


class TextTower(nn.Module):
    """The text encoder of an open_clip.CLIP: ids [B, L] -> [B, d]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class Projected(nn.Module):
    """An encoder of transformers with its projection: input -> [B, d]."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.output)


def _open_clip(config: EmbedderConfig, images: bool, texts: bool) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    """The shape of an open_clip model, and its two encoders."""
    import open_clip

    if config.network is None:
        weights = None if config.pretrained == "random" else config.pretrained
        if ":" not in config.name and not config.pretrained:
            raise ValueError("it needs `pretrained`: a tag, a file or random")
        model, shape = open_clip.create_model(config.name, pretrained=weights), _shape(config.name)
    else:
        shape = config.network["shape"]
        with tempfile.TemporaryDirectory() as folder:
            preprocessing = {name: config.network[name] for name in ("mean", "std")}
            (Path(folder) / SETTINGS).write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": preprocessing}))
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    preprocessing, text = model.visual.preprocess_cfg, shape["text_cfg"]
    size = preprocessing["size"] if isinstance(preprocessing["size"], int) else preprocessing["size"][0]
    network = {
        "dim": shape["embed_dim"],
        "context_length": text.get("context_length", 77),
        "vocabulary": None if text.get("hf_tokenizer_name") else text.get("vocab_size", VOCABULARY),
        **{"size": size, "mean": list(preprocessing["mean"]), "std": list(preprocessing["std"]), "shape": shape},
    }
    visual = model.visual
    return network, visual, TextTower(model)


def _shape(name: str) -> dict[str, Any]:
    """open_clip's config of a model."""
    import open_clip
    from open_clip.factory import _get_hf_config

    if name.startswith("local-dir:"):
        return read_json(Path(name.removeprefix("local-dir:")) / SETTINGS)["model_cfg"]
    if name.startswith("hf-hub:"):
        return _get_hf_config(name.removeprefix("hf-hub:"))["model_cfg"]
    return open_clip.get_model_config(name)


def _transformers(config: EmbedderConfig, images: bool, texts: bool) -> tuple[dict[str, Any], Any, Any]:
    """The shape of a CLIP model of transformers, and the requested ones of its two encoders."""
    from transformers import AutoConfig, CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig
    from transformers import CLIPVisionModelWithProjection as VisionModel

    if config.network is None:
        whole = AutoConfig.from_pretrained(config.name)
        vision, text = (getattr(whole, f"{part}_config", whole) for part in ("vision", "text"))
        visual = VisionModel.from_pretrained(config.name) if images else None
        reader = CLIPTextModelWithProjection.from_pretrained(config.name) if texts else None
    else:
        vision = CLIPVisionConfig.from_dict(config.network["vision"])
        text = CLIPTextConfig.from_dict(config.network["text"])
        visual = VisionModel(vision) if images else None
        reader = CLIPTextModelWithProjection(text) if texts else None
    network = {
        "dim": vision.projection_dim,
        "context_length": getattr(text, "max_position_embeddings", 77),
        "vocabulary": getattr(text, "vocab_size", None),
        **{"size": getattr(vision, "image_size", 224), "mean": OPENAI_MEAN, "std": OPENAI_STD},
        **{"vision": json.loads(vision.to_json_string()), "text": json.loads(text.to_json_string())},
    }
    return network, visual and Projected(visual, "image_embeds"), reader and Projected(reader, "text_embeds")


SOURCES = {"open_clip": _open_clip, "transformers": _transformers}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings, such as that weights are random."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
