"""The autoencoder's config.json in the format of diffusers.

Parameter names are those of diffusers, so only options are converted. A level with attention is called
`AttnDownEncoderBlock2D` and `AttnUpDecoderBlock2D`. Values that diffusers does not have (the preview matrix, the
commitment weight) are stored under keys that begin with an underscore, which diffusers ignores.
"""

from __future__ import annotations

from typing import Any

from autoencoder.networks.autoencoder_config import AutoencoderConfig

CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
DOWN_BLOCKS = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
UP_BLOCKS = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}

# options of diffusers of which one value is supported: name -> values with that meaning
FIXED = {
    "act_fn": ("silu",),
    "norm_type": ("group",),
    "use_quant_conv": (True, None),
    "use_post_quant_conv": (True, None),
    "lookup_from_codebook": (False, None),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# options that change neither weights nor results
INFORMATIVE = {"_class_name", "_diffusers_version", "_name_or_path", "force_upcast", "up_block_types", "out_channels"}
SHARED = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "sample_size")
OPTIONAL = {"mid_block_add_attention": "mid_attention", "num_vq_embeddings": "codebook_size"}
OPTIONAL |= {"vq_embed_dim": "codebook_dim", "_commitment": "commitment"}
STATE = {"scaling_factor", "shift_factor", "_latent_rgb"}


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """Convert a config to the options of diffusers' config.json, without the scale."""
    options: dict[str, Any] = {"_class_name": CLASSES[config.regularizer], "act_fn": "silu"}
    options |= {name: getattr(config, name) for name in SHARED}
    options["out_channels"] = config.in_channels
    options["block_out_channels"] = list(config.block_out_channels)
    options["down_block_types"] = [DOWN_BLOCKS[attention] for attention in config.attention_levels]
    options["up_block_types"] = [UP_BLOCKS[attention] for attention in config.attention_levels[::-1]]
    options["mid_block_add_attention"] = config.mid_attention
    options["force_upcast"] = False
    if config.regularizer == "vq":
        options["num_vq_embeddings"] = config.codebook_size
        options["vq_embed_dim"] = config.code_channels
        options["_commitment"] = config.commitment
    return options


def from_diffusers(options: dict[str, Any]) -> AutoencoderConfig:
    """Convert the options of diffusers' config.json to a config.

    Raises:
        ValueError: an option or its value is not supported; the message names it.
    """
    regularizer = {name: kind for kind, name in CLASSES.items()}.get(options.get("_class_name", "AutoencoderKL"))
    if regularizer is None:
        classes = " or ".join(CLASSES.values())
        raise ValueError(f"_class_name {options['_class_name']!r} is not a supported autoencoder; use {classes}")
    supported = {*SHARED, *OPTIONAL, *STATE, *FIXED, *INFORMATIVE, "down_block_types"}
    for name, value in options.items():
        if name not in supported:
            choices = ", ".join(sorted(supported))
            raise ValueError(f"option {name!r} of the autoencoder's config.json is unknown; supported are {choices}")
        if name in FIXED and value not in FIXED[name]:
            rule = f"only {FIXED[name][0]!r} is supported"
            raise ValueError(f"option {name!r} of the autoencoder's config.json is {value!r}; {rule}")
    values = {name: options[name] for name in SHARED if name in options}
    values |= {field: options[name] for name, field in OPTIONAL.items() if options.get(name) is not None}
    if values.get("codebook_dim") == values.get("latent_channels"):
        values.pop("codebook_dim", None)  # equal to None, which is the default
    down = options.get("down_block_types", ["DownEncoderBlock2D"])
    up = options.get("up_block_types", ["UpDecoderBlock2D"] * len(down))
    values["attention_levels"] = _attention(down, DOWN_BLOCKS)
    if _attention(up, UP_BLOCKS)[::-1] != values["attention_levels"]:
        raise ValueError(f"up_block_types {up} do not mirror down_block_types {down}; use attention at the same levels")
    return AutoencoderConfig(regularizer=regularizer, **values)


def _attention(types: list[str], names: dict[bool, str]) -> tuple[bool, ...]:
    """Whether each block has attention."""
    unknown = [name for name in types if name not in names.values()]
    if unknown:
        raise ValueError(f"block type {unknown[0]!r} is unknown; use {' or '.join(names.values())}")
    return tuple(name == names[True] for name in types)
