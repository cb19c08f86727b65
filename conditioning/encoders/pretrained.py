"""Pretrained text encoders: any text model of transformers, from a folder or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.encoders.bert import bert_config, bert_weights, empty_bert, is_plain_bert
from conditioning.encoders.boxes import HIDDEN, boxes_config, empty_boxes
from conditioning.encoders.boxes import MODEL_TYPE as BOXES
from conditioning.encoders.clip import clip_config, clip_weights, empty_clip, is_plain_clip, projects
from conditioning.encoders.ldm_bert import MODEL_TYPE as LDM_BERT
from conditioning.encoders.ldm_bert import empty_ldm_bert, ldm_bert_config, ldm_bert_weights
from stipple_core.files.hub_download import download
from stipple_core.files.json_file import read_json
from stipple_core.files.weights import place, read_folder, require_fit

# Classes of text encoders, for checkpoints of which AutoModel would load more than the text encoder.
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
MODEL_FOLDERS = (("text_encoder", "tokenizer"), ("bert", "tokenizer"))  # the second: diffusers' folders of LDM
WEIGHTS = "model"  # stem of the names of transformers' weight files
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


class TransformersEncoder(nn.Module):
    """Wrapper of a text model of transformers: ids and mask [B, L] -> last_hidden_state [B, L, d]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json, without the path of the file."""
        config = json.loads(self.model.config.to_json_string())
        config["architectures"] = [type(self.model).__name__]
        return {key: value for key, value in config.items() if key != "_name_or_path"}

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, d]; the mask is True for tokens to attend to, None for all."""
        attended = None if mask is None else mask.long()
        return self.model(input_ids=ids, attention_mask=attended).last_hidden_state

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under transformers' names; tied parameters appear once."""
        named, seen = {}, set()
        for name, weight in self.model.state_dict().items():
            if weight.data_ptr() not in seen:
                named[name] = weight
                seen.add(weight.data_ptr())
        if type(self.model).__name__ == "CLIPTextModel" and not any(name.startswith("text_model.") for name in named):
            return {f"text_model.{name}": weight for name, weight in named.items()}  # transformers 5 omits the prefix
        return named


def find_encoder(name: str, suffix: str = "") -> tuple[Path, Path]:
    """Return the folders of the encoder and of the tokenizer for a local folder or a hub name.

    Args:
        name: A flat folder, a model folder in diffusers' layout, or a name on the Hugging Face hub.
        suffix: In diffusers' layout, suffix of the preferred folders: "_2" for the second of two encoders.

    Raises:
        FileNotFoundError: In one line, if the folder does not exist or the download fails.
    """
    folder = Path(name).expanduser()
    for part, tokenizer in ((f"text_encoder{suffix}", f"tokenizer{suffix}"), *MODEL_FOLDERS):
        if (folder / part / "config.json").is_file():
            return folder / part, folder / tokenizer
    if folder.is_dir():
        return folder, folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 and Path(name).parent.name:
        raise FileNotFoundError(f"text encoder folder {name} does not exist; use one with config.json and weights")
    fix = f"`hf download {name} --local-dir FOLDER`, then use FOLDER as its name"
    folder = download(name, HUB_FILES, "text encoder", fix)
    if not list(folder.glob("*.safetensors")):
        folder = download(name, [*HUB_FILES, "*.bin"], "text encoder", fix)
    return folder, folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of an encoder folder. Raises FileNotFoundError or ValueError, in one line."""
    path = folder / "config.json"
    config = read_json(path, f"{folder} is not the folder of a text encoder: it has no config.json")
    if "model_type" not in config:
        raise ValueError(f"{path} has no model_type; use the config.json of a text model of transformers")
    return config


def load_encoder(
    folder: Path, dtype: torch.dtype | None = None, drop_layers: int = 0, variant: str | None = None
) -> nn.Module:
    """Load a text encoder from a local folder that transformers or diffusers wrote.

    Args:
        folder: Contains config.json and weights: safetensors, or .bin (read with weights_only), in one or more files.
        dtype: Dtype of the weights in memory; None is float32, independent of the file.
        drop_layers: Number of layers to remove at the end. 1 selects the penultimate layer followed by the final
            norm, as in Stable Diffusion 2; the encoder is saved with one layer less, as in diffusers.
        variant: "fp16" for model.fp16.safetensors; None is the plain file, or the only variant.

    Raises:
        FileNotFoundError, ValueError: In one line, if weights are missing, unreadable or do not fit.
    """
    config, dtype = read_config(folder), dtype or torch.float32
    weights = read_folder(folder, WEIGHTS, variant)
    if (kind := native_kind(config)) is None:
        return _load_transformers(folder, config, weights, dtype, drop_layers)
    try:
        config = kind.config(config)
        layers = config[kind.layers] - drop_layers
        module = kind.empty({**config, kind.layers: layers})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} does not describe a text encoder: {type(error).__name__} {error}"
        ) from None
    selected = {name: weight.to(dtype) for name, weight in kind.select(weights, layers).items()}
    place(module, selected, f"the text encoder in {folder}")
    return module


@dataclass(frozen=True, kw_only=True)
class NativeKind:
    """A kind of encoder that Stipple implements, without transformers."""

    config: Callable[[dict[str, Any]], dict[str, Any]]  # adds the defaults to a config.json
    layers: str  # key of the number of layers
    empty: Callable[[dict[str, Any]], nn.Module]  # config -> module on "meta"
    select: Callable[[dict[str, Tensor], int], dict[str, Tensor]]  # weights of the encoder's first layers


def native_kind(config: dict[str, Any]) -> NativeKind | None:
    """Return the kind of encoder that a config.json describes; None if only transformers implements it."""
    if is_plain_bert(config):
        return NativeKind(config=bert_config, layers="num_hidden_layers", empty=empty_bert, select=bert_weights)
    if is_plain_clip(config):
        select = partial(clip_weights, projection=projects(config))
        return NativeKind(config=clip_config, layers="num_hidden_layers", empty=empty_clip, select=select)
    if config["model_type"] == LDM_BERT:
        return NativeKind(
            config=ldm_bert_config, layers="encoder_layers", empty=empty_ldm_bert, select=ldm_bert_weights
        )
    if config["model_type"] == BOXES:
        return NativeKind(config=boxes_config, layers=HIDDEN, empty=empty_boxes, select=lambda weights, layers: weights)
    return None


def _load_transformers(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, drop_layers: int
) -> nn.Module:
    import transformers

    name = TEXT_MODELS.get(config["model_type"], "AutoModel")
    if config["model_type"].startswith("clip") and projects(config):
        name = "CLIPTextModelWithProjection"
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if getattr(settings, "text_config", None) is not None:
            settings = settings.text_config
        if name == "AutoModel" and getattr(settings, "is_encoder_decoder", False):
            raise ValueError(f"{config['model_type']} is an encoder-decoder; only those of the T5 family are supported")
        if drop_layers:
            settings.num_hidden_layers -= drop_layers
        model_class = getattr(transformers, name)
        if name == "AutoModel":
            model_class = transformers.MODEL_MAPPING[type(settings)]
        with quiet():
            model, report = model_class.from_pretrained(
                None,
                config=settings,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # raises below, with the names
            )
    except Exception as error:  # unknown model types and contradictory options raise various classes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the text encoder in {folder} can't be loaded: {reason}") from None
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"]) if not key.startswith("pooler.")]
    wrong += [f"{key} is {list(a)}, not {list(b)}" for key, a, b in sorted(report["mismatched_keys"])]
    require_fit(wrong, f"the text encoder in {folder}")
    return TransformersEncoder(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and load reports; this module raises errors instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
