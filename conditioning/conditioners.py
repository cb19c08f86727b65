"""Functions that build the conditioner of a config, and that load the one in a model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from conditioning.classes.class_conditioner import MODEL_TYPE as CLASSES
from conditioning.classes.class_conditioner import (
    ClassConditioner,
    Unconditional,
    is_unconditional,
    load_classes,
    new_classes,
)
from conditioning.classes.class_names import ClassConfig
from conditioning.encoders.boxes import MODEL_TYPE as BOXES
from conditioning.encoders.ldm_bert import MODEL_TYPE as LDM_BERT
from conditioning.encoders.open_clip_text import MODEL_TYPE as OPEN_CLIP
from conditioning.encoders.open_clip_text import build_open_clip, load_open_clip
from conditioning.encoders.pretrained import find_encoder, load_encoder, read_config
from conditioning.encoders.scratch import TransformerConfig, random_transformer, train_tokenizer
from conditioning.hints.hints import SpatialConfig
from conditioning.interface.conditioner import Conditioner, PromptConditioner
from conditioning.layouts.layout_tokenizer import LayoutConfig, new_layouts, read_layout_tokenizer
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.frame import FrameConfig
from conditioning.readers.image_embedding import ImageEmbeddingConfig
from conditioning.readers.registry import build_readers, load_readers
from conditioning.readers.retrieval import RetrievalConfig
from conditioning.readers.text_embedding import TextEmbeddingConfig
from conditioning.text.text_conditioner import TextConditioner
from conditioning.text.two_encoders import SUFFIX, SecondEncoderConfig, TwoEncoders
from conditioning.tokenizers.tokenizer import read_tokenizer

ENCODERS = ("text_encoder", "bert")  # folders of a model; diffusers' LDMTextToImagePipeline uses the second
LAYERS = {"last": 0, "penultimate": 1}  # name -> number of layers removed at the end
NAMING = ("class", "layout")  # kinds whose classes are named by captions
UNMASKED = ("clip", "clip_text_model", OPEN_CLIP, LDM_BERT, BOXES)  # model types that were trained without a mask


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """What the model is conditioned on; sections that are null are not read."""

    kind: str = "transformers"  # a key of KINDS: transformers | open_clip | scratch | class | layout | unconditional
    name: str = ""  # folder or hub name of a transformers model; open_clip architecture; unused for scratch
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    max_length: int | None = None  # tokens per prompt; None: the encoder's limit, at most 77
    use_mask: bool | None = None  # hide padding; None: no for CLIP (as Stable Diffusion), yes for all others
    layer: str = "last"  # last | penultimate
    final_norm: bool = True  # open_clip only: apply the final norm to the chosen layer
    scratch: TransformerConfig = field(default_factory=TransformerConfig)  # scratch only: size of the transformer
    classes: ClassConfig = field(default_factory=ClassConfig)  # class only: table of classes
    layout: LayoutConfig = field(default_factory=LayoutConfig)  # layout only: encoder of boxes
    second: SecondEncoderConfig | None = None  # second text encoder, as in SDXL
    spatial: SpatialConfig | None = None  # dense image: a map, or an image to inpaint or to enlarge
    frame: FrameConfig | None = None  # image size and crop
    image: ImageEmbeddingConfig | None = None  # embedding of an image
    text: TextEmbeddingConfig | None = None  # embedding of the prompt, in the space of image embeddings
    retrieval: RetrievalConfig | None = None  # embeddings of similar images


def load_conditioner(
    model_folder: str | Path, dtype: torch.dtype | None = None, trainable: bool = False, variant: str | None = None
) -> Conditioner:
    """Load text_encoder/ (bert/ for diffusers' LDMTextToImagePipeline), tokenizer/ and conditioner/, without network.

    Args:
        dtype: Dtype of the weights in memory; None is float32, independent of the file.
        trainable: Whether the conditioner of prompts is trainable.
        variant: "fp16" for model.fp16.safetensors; None is the plain file, or the only variant.

    Raises:
        FileNotFoundError, ValueError: In one line, if files are missing or do not fit.
    """
    prompts = _load_prompts(Path(model_folder), dtype, trainable, variant)
    readers = load_readers(model_folder, dtype)
    return CombinedConditioner(prompts, readers) if readers else prompts


def _load_prompts(folder: Path, dtype: torch.dtype | None, trainable: bool, variant: str | None) -> PromptConditioner:
    encoder = next((folder / name for name in ENCODERS if (folder / name).is_dir()), None)
    if encoder is None and is_unconditional(folder):
        return Unconditional()
    encoder = encoder or folder / ENCODERS[0]
    if read_config(encoder)["model_type"] == CLASSES:
        return load_classes(encoder, dtype, trainable, variant)
    first = _assemble(encoder, folder / "tokenizer", ConditionerConfig(), dtype, trainable, variant)
    second = folder / f"text_encoder{SUFFIX}"
    if not second.is_dir():
        return first
    tokenizer = folder / f"tokenizer{SUFFIX}"
    return TwoEncoders(first, _assemble(second, tokenizer, ConditionerConfig(), dtype, trainable, variant))


def build_conditioner(
    config: ConditionerConfig, captions: Iterable[str] | None = None, *, seed: int = 0, held_out: Iterable[str] = ()
) -> Conditioner:
    """Build the conditioner that a config describes.

    Args:
        captions: Captions of the training set; "scratch" trains its tokenizer on them, and class names come from them.
        seed: Seed of all new weights.
        held_out: Captions of the validation set; their class names must be known too.

    Raises:
        ValueError, FileNotFoundError: In one line, if an option is invalid or a file is missing.
    """
    if config.kind in NAMING:
        captions = [*(captions or ()), *held_out]
    prompts, readers = _build_prompts(config, captions, seed), build_readers(config, seed)
    return CombinedConditioner(prompts, readers) if readers else prompts


def _build_prompts(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> PromptConditioner:
    if config.layer not in LAYERS:
        raise ValueError(f"layer {config.layer!r} is unknown; use one of {', '.join(LAYERS)}")
    if config.kind not in KINDS:
        raise ValueError(f"conditioner kind {config.kind!r} is unknown; use one of {', '.join(KINDS)}")
    if config.second is None:
        return KINDS[config.kind](config, captions, seed)
    for name, kind in (("kind", config.kind), ("second.kind", config.second.kind)):
        if kind not in TEXT:
            raise ValueError(f"conditioner.{name} {kind!r} is not a text encoder; use one of {', '.join(TEXT)}")
    if (config.layer, config.final_norm) != ("last", True):
        raise ValueError(
            "layer and final_norm can't be set for two text encoders, which use the layers of SDXL; remove them"
        )
    options = {field.name: getattr(config.second, field.name) for field in fields(config.second)}
    captions = None if captions is None else list(captions)
    second = TEXT[config.second.kind](ConditionerConfig(**options), captions, seed + 1, projection=True)
    return TwoEncoders(TEXT[config.kind](config, captions, seed), second)


def _transformers(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> TextConditioner:
    _require_name(config)
    if not config.final_norm:
        raise ValueError(
            "final_norm: false is for open_clip only; models of transformers always apply their final norm"
        )
    return _assemble(*find_encoder(config.name, SUFFIX if projection else ""), config)


def _open_clip(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> TextConditioner:
    _require_name(config)
    layers, length = LAYERS[config.layer], config.max_length
    tokenizer, encoder = build_open_clip(config.name, config.pretrained, layers, config.final_norm, length, projection)
    return TextConditioner(tokenizer, encoder, _use_mask(config.use_mask, encoder.config))


def _scratch(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> TextConditioner:
    if captions is None:
        raise ValueError("conditioner.kind scratch requires captions to train its tokenizer on")
    tokenizer = train_tokenizer(captions, config.scratch.vocab_size, config.scratch.max_length)
    encoder = random_transformer(config.scratch, tokenizer, seed, projection)
    return TextConditioner(tokenizer, encoder, bool(config.use_mask), trainable=True)


def _class(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> ClassConditioner:
    return new_classes(config.classes, captions, seed)


def _layout(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> TextConditioner:
    return TextConditioner(*new_layouts(config.layout, captions, seed), use_mask=False, trainable=True)


def _unconditional(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> Unconditional:
    if any(captions or ()):
        raise ValueError("an unconditional model reads no captions; set data.captions=[]")
    return Unconditional()


def _require_name(config: ConditionerConfig) -> None:
    if not config.name:
        raise ValueError(
            f"conditioner kind {config.kind!r} requires `name`: a folder, hub name or open_clip architecture"
        )


TEXT: dict[str, Callable[..., TextConditioner]] = {  # kinds that can be the first or second of two encoders
    "transformers": _transformers,  # any text model of transformers, frozen
    "open_clip": _open_clip,  # any text tower of open_clip, frozen
    "scratch": _scratch,  # a text transformer, trained with the UNet
}
KINDS: dict[str, Callable[..., PromptConditioner]] = TEXT | {
    "class": _class,  # a table of classes, trained with the UNet
    "layout": _layout,  # an encoder of boxes, trained with the UNet
    "unconditional": _unconditional,
}


def _assemble(
    encoder_folder: Path,
    tokenizer_folder: Path,
    options: ConditionerConfig,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    variant: str | None = None,
) -> TextConditioner:
    """Load a conditioner from two local folders."""
    config = read_config(encoder_folder)
    longest = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    layouts = read_layout_tokenizer(tokenizer_folder)
    tokenizer = layouts or read_tokenizer(tokenizer_folder, options.max_length, longest)
    if config["model_type"] == OPEN_CLIP:
        encoder = load_open_clip(encoder_folder, dtype, variant)
    else:
        encoder = load_encoder(encoder_folder, dtype, LAYERS[options.layer], variant)
    return TextConditioner(tokenizer, encoder, _use_mask(options.use_mask, config), trainable)


def _use_mask(option: bool | None, config: dict[str, Any]) -> bool:
    """Return the option of the user, else the stored one, else the default of the kind of encoder."""
    stored = config.get("use_attention_mask")
    default = config["model_type"] not in UNMASKED or bool(config.get("tower_config"))
    return next(choice for choice in (option, stored, default) if choice is not None)
