"""Names of x-transformers (LDM's BERT) and open_clip (Stable Diffusion 2) beside those of our folders."""

from __future__ import annotations

BERT_TOP = {  # x-transformers' module -> diffusers'
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
NO_BIAS = ("_emb", ".emb", "to_q", "to_k", "to_v")  # how the names of modules without a bias end

TOWER_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TOWER_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def bert_names(layers: int) -> dict[str, str]:
    """x-transformers' names -> diffusers'."""
    modules = dict(BERT_TOP)
    for n in range(layers):
        for which, part in ((2 * n, BERT_ATTENTION), (2 * n + 1, BERT_FORWARD)):
            modules |= {f"attn_layers.layers.{which}.{key}": f"model.layers.{n}.{name}" for key, name in part.items()}
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in modules.items()}
    return names | {f"{k}.bias": f"{name}.bias" for k, name in modules.items() if not k.endswith(NO_BIAS)}


def tower_names(layers: int) -> dict[str, str]:
    """open_clip's names -> transformers', but for q, k and v."""
    names = dict(TOWER_TOP)
    for n in range(layers):
        for end in ("weight", "bias"):
            block, ours = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
            names |= {f"{block}.{key}.{end}": f"{ours}.{name}.{end}" for key, name in TOWER_LAYER.items()}
    return names


def fused_names(layers: int) -> dict[str, list[str]]:
    """open_clip's name of q, k and v in one -> transformers' three."""
    return {
        f"transformer.resblocks.{n}.attn.in_proj_{end}": [
            f"text_model.encoder.layers.{n}.self_attn.{part}_proj.{end}" for part in "qkv"
        ]
        for n in range(layers)
        for end in ("weight", "bias")
    }
