"""LDM's text transformer (Rombach et al. 2022, section 3.3; 32 layers of width 1280 in the text-to-image model).

It is trained together with the UNet and has nothing of BERT but its tokenizer. Parameter names are those of diffusers'
LDMBertModel, the `bert/` folder of an LDMTextToImagePipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.bert import empty_embedding

MODEL_TYPE = "ldmbert"
DEFAULTS = {  # the text-to-image model's
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "d_model": 1280,
}
FIXED = {"activation_function": "gelu", "scale_embedding": False}  # options that we have in one form only
MARK = {"model_type": MODEL_TYPE, "architectures": ["LDMBertModel"]}


class LdmBert(nn.Module):
    """Bidirectional text encoder: ids and mask [B, L] -> tokens [B, L, d] after the final norm.

    LDM attends to padding too: its mask is None.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        width = config["d_model"]
        self.model = nn.Module()
        self.model.embed_tokens = empty_embedding(config["vocab_size"], width)
        self.model.embed_positions = empty_embedding(config["max_position_embeddings"], width)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["encoder_layers"]))
        self.model.layer_norm = nn.LayerNorm(width)
        self.to_logits = nn.Module()  # never used, not trained: kept because every file of theirs has it
        self.to_logits.register_buffer("weight", torch.empty(config["vocab_size"], width))
        self.to_logits.register_buffer("bias", torch.empty(config["vocab_size"]))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, L, d]; mask True where a token counts, None where all do."""
        x = self.model.embed_tokens(ids)  # [B, L] -> [B, L, d]
        x = x + self.model.embed_positions.weight[: ids.shape[1]]
        attended = None if mask is None else mask[:, None, None, :]  # [B, L] -> [B, 1, 1, L]
        for layer in self.model.layers:
            x = layer(x, attended)
        return self.model.layer_norm(x)

    def weights(self) -> dict[str, Tensor]:
        """Parameters by diffusers' names."""
        return self.state_dict()


class Layer(nn.Module):
    """Self-attention and feed-forward, each on the norm of the residual stream (pre-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["encoder_ffn_dim"]
        self.self_attn = SelfAttention(width, config["encoder_attention_heads"], config["head_dim"])
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class SelfAttention(nn.Module):
    """Heads of a width of their own: heads * head_dim need not be d."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, L, d] -> [B, heads, L, head_dim]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, heads, L, head_dim] -> [B, L, d]


def ldm_bert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with its defaults said. Raises ValueError for an option that we don't implement."""
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} {config[key]!r} of an {MODEL_TYPE} is not implemented; only {value!r} is")
    known = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {**DEFAULTS, **FIXED, **known, **MARK}


def ldm_bert_weights(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A checkpoint's weights without those of layers past the last one wanted."""
    return {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }


def empty_ldm_bert(config: dict[str, Any]) -> LdmBert:
    """An LdmBert whose parameters are not yet allocated; load_state_dict(assign=True) gives it some."""
    with torch.device("meta"):
        return LdmBert(config)


def random_ldm_bert(sizes: Mapping[str, Any], seed: int) -> LdmBert:
    """An LdmBert with weights drawn from the seed as LDM draws them, no global state touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = LdmBert(ldm_bert_config(sizes))
        for table in (bert.model.embed_tokens, bert.model.embed_positions):
            nn.init.normal_(table.weight, std=0.02)
    for buffer in bert.buffers():
        buffer.zero_()  # of the logits, which LDM has and never uses
    return bert
