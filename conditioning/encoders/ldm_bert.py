"""LDM's text transformer (Rombach et al. 2022, section 3.3; 32 layers of width 1280 in the text-to-image model).

It is trained together with the UNet and shares only the tokenizer with BERT. The parameter names are those of
diffusers' LDMBertModel, which is the `bert/` folder of an LDMTextToImagePipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.transformer_layers import SelfAttention, empty_embedding

MODEL_TYPE = "ldmbert"
DEFAULTS = {  # of the text-to-image model
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "d_model": 1280,
}
FIXED = {"activation_function": "gelu", "scale_embedding": False}  # options with one supported value
MARK = {"model_type": MODEL_TYPE, "architectures": ["LDMBertModel"]}


class LdmBert(nn.Module):
    """Bidirectional text encoder: ids and mask [B, L] -> tokens [B, L, d] after the final norm.

    LDM attends to padding too, and passes no mask.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        width = config["d_model"]
        self.model = nn.Module()
        self.model.embed_tokens = empty_embedding(config["vocab_size"], width)
        self.model.embed_positions = empty_embedding(config["max_position_embeddings"], width)
        self.model.layers = nn.ModuleList(LdmBertLayer(config) for _ in range(config["encoder_layers"]))
        self.model.layer_norm = nn.LayerNorm(width)
        self.to_logits = nn.Module()  # unused; all files of such models contain it
        self.to_logits.register_buffer("weight", torch.empty(config["vocab_size"], width))
        self.to_logits.register_buffer("bias", torch.empty(config["vocab_size"]))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, d]; the mask is True for tokens to attend to, None for all."""
        x = self.model.embed_tokens(ids)  # [B, L] -> [B, L, d]
        x = x + self.model.embed_positions.weight[: ids.shape[1]]
        attended = None if mask is None else mask[:, None, None, :]  # [B, L] -> [B, 1, 1, L]
        for layer in self.model.layers:
            x = layer(x, attended)
        return self.model.layer_norm(x)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under diffusers' names."""
        return self.state_dict()


class LdmBertLayer(nn.Module):
    """Self-attention and feed-forward block, each with its norm first (pre-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["encoder_ffn_dim"]
        heads = config["encoder_attention_heads"]
        attended = heads * config["head_dim"]  # may differ from d
        self.self_attn = SelfAttention(width, heads, inner=attended, bias=False, causal=False)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


def ldm_bert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with its defaults. Raises ValueError for an option that is not supported."""
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} {config[key]!r} of {MODEL_TYPE} is not supported; it must be {value!r}")
    options = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {**DEFAULTS, **FIXED, **options, **MARK}


def ldm_bert_weights(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the weights of the first `layers` layers of a checkpoint."""
    return {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }


def empty_ldm_bert(config: dict[str, Any]) -> LdmBert:
    """Return an LdmBert on "meta", for load_state_dict(assign=True)."""
    with torch.device("meta"):
        return LdmBert(config)


def random_ldm_bert(sizes: Mapping[str, Any], seed: int) -> LdmBert:
    """Return an LdmBert with weights drawn from the seed as in LDM, without a change to global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = LdmBert(ldm_bert_config(sizes))
        for table in (bert.model.embed_tokens, bert.model.embed_positions):
            nn.init.normal_(table.weight, std=0.02)
    for buffer in bert.buffers():
        buffer.zero_()  # of the logits, which LDM stores but never uses
    return bert
