"""The autoencoder's config.json and weights as other programs write them: diffusers and CompVis.

Parameter names are diffusers' own, so only options need translating. Attention at a level is `AttnDownEncoderBlock2D`
and `AttnUpDecoderBlock2D` there. What diffusers has no word for (the preview matrix, the commitment weight) is written
under keys that begin with an underscore, which diffusers drops in silence.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from autoencoder.config import AutoencoderConfig

CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
DOWN_BLOCKS = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
UP_BLOCKS = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}

# options of diffusers that we have in one form only: name -> values that mean this form
FIXED = {
    "act_fn": ("silu",),
    "norm_type": ("group",),
    "use_quant_conv": (True, None),
    "use_post_quant_conv": (True, None),
    "lookup_from_codebook": (False, None),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# options that change neither weights nor results here
INFORMATIVE = {"_class_name", "_diffusers_version", "_name_or_path", "force_upcast", "up_block_types", "out_channels"}
SHARED = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "sample_size")
OPTIONAL = {"mid_block_add_attention": "mid_attention", "num_vq_embeddings": "codebook_size"}
OPTIONAL |= {"vq_embed_dim": "codebook_dim", "_commitment": "commitment"}
STATE = {"scaling_factor", "shift_factor", "_latent_rgb"}

# names that diffusers gave the attention's layers before 0.17; such files are still in use
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """The options as diffusers' config.json has them, without the scale."""
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
    """Our options out of diffusers' config.json.

    Raises:
        ValueError: an option, or its value, has no counterpart here; the message names it.
    """
    regularizer = {name: ours for ours, name in CLASSES.items()}.get(options.get("_class_name", "AutoencoderKL"))
    if regularizer is None:
        classes = " or ".join(CLASSES.values())
        raise ValueError(f"_class_name {options['_class_name']!r} is not an autoencoder known here; use {classes}")
    known = {*SHARED, *OPTIONAL, *STATE, *FIXED, *INFORMATIVE, "down_block_types"}
    for name, value in options.items():
        if name not in known:
            choices = ", ".join(sorted(known))
            raise ValueError(f"option {name!r} of the autoencoder's config.json is unknown; known are {choices}")
        if name in FIXED and value not in FIXED[name]:
            rule = f"only {FIXED[name][0]!r} is supported"
            raise ValueError(f"option {name!r} of the autoencoder's config.json is {value!r}; {rule}")
    values = {name: options[name] for name in SHARED if name in options}
    values |= {ours: options[name] for name, ours in OPTIONAL.items() if options.get(name) is not None}
    if values.get("codebook_dim") == values.get("latent_channels"):
        values.pop("codebook_dim", None)  # None here, as it is where nobody chose another
    down = options.get("down_block_types", ["DownEncoderBlock2D"])
    up = options.get("up_block_types", ["UpDecoderBlock2D"] * len(down))
    values["attention_levels"] = _attention(down, DOWN_BLOCKS)
    if _attention(up, UP_BLOCKS)[::-1] != values["attention_levels"]:
        raise ValueError(f"up_block_types {up} do not mirror down_block_types {down}; put attention at the same levels")
    return AutoencoderConfig(regularizer=regularizer, **values)


def _attention(types: list[str], known: dict[bool, str]) -> tuple[bool, ...]:
    unknown = [name for name in types if name not in known.values()]
    if unknown:
        raise ValueError(f"block type {unknown[0]!r} is unknown; use {' or '.join(known.values())}")
    return tuple(name == known[True] for name in types)


def rename_old_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names, from files whose attention layers are called query, key, value, proj_attn."""
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name): value for name, value in weights.items()}


def from_compvis(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's weights in our names, from CompVis names (`encoder.down.0.block.0...`, prefix taken off before).

    Loss weights (`loss.*`) and EMA copies are not part of the autoencoder and must be taken out before.
    Attention's 1x1 convolutions [C, C, 1, 1] become linear maps [C, C].
    """
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up."))
    converted = {}
    for name, value in weights.items():
        ours = compvis_name(name, levels)
        attention_matrix = ".attentions." in ours and value.ndim == 4
        converted[ours] = value.reshape(value.shape[:2]) if attention_matrix else value
    return converted


def compvis_name(name: str, levels: int) -> str:
    """Our name of a CompVis parameter, in an autoencoder of so many levels (the decoder counts them from below)."""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
    if ".attentions." in name:
        layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        name = re.sub(r"(attentions\.\d+)\.(norm|q|k|v|proj_out)\.", lambda m: f"{m[1]}.{layers[m[2]]}.", name)
    return name
