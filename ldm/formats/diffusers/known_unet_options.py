"""The options of diffusers' UNets that we know: those of one value, those that we read, those without effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONDITIONED, PLAIN = "UNet2DConditionModel", "UNet2DModel"  # their classes, with spatial transformers and without

# Options for which we implement one value.
SHARED_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
FIXED: dict[str, dict[str, Any]] = {
    CONDITIONED: SHARED_FIXED
    | {
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    PLAIN: SHARED_FIXED | {"add_attention": True, "class_embed_type": None, "mid_block_type": "UNetMidBlock2D"},
}

# Options that we read, with diffusers' defaults (a config.json may leave them out).
SHARED_READ: dict[str, Any] = {
    "attention_head_dim": 8,  # of a UNet2DConditionModel the number of heads, a misnomer; of a UNet2DModel what it says
    "dropout": 0.0,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    "sample_size": None,
}
READ: dict[str, dict[str, Any]] = {
    CONDITIONED: SHARED_READ
    | {
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "block_out_channels": (320, 640, 1280, 1280),
        "class_embed_type": None,
        "cross_attention_dim": 1280,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "in_channels": 4,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": None,
        "time_cond_proj_dim": None,
        "transformer_layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "use_linear_projection": False,
    },
    PLAIN: SHARED_READ
    | {
        "attn_norm_num_groups": None,  # of the attention in the middle
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "downsample_type": "conv",
        "in_channels": 3,
        "out_channels": 3,
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "upsample_type": "conv",
    },
}

# Options that may be None, whatever the default.
OPTIONAL = ("attention_head_dim", "downsample_type", "norm_num_groups", "upsample_type")

# Options that may have a number for each level.
PER_LEVEL = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "sample_size",
    "transformer_layers_per_block",
)

# Options without effect on the result here: half precision of attention, the heads or size of embeddings we don't have.
IGNORED = {
    CONDITIONED: ("upcast_attention", "addition_embed_type_num_heads"),
    PLAIN: ("num_train_timesteps",),
}


def known_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options that we read, with the specified ones in place of diffusers' defaults.

    Raises:
        ValueError: naming an option that is not known, has a value that we don't implement, or has none of its kind.
    """
    for name, value in options.items():
        if name in FIXED[kind]:
            _require(name, value, FIXED[kind][name])
        elif name in READ[kind]:
            _require_kind(name, value, READ[kind][name])
        elif name not in IGNORED[kind]:
            raise ValueError(f"unet option {name} = {value!r} is not known; only options of LDM's UNet are implemented")
    return READ[kind] | dict(options)


def _require(name: str, value: Any, implemented: Any) -> None:
    """Accept the one value that we implement; False and None mean the same, and so do a value and a list of it."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any((item or None) != (implemented or None) for item in values):
        raise ValueError(f"unet option {name} = {value!r} is not implemented; only {implemented!r} is")


def _require_kind(name: str, value: Any, default: Any) -> None:
    """Accept what is of the default's kind: a list where it is one, else one value, or one per level of some."""
    if value is None and (default is None or name in OPTIONAL):
        return
    many = isinstance(default, tuple)
    example = default[0] if many else "" if name.endswith("_embed_type") else 1 if default is None else default
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    items = value if listed else [value]
    if not items or (many and not listed) or (listed and not many and name not in PER_LEVEL):
        right = False
    elif type(example) is int:  # a count
        right = all(type(item) is int and item > 0 for item in items)
    else:
        right = all(isinstance(item, type(example)) or (type(example), type(item)) == (float, int) for item in items)
    if not right:
        raise ValueError(f"unet option {name} = {value!r} is not implemented; only such as {default or example!r} is")
