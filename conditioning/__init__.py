"""From prompts to contexts: text encoders, frozen or trained from scratch."""

from conditioning.conditioner import Conditioner, ConditionerConfig, build_conditioner
from conditioning.context import Context, drop_context
from conditioning.tokenizer import Tokenizer, Tokens
from conditioning.transformer import TransformerConfig

__all__ = [
    "Conditioner",
    "ConditionerConfig",
    "Context",
    "Tokenizer",
    "Tokens",
    "TransformerConfig",
    "build_conditioner",
    "drop_context",
]
