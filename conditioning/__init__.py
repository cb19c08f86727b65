"""From prompts to contexts: text encoders, frozen or trained from scratch."""

from conditioning.building import AnyConditioner, ConditionerConfig, build_conditioner, load_conditioner
from conditioning.classes import ClassConditioner, Unconditional
from conditioning.conditioner import Conditioner
from conditioning.context import Context, drop_context
from conditioning.given import Given
from conditioning.interop import conditioner_from_compvis, conditioner_to_compvis
from conditioning.known_tokenizers import bert_tokenizer, clip_tokenizer
from conditioning.tokenizer import Tokenizer, Tokens
from conditioning.transformer import TransformerConfig

__all__ = [
    "AnyConditioner",
    "ClassConditioner",
    "Conditioner",
    "ConditionerConfig",
    "Context",
    "Given",
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
