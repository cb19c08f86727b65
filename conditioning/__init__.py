"""Conditioning of a model on prompts and other inputs: text encoders, classes, layouts, and readers of images."""

from conditioning.classes.class_conditioner import ClassConditioner, Unconditional
from conditioning.conditioners import ConditionerConfig, build_conditioner, load_conditioner
from conditioning.encoders.scratch import TransformerConfig
from conditioning.formats.compvis_conditioner import conditioner_from_compvis, conditioner_to_compvis
from conditioning.interface.caption_dropout import drop_context
from conditioning.interface.conditioner import Conditioner
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import Tokens
from conditioning.text.text_conditioner import TextConditioner
from conditioning.tokenizers.known_tokenizers import bert_tokenizer, clip_tokenizer
from conditioning.tokenizers.tokenizer import Tokenizer

__all__ = [
    "ClassConditioner",
    "ConditionInputs",
    "Conditioner",
    "ConditionerConfig",
    "Context",
    "TextConditioner",
    "Tokenizer",
    "Tokens",
    "TransformerConfig",
    "Unconditional",
    "bert_tokenizer",
    "build_conditioner",
    "clip_tokenizer",
    "conditioner_from_compvis",
    "conditioner_to_compvis",
    "drop_context",
    "load_conditioner",
]
