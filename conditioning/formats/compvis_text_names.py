"""Key map between x-transformers, which LDM's BERT is made of, and diffusers' LDMBertModel."""

from __future__ import annotations

BERT_TOP = {  # x-transformers -> diffusers
    "token_emb": "model.embed_tokens",
    "pos_emb.emb": "model.embed_positions",
    "norm": "model.layer_norm",
    "to_logits": "to_logits",
}
BERT_ATTENTION = {  # of layer 2 N
    "0": "self_attn_layer_norm",
    "1.to_q": "self_attn.q_proj",
    "1.to_k": "self_attn.k_proj",
    "1.to_v": "self_attn.v_proj",
    "1.to_out": "self_attn.out_proj",
}
BERT_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}  # of layer 2 N + 1
NO_BIAS = ("_emb", ".emb", "to_q", "to_k", "to_v")  # endings of modules without a bias


def bert_names(layers: int) -> dict[str, str]:
    """Return the map from x-transformers' names to diffusers' names."""
    modules = dict(BERT_TOP)
    for n in range(layers):
        for which, part in ((2 * n, BERT_ATTENTION), (2 * n + 1, BERT_FORWARD)):
            modules |= {f"attn_layers.layers.{which}.{key}": f"model.layers.{n}.{name}" for key, name in part.items()}
    names = {f"{key}.weight": f"{name}.weight" for key, name in modules.items()}
    return names | {f"{key}.bias": f"{name}.bias" for key, name in modules.items() if not key.endswith(NO_BIAS)}
