"""Frozen text encoders that others trained: any transformers text model, from a folder or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.bert import bert_weights, empty_bert, is_plain_bert

# Where a checkpoint holds more than a text encoder, or AutoModel would pick more: the class that is only that.
TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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


def find_encoder(name: str) -> tuple[Path, Path]:
    """The encoder's and the tokenizer's folder for a local folder (flat, or in diffusers' layout) or a hub name.

    Raises:
        FileNotFoundError: in one line, where the folder does not exist or the hub can't give it.
    """
    folder = Path(name).expanduser()
    if (folder / "text_encoder" / "config.json").is_file():
        return folder / "text_encoder", folder / "tokenizer"
    if folder.is_dir():
        return folder, folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 and Path(name).parent.name:
        raise FileNotFoundError(f"text encoder folder {name} does not exist; give one with config.json and weights")
    return (_download(name),) * 2


def _download(name: str) -> Path:
    """The hub's files of a model, cached by huggingface_hub."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
        if not any((folder / file).is_file() for file in WEIGHT_FILES[:2]):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"], ignore_patterns=["*/*"]))
    except Exception as error:  # offline, unknown, gated, malformed name: the hub's client has a class for each
        raise FileNotFoundError(
            f"text encoder {name!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}); on a machine with a network run `hf download {name} --local-dir FOLDER`, "
            "then give FOLDER as its name"
        ) from None
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an encoder folder; FileNotFoundError or ValueError in one line."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a text encoder's folder: it has no config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} names no model_type; it must be the config.json of a transformers text model")
    return config


def load_encoder(folder: Path, dtype: torch.dtype | None = None, drop_layers: int = 0) -> nn.Module:
    """Reads a transformers text encoder from a local folder.

    Args:
        folder: holds config.json and safetensors (or .bin, read with weights_only).
        dtype: of the weights in memory; None is float32, whatever the file holds.
        drop_layers: last layers left out. 1 is the penultimate layer with its final norm, as in Stable Diffusion 2;
            saved again it is a model of one layer less, as diffusers stores it.

    Raises:
        FileNotFoundError, ValueError: in one line naming the folder: weights absent, unreadable or unfit.
    """
    config = read_config(folder)
    require_weights(folder)
    try:
        if is_plain_bert(config):
            return _load_bert(folder, config, dtype or torch.float32, drop_layers)
        return _load_transformers(folder, config, dtype or torch.float32, drop_layers)
    except Exception as error:  # truncated safetensors, pickles, shapes, unknown model_type: each library has its own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the text encoder in {folder} can't be loaded: {reason}") from None


def require_weights(folder: Path) -> None:
    """FileNotFoundError where a folder holds none of the files that weights are kept in."""
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise FileNotFoundError(f"{folder} has a config.json but no weights; it needs {' or '.join(WEIGHT_FILES[::2])}")


def _load_bert(folder: Path, config: dict[str, Any], dtype: torch.dtype, drop_layers: int) -> nn.Module:
    layers = config["num_hidden_layers"] - drop_layers
    config = {k: v for k, v in config.items() if k != "_name_or_path"}
    bert = empty_bert({**config, "architectures": ["BertModel"], "num_hidden_layers": layers})
    weights = {name: w.to(dtype) for name, w in bert_weights(read_weights(folder), layers).items()}
    bert.load_state_dict(weights, strict=True, assign=True)
    return bert


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight file or of the files its index names."""
    from safetensors.torch import load_file

    file = next(name for name in WEIGHT_FILES if (folder / name).is_file())
    parts = [file]
    if file.endswith(".index.json"):
        parts = sorted(set(json.loads((folder / file).read_text("utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for part in parts:
        path = folder / part
        weights |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    return weights


def _load_transformers(folder: Path, config: dict[str, Any], dtype: torch.dtype, drop_layers: int) -> nn.Module:
    import transformers

    wanted = TEXT_MODELS.get(config["model_type"], "AutoModel")
    if config["model_type"].startswith("clip") and config.get("architectures") == ["CLIPTextModelWithProjection"]:
        wanted = "CLIPTextModelWithProjection"
    model_class = getattr(transformers, wanted)
    settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if getattr(settings, "text_config", None) is not None:
        settings = settings.text_config
    if wanted == "AutoModel" and getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"{config['model_type']} is an encoder-decoder; of those only the T5 family is known")
    if drop_layers:
        settings.num_hidden_layers -= drop_layers
    with quiet():
        model, report = model_class.from_pretrained(
            str(folder), config=settings, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise ValueError(f"weights absent {missing[:5]}, misshapen {sorted(map(str, report['mismatched_keys']))[:5]}")
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
