"""Frozen text encoders that others trained: any transformers text model, from a folder or the Hugging Face hub."""

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
from stipple_core.files.json_file import read_json
from stipple_core.files.weights import place, read_folder, require_fit

# Where a checkpoint holds more than a text encoder, or AutoModel would pick more: the class that is only that.
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
MODEL_FOLDERS = (("text_encoder", "tokenizer"), ("bert", "tokenizer"))  # in a model folder, and diffusers' for LDM
WEIGHTS = "model"  # the stem of transformers' weight files
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


class TransformersEncoder(nn.Module):
    """A transformers text model as ids and mask [B, L] -> last_hidden_state [B, L, d]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says, without the path it was read from."""
        config = json.loads(self.model.config.to_json_string())
        config["architectures"] = [type(self.model).__name__]
        return {key: value for key, value in config.items() if key != "_name_or_path"}

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, L, d]; mask True where a token counts, None where all do."""
        attended = None if mask is None else mask.long()
        return self.model(input_ids=ids, attention_mask=attended).last_hidden_state

    def weights(self) -> dict[str, Tensor]:
        """Parameters by the names that other programs know, tied ones once."""
        named, seen = {}, set()
        for name, weight in self.model.state_dict().items():
            if weight.data_ptr() not in seen:
                named[name] = weight
                seen.add(weight.data_ptr())
        if type(self.model).__name__ == "CLIPTextModel" and not any(name.startswith("text_model.") for name in named):
            return {f"text_model.{name}": weight for name, weight in named.items()}  # transformers 5 drops the prefix
        return named


def find_encoder(name: str, suffix: str = "") -> tuple[Path, Path]:
    """The encoder's and the tokenizer's folder for a local folder (flat, or in diffusers' layout) or a hub name.

    Args:
        suffix: in diffusers' layout, of the folders to be preferred: "_2" for the second of two encoders.

    Raises:
        FileNotFoundError: in one line, where the folder does not exist or the hub can't give it.
    """
    folder = Path(name).expanduser()
    for part, tokenizer in ((f"text_encoder{suffix}", f"tokenizer{suffix}"), *MODEL_FOLDERS):
        if (folder / part / "config.json").is_file():
            return folder / part, folder / tokenizer
    if folder.is_dir():
        return folder, folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 and Path(name).parent.name:
        raise FileNotFoundError(f"text encoder folder {name} does not exist; give one with config.json and weights")
    mend = f"`hf download {name} --local-dir FOLDER`, then give FOLDER as its name"
    folder = download(name, HUB_FILES, "text encoder", mend)
    if not list(folder.glob("*.safetensors")):
        folder = download(name, [*HUB_FILES, "*.bin"], "text encoder", mend)
    return folder, folder


def download(name: str, files: list[str], what: str, mend: str) -> Path:
    """A folder of the hub's files of a model that match `files`, cached by huggingface_hub.

    Raises:
        FileNotFoundError: in one line with the mend, where the hub can't give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, unknown, gated, malformed name: the hub's client has a class for each
        raise FileNotFoundError(
            f"{what} {name!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}); on a machine with a network run {mend}"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an encoder folder; FileNotFoundError or ValueError in one line."""
    path = folder / "config.json"
    config = read_json(path, f"{folder} is not a text encoder's folder: it has no config.json")
    if "model_type" not in config:
        raise ValueError(f"{path} names no model_type; it must be the config.json of a transformers text model")
    return config


def load_encoder(
    folder: Path, dtype: torch.dtype | None = None, drop_layers: int = 0, variant: str | None = None
) -> nn.Module:
    """Reads a text encoder from a local folder, as transformers or diffusers writes it.

    Args:
        folder: holds config.json and safetensors (or .bin, read with weights_only), in one file or in shards.
        dtype: of the weights in memory; None is float32, whatever the file holds.
        drop_layers: last layers left out. 1 is the penultimate layer with its final norm, as in Stable Diffusion 2;
            saved again it is a model of one layer less, as diffusers stores it.
        variant: "fp16" for model.fp16.safetensors; None takes the plain file, or the only variant there is.

    Raises:
        FileNotFoundError, ValueError: in one line naming the folder: weights absent, unreadable or unfit.
    """
    config, dtype = read_config(folder), dtype or torch.float32
    weights = read_folder(folder, WEIGHTS, variant)
    if (own := own_kind(config)) is None:
        return _load_transformers(folder, config, weights, dtype, drop_layers)
    try:
        config = own.config(config)
        layers = config[own.layers] - drop_layers
        module = own.empty({**config, own.layers: layers})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no text encoder: {type(error).__name__} {error}"
        ) from None
    kept = {name: weight.to(dtype) for name, weight in own.select(weights, layers).items()}
    place(module, kept, f"the text encoder in {folder}")
    return module


@dataclass(frozen=True, kw_only=True)
class OwnKind:
    """An encoder that we compute ourselves."""

    config: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> the same with defaults
    layers: str  # the option that counts layers
    empty: Callable[[dict[str, Any]], nn.Module]  # a module on "meta"
    select: Callable[[dict[str, Tensor], int], dict[str, Tensor]]  # the encoder's own weights of so many layers


def own_kind(config: dict[str, Any]) -> OwnKind | None:
    """How we compute what a config.json describes; None where transformers has to."""
    if is_plain_bert(config):
        return OwnKind(config=bert_config, layers="num_hidden_layers", empty=empty_bert, select=bert_weights)
    if is_plain_clip(config):
        select = partial(clip_weights, projection=projects(config))
        return OwnKind(config=clip_config, layers="num_hidden_layers", empty=empty_clip, select=select)
    if config["model_type"] == LDM_BERT:
        return OwnKind(config=ldm_bert_config, layers="encoder_layers", empty=empty_ldm_bert, select=ldm_bert_weights)
    if config["model_type"] == BOXES:
        return OwnKind(config=boxes_config, layers=HIDDEN, empty=empty_boxes, select=lambda weights, layers: weights)
    return None


def _load_transformers(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, drop_layers: int
) -> nn.Module:
    import transformers

    wanted = TEXT_MODELS.get(config["model_type"], "AutoModel")
    if config["model_type"].startswith("clip") and projects(config):
        wanted = "CLIPTextModelWithProjection"
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if getattr(settings, "text_config", None) is not None:
            settings = settings.text_config
        if wanted == "AutoModel" and getattr(settings, "is_encoder_decoder", False):
            raise ValueError(f"{config['model_type']} is an encoder-decoder; of those only the T5 family is known")
        if drop_layers:
            settings.num_hidden_layers -= drop_layers
        model_class = getattr(transformers, wanted)
        if wanted == "AutoModel":
            model_class = transformers.MODEL_MAPPING[type(settings)]
        with quiet():
            model, report = model_class.from_pretrained(
                None,
                config=settings,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except Exception as error:  # unknown model_type, options that contradict each other: each class has its own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the text encoder in {folder} can't be loaded: {reason}") from None
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"]) if not key.startswith("pooler.")]
    wrong += [f"{key} is {list(found)}, not {list(own)}" for key, found, own in sorted(report["mismatched_keys"])]
    require_fit(wrong, f"the text encoder in {folder}")
    return TransformersEncoder(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports; what matters is raised instead."""
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
