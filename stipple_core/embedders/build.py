"""Where embedders come from: open_clip and transformers, and what model folders keep of them."""

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

VOCABULARY = 49408  # of the byte pairs that CLIPs share
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SETTINGS = "open_clip_config.json"


def build_embedder(config: EmbedderConfig, sees: bool = True, reads: bool = True) -> Embedder:
    """The embedder that a config names, or, where the config has the network's shape, one with random weights.

    Args:
        sees: pictures are to be embedded.
        reads: texts are.

    Raises:
        ValueError, FileNotFoundError: in one line, for what the library does not know or can't fetch.
    """
    if config.network is None and not config.name:
        raise ValueError("an embedder needs `name`: an open_clip architecture, or a folder or hub name of a CLIP")
    try:
        with torch.device("cpu"), _hushed():  # also where a model is laid out on "meta": masks are made when built
            network, visual, text = SOURCES[config.kind](config, sees, reads)
    except Exception as error:  # the hub's, torch's and the libraries' own classes
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{config.kind} {config.name!r} with pretrained {config.pretrained!r} can't be loaded: "
            f"{type(error).__name__}: {reason}; offline, give a downloaded folder or file"
        ) from None
    if reads and network["vocabulary"] != VOCABULARY:
        raise ValueError(
            f"{config.name} has a tokenizer of its own, and texts are embedded by CLIP's alone; take a CLIP"
        )
    return Embedder(replace(config, network=network), visual if sees else None, text if reads else None)


class TextTower(nn.Module):
    """The half of an open_clip.CLIP that reads: ids [B, L] -> [B, d]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class Projected(nn.Module):
    """A tower of transformers with its projection: its input -> [B, d]."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.output)


def _open_clip(config: EmbedderConfig, sees: bool, reads: bool) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    """The shape of an open_clip model and its two towers."""
    import open_clip

    if config.network is None:
        weights = None if config.pretrained == "random" else config.pretrained
        if ":" not in config.name and not config.pretrained:
            raise ValueError("it needs `pretrained`: a tag, a file or random")
        model, shape = open_clip.create_model(config.name, pretrained=weights), _shape(config.name)
    else:
        shape = config.network["shape"]
        with tempfile.TemporaryDirectory() as folder:
            seen = {name: config.network[name] for name in ("mean", "std")}
            (Path(folder) / SETTINGS).write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": seen}))
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    seen, text = model.visual.preprocess_cfg, shape["text_cfg"]
    size = seen["size"] if isinstance(seen["size"], int) else seen["size"][0]
    network = {
        "dim": shape["embed_dim"],
        "context_length": text.get("context_length", 77),
        "vocabulary": None if text.get("hf_tokenizer_name") else text.get("vocab_size", VOCABULARY),
        **{"size": size, "mean": list(seen["mean"]), "std": list(seen["std"]), "shape": shape},
    }
    visual = model.visual
    return network, visual, TextTower(model)


def _shape(name: str) -> dict[str, Any]:
    """open_clip's own config of a model."""
    import open_clip
    from open_clip.factory import _get_hf_config

    if name.startswith("local-dir:"):
        return json.loads((Path(name.removeprefix("local-dir:")) / SETTINGS).read_text("utf-8"))["model_cfg"]
    if name.startswith("hf-hub:"):
        return _get_hf_config(name.removeprefix("hf-hub:"))["model_cfg"]
    return open_clip.get_model_config(name)


def _transformers(config: EmbedderConfig, sees: bool, reads: bool) -> tuple[dict[str, Any], Any, Any]:
    """The shape of a CLIP of transformers and those of its towers that are wanted."""
    from transformers import AutoConfig, CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig
    from transformers import CLIPVisionModelWithProjection as VisionModel

    if config.network is None:
        whole = AutoConfig.from_pretrained(config.name)
        vision, text = (getattr(whole, f"{part}_config", whole) for part in ("vision", "text"))
        visual = VisionModel.from_pretrained(config.name) if sees else None
        reader = CLIPTextModelWithProjection.from_pretrained(config.name) if reads else None
    else:
        vision = CLIPVisionConfig.from_dict(config.network["vision"])
        text = CLIPTextConfig.from_dict(config.network["text"])
        visual = VisionModel(vision) if sees else None
        reader = CLIPTextModelWithProjection(text) if reads else None
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
def _hushed() -> Iterator[None]:
    """Without the libraries' remarks, such as that random weights are random."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
