"""From prompts to contexts: text encoders, frozen or trained from scratch."""

from conditioning.build import AnyConditioner, ConditionerConfig, build_conditioner, load_conditioner
from conditioning.classes.class_conditioner import ClassConditioner, Unconditional
from conditioning.encoders.scratch import TransformerConfig
from conditioning.formats.compvis_conditioner import conditioner_from_compvis, conditioner_to_compvis
from conditioning.interface.context import Context, drop_context
from conditioning.interface.inputs import ConditionInputs
from conditioning.text.text_conditioner import Conditioner
from conditioning.tokenizers.known_tokenizers import bert_tokenizer, clip_tokenizer
from conditioning.tokenizers.tokenizer import Tokenizer, Tokens

__all__ = [
    "AnyConditioner",
    "ClassConditioner",
    "Conditioner",
    "ConditionerConfig",
    "Context",
    "ConditionInputs",
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
