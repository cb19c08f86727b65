"""PriorConfig in the options of diffusers' PriorTransformer, and back: what prior/config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.networks.prior_config import PriorConfig

CLASS = "PriorTransformer"
OWN_WIDTH = "_token_dim"  # of tokens that are not as wide as embeddings, which theirs always are
FIXED = {  # options that we have one value of
    "added_emb_type": "prd",
    "additional_embeddings": 4,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "norm_in_type": None,
    "time_embed_act_fn": "silu",
}


def prior_to_diffusers(config: PriorConfig) -> dict[str, Any]:
    """A PriorConfig in their options; they open it where tokens are as wide as embeddings."""
    options = {
        "_class_name": CLASS,
        "attention_head_dim": config.head_dim,
        "clip_embed_dim": None,
        "dropout": config.dropout,
        "embedding_dim": config.embedding_dim,
        "embedding_proj_dim": config.vector_dim,
        "num_attention_heads": config.heads,
        "num_embeddings": config.text_tokens,
        "num_layers": config.layers,
        "time_embed_dim": None,
    }
    width = {} if config.token_dim == config.embedding_dim else {OWN_WIDTH: config.token_dim}
    return options | FIXED | width


def prior_from_diffusers(options: Mapping[str, Any]) -> PriorConfig:
    """Raises ValueError naming the option that we don't implement, with its value."""
    for name, value in FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(f"prior option {name} {options[name]!r} is not implemented; only {value!r} is")
    dim = options.get("embedding_dim", 768)
    width = options.get("num_attention_heads", 32) * options.get("attention_head_dim", 64)
    for name, value in (("time_embed_dim", width), ("clip_embed_dim", dim)):
        if options.get(name) not in (None, value):
            raise ValueError(f"prior option {name} {options[name]!r} is not implemented; only {value} is")
    return PriorConfig(
        embedding_dim=dim,
        token_dim=options.get(OWN_WIDTH, dim),
        vector_dim=options.get("embedding_proj_dim") or dim,
        text_tokens=options.get("num_embeddings", 77),
        layers=options.get("num_layers", 20),
        heads=options.get("num_attention_heads", 32),
        head_dim=options.get("attention_head_dim", 64),
        dropout=options.get("dropout", 0.0),
    )
