"""All kinds of conditioners: which one a config asks for, and which one lies in a model folder."""

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
from conditioning.layouts.layout_tokenizer import LayoutConfig, new_layouts, read_layout_tokenizer
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.frame import FrameConfig
from conditioning.readers.image_embedding import ImageEmbeddingConfig
from conditioning.readers.registry import build_readers, load_readers
from conditioning.readers.retrieval import RetrievalConfig
from conditioning.readers.spatial import SpatialConfig
from conditioning.readers.text_embedding import TextEmbeddingConfig
from conditioning.text.text_conditioner import Conditioner
from conditioning.text.two_encoders import SUFFIX, SecondEncoderConfig, TwoEncoders
from conditioning.tokenizers.tokenizer import read_tokenizer

ENCODERS = ("text_encoder", "bert")  # folders of a model folder; the second is diffusers' for LDMTextToImage
LAYERS = {"last": 0, "penultimate": 1}  # name -> layers left out at the end
NAMING = ("class", "layout")  # kinds whose prompts are of classes, which captions may name
UNMASKED = ("clip", "clip_text_model", OPEN_CLIP, LDM_BERT, BOXES)  # model types that were trained with no mask


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """What conditions the model."""

    kind: str = "transformers"  # a key of KINDS: transformers | open_clip | scratch | class | layout | unconditional
    name: str = ""  # folder or hub name of a transformers model; open_clip architecture; unused for scratch
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    max_length: int | None = None  # tokens per prompt; None: the encoder's own, at most 77
    use_mask: bool | None = None  # hide padding; None: no for CLIP (as Stable Diffusion), yes for all others
    layer: str = "last"  # last | penultimate
    final_norm: bool = True  # open_clip only: norm after the chosen layer
    scratch: TransformerConfig = field(default_factory=TransformerConfig)  # scratch only: size of the transformer
    classes: ClassConfig = field(default_factory=ClassConfig)  # class only: the table
    layout: LayoutConfig = field(default_factory=LayoutConfig)  # layout only: what reads boxes
    second: SecondEncoderConfig | None = None  # a second text encoder beside the first, as in SDXL
    spatial: SpatialConfig | None = None  # also a dense picture: a map, a picture to be completed or enlarged
    frame: FrameConfig | None = None  # also the size of the whole picture, and which part of it is seen
    image: ImageEmbeddingConfig | None = None  # also a picture's embedding
    text: TextEmbeddingConfig | None = None  # also the prompt's embedding, among those of pictures
    retrieval: RetrievalConfig | None = None  # also the embeddings of pictures like it


Prompts = Conditioner | TwoEncoders | ClassConditioner | Unconditional
AnyConditioner = Prompts | CombinedConditioner


def load_conditioner(
    model_folder: str | Path, dtype: torch.dtype | None = None, trainable: bool = False, variant: str | None = None
) -> AnyConditioner:
    """Reads text_encoder/ (bert/ in diffusers' LDMTextToImage folders), tokenizer/ and conditioner/, with no network.

    Args:
        dtype: of the weights in memory; None is float32, whatever the file holds.
        trainable: lets gradients through what reads prompts.
        variant: "fp16" for model.fp16.safetensors; None takes the plain file, or the only variant there is.

    Raises:
        FileNotFoundError, ValueError: in one line naming the folder and what is wrong in it.
    """
    prompts = _load_prompts(Path(model_folder), dtype, trainable, variant)
    readers = load_readers(model_folder, dtype)
    return CombinedConditioner(prompts, readers) if readers else prompts


def _load_prompts(folder: Path, dtype: torch.dtype | None, trainable: bool, variant: str | None) -> Prompts:
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
) -> AnyConditioner:
    """The conditioner that a config asks for.

    Args:
        captions: what the BPE of "scratch" is learnt from.
        seed: of the random weights of "scratch".
        held_out: captions that nothing is learnt from, but which classes and layouts must know, too.

    Raises:
        ValueError, FileNotFoundError: in one line naming value, rule and mend.
    """
    if config.kind in NAMING:
        captions = [*(captions or ()), *held_out]
    prompts, readers = _build_prompts(config, captions, seed), build_readers(config, seed)
    return CombinedConditioner(prompts, readers) if readers else prompts


def _build_prompts(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> Prompts:
    if config.layer not in LAYERS:
        raise ValueError(f"layer {config.layer!r} is unknown; use one of {', '.join(LAYERS)}")
    if config.kind not in KINDS:
        raise ValueError(f"conditioner kind {config.kind!r} is unknown; use one of {', '.join(KINDS)}")
    if config.second is None:
        return KINDS[config.kind](config, captions, seed)
    for name, kind in (("kind", config.kind), ("second.kind", config.second.kind)):
        if kind not in TEXT:
            raise ValueError(f"conditioner.{name} {kind!r} is no text encoder; two go together: {', '.join(TEXT)}")
    if (config.layer, config.final_norm) != ("last", True):
        raise ValueError(
            "layer and final_norm are for one text encoder; of two, those of SDXL are taken: leave them out"
        )
    said = {field.name: getattr(config.second, field.name) for field in fields(config.second)}
    captions = None if captions is None else list(captions)
    second = TEXT[config.second.kind](ConditionerConfig(**said), captions, seed + 1, projection=True)
    return TwoEncoders(TEXT[config.kind](config, captions, seed), second)


def _transformers(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> Conditioner:
    _require_name(config)
    if not config.final_norm:
        raise ValueError("final_norm: false is for open_clip only; a transformers model applies its own final norm")
    return _assemble(*find_encoder(config.name, SUFFIX if projection else ""), config)


def _open_clip(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> Conditioner:
    _require_name(config)
    layers, length = LAYERS[config.layer], config.max_length
    tokenizer, encoder = build_open_clip(config.name, config.pretrained, layers, config.final_norm, length, projection)
    return Conditioner(tokenizer, encoder, _use_mask(config.use_mask, encoder.config))


def _scratch(
    config: ConditionerConfig, captions: Iterable[str] | None, seed: int, projection: bool = False
) -> Conditioner:
    if captions is None:
        raise ValueError("a text transformer from scratch needs captions to learn its tokenizer from")
    tokenizer = train_tokenizer(captions, config.scratch.vocab_size, config.scratch.max_length)
    encoder = random_transformer(config.scratch, tokenizer, seed, projection)
    return Conditioner(tokenizer, encoder, bool(config.use_mask), trainable=True)


def _class(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> ClassConditioner:
    return new_classes(config.classes, captions, seed)


def _layout(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> Conditioner:
    return Conditioner(*new_layouts(config.layout, captions, seed), use_mask=False, trainable=True)


def _unconditional(config: ConditionerConfig, captions: Iterable[str] | None, seed: int) -> Unconditional:
    if any(captions or ()):
        raise ValueError("an unconditional model reads no captions; set data.captions=[]")
    return Unconditional()


def _require_name(config: ConditionerConfig) -> None:
    if not config.name:
        raise ValueError(f"conditioner kind {config.kind!r} needs `name`: a folder, hub name or open_clip architecture")


TEXT: dict[str, Callable[..., Conditioner]] = {  # what can lie beside each other
    "transformers": _transformers,  # any text model, frozen
    "open_clip": _open_clip,  # a text tower, frozen
    "scratch": _scratch,  # a text transformer trained with the UNet
}
KINDS: dict[str, Callable[..., Prompts]] = TEXT | {
    "class": _class,  # a table of classes trained with the UNet
    "layout": _layout,  # boxes, read by what is trained with the UNet
    "unconditional": _unconditional,
}


def _assemble(
    encoder_folder: Path,
    tokenizer_folder: Path,
    wanted: ConditionerConfig,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    variant: str | None = None,
) -> Conditioner:
    """A conditioner out of two local folders."""
    config = read_config(encoder_folder)
    longest = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    layouts = read_layout_tokenizer(tokenizer_folder)
    tokenizer = layouts or read_tokenizer(tokenizer_folder, wanted.max_length, longest)
    if config["model_type"] == OPEN_CLIP:
        encoder = load_open_clip(encoder_folder, dtype, variant)
    else:
        encoder = load_encoder(encoder_folder, dtype, LAYERS[wanted.layer], variant)
    return Conditioner(tokenizer, encoder, _use_mask(wanted.use_mask, config), trainable)


def _use_mask(wanted: bool | None, config: dict[str, Any]) -> bool:
    """The user's choice, else the stored one, else the habit of the encoder's kind."""
    stored = config.get("use_attention_mask")
    time_defaults = config["model_type"] not in UNMASKED or bool(config.get("tower_config"))
    return next(choice for choice in (wanted, stored, time_defaults) if choice is not None)
