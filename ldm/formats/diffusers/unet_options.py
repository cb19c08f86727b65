"""UNetConfig in the options of diffusers' UNet2DConditionModel, and back: what unet/config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.formats.diffusers.known_unet_options import CONDITIONED, FIXED, PLAIN, READ, known_options
from ldm.networks.unet_config import UNetConfig

# Names of levels on the way down, and of their mirrors on the way up.
ATTENDING = {CONDITIONED: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), PLAIN: ("AttnDownBlock2D", "AttnUpBlock2D")}
WITHOUT = {"conv": ("DownBlock2D", "UpBlock2D"), "residual": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
FRAMED = "text_time"  # addition_embed_type: the vector holds sinusoids of a frame (SDXL)
RESAMPLE_TYPES = {"conv": "conv", "residual": "resnet"}  # downsample_type and upsample_type, where a level attends


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """Say a UNetConfig in the options of diffusers' UNet2DConditionModel, or UNet2DModel where attention is plain.

    Where heads of plain attention differ in width (LDM's churches and inpainting), attention_head_dim has one number
    per level. diffusers takes only one for all, and so refuses such a folder rather than running another network.
    """
    kind = PLAIN if config.attention == "plain" else CONDITIONED
    down, up = zip(
        *(ATTENDING[kind] if attends else WITHOUT[config.resample] for attends in config.attention_levels), strict=True
    )
    shared = {
        "_class_name": kind,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": list(down),
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "sample_size": config.sample_size,
        "up_block_types": list(reversed(up)),
    }
    if kind == PLAIN:
        widths = [dim // heads for dim, heads in zip(config.block_out_channels, config.attention_heads, strict=True)]
        of_kind = {
            "attention_head_dim": _once(widths, config),
            "attn_norm_num_groups": config.norm_num_groups if config.scale_shift else None,  # None would be no norm
            "downsample_type": RESAMPLE_TYPES[config.resample],
            "upsample_type": RESAMPLE_TYPES[config.resample],
        }
    else:
        of_kind = {
            "addition_embed_type": None if config.frame_width is None else FRAMED,
            "addition_time_embed_dim": config.frame_width,
            "attention_head_dim": _once(config.attention_heads, config),
            "class_embed_type": None if config.vector_dim is None or config.frame_width is not None else "projection",
            "cross_attention_dim": config.cross_attention_dim or list(config.block_out_channels),  # each to itself
            "projection_class_embeddings_input_dim": config.vector_dim,
            "time_cond_proj_dim": config.guidance_dim,
            "transformer_layers_per_block": _plain_list(config.transformer_layers),
            "use_linear_projection": config.use_linear_projection,
        }
    return FIXED[kind] | shared | of_kind


def unet_from_diffusers(options: Mapping[str, Any]) -> UNetConfig:
    """Read the options of diffusers' UNet2DConditionModel or UNet2DModel, whichever `_class_name` says.

    Raises:
        ValueError: naming an option that we don't know or of which we don't implement the value.
    """
    kind = options.get("_class_name", CONDITIONED)
    if str(kind) not in READ:
        raise ValueError(f"unet/config.json describes a {kind}; only a {CONDITIONED} or a {PLAIN} is implemented")
    read = known_options(kind, {name: value for name, value in options.items() if not name.startswith("_")})
    if read["norm_num_groups"] is None:
        raise ValueError("unet option norm_num_groups = None is not implemented; only a number of groups is")
    if read["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        shift = read["resnet_time_scale_shift"]
        raise ValueError(f"unet option resnet_time_scale_shift = {shift!r} is not implemented; only scale_shift is")
    of_kind = _plain_from_diffusers(read) if kind == PLAIN else _conditioned_from_diffusers(read)
    return UNetConfig(
        sample_size=64 if read["sample_size"] is None else _single("sample_size", read),  # as diffusers' pipelines
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        block_out_channels=tuple(read["block_out_channels"]),
        layers_per_block=_single("layers_per_block", read),
        attention_levels=_attention_levels(kind, read),
        dropout=read["dropout"],
        norm_num_groups=read["norm_num_groups"],
        norm_eps=read["norm_eps"],
        scale_shift=read["resnet_time_scale_shift"] == "scale_shift",
        **of_kind,
    )


def _conditioned_from_diffusers(read: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of UNetConfig that only a UNet2DConditionModel has."""
    heads, channels = read["attention_head_dim"], tuple(read["block_out_channels"])
    if heads is None:
        raise ValueError("unet option attention_head_dim = None is not implemented; only a number of heads is")
    layers = read["transformer_layers_per_block"]
    itself = read["cross_attention_dim"] in (channels, list(channels))  # no context: see unet_to_diffusers
    return {
        "attention_heads": (heads,) if isinstance(heads, int) else tuple(heads),
        "cross_attention_dim": None if itself else _single("cross_attention_dim", read),
        "guidance_dim": read["time_cond_proj_dim"],
        "transformer_layers": layers if isinstance(layers, int) else tuple(layers),
        "use_linear_projection": read["use_linear_projection"],
        **_vector(read),
    }


def _plain_from_diffusers(read: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of UNetConfig of which those of a UNet2DModel have their own values."""
    groups, shift = read["attn_norm_num_groups"], read["resnet_time_scale_shift"]
    if groups != read["norm_num_groups"] and (groups or shift == "scale_shift"):
        raise ValueError(
            f"unet option attn_norm_num_groups = {groups} with resnet_time_scale_shift = {shift!r} is not implemented; "
            f"only {read['norm_num_groups']}, the number of the other norms, is"
        )
    channels, widths = read["block_out_channels"], read["attention_head_dim"]
    widths = widths if isinstance(widths, Sequence) else [widths] * len(channels)
    heads = []
    for dim, width, attends in zip(channels, widths, (*_attention_levels(PLAIN, read)[:-1], True), strict=False):
        if attends and width is not None and dim % width:
            raise ValueError(f"unet option attention_head_dim = {width} must divide the {dim} channels of each level")
        heads.append(dim // width if attends and width is not None else 1)
    return {
        "attention": "plain",
        "attention_heads": tuple(heads),
        "cross_attention_dim": None,
        "resample": _resample(read),
    }


def _attention_levels(kind: str, read: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which levels attend, finest first; the way up must mirror the way down."""
    levels = []
    for option, way in (("down_block_types", 0), ("up_block_types", 1)):
        attends = {ATTENDING[kind][way]: True} | {names[way]: False for names in WITHOUT.values()}
        if kind == CONDITIONED:
            del attends[WITHOUT["residual"][way]]
        for name in read[option]:
            if name not in attends:
                raise ValueError(f"unet option {option} has {name}; only {' and '.join(attends)} are implemented")
        levels.append(tuple(attends[name] for name in read[option]))
    if levels[1] != levels[0][::-1]:
        down, up = read["down_block_types"], read["up_block_types"]
        raise ValueError(
            f"unet option up_block_types = {up} must mirror down_block_types = {down}; nothing else is implemented"
        )
    return levels[0]


def _resample(read: Mapping[str, Any]) -> str:
    """How a UNet2DModel gets from level to level, which each block type says or leaves to an option; it must be one."""
    kinds = set()
    for way, option in enumerate(("downsample_type", "upsample_type")):
        by_block = {names[way]: kind for kind, names in WITHOUT.items()}
        resample = {option_value: kind for kind, option_value in RESAMPLE_TYPES.items()}.get(read[option] or "conv")
        if resample is None:
            raise ValueError(f"unet option {option} = {read[option]!r} is not implemented; only conv and resnet are")
        blocks = read[("down_block_types", "up_block_types")[way]]
        kinds |= {by_block.get(name, resample) for name in blocks[:-1]}  # the last one does not resample
    if len(kinds) > 1:
        raise ValueError(
            f"unet option downsample_type = {read['downsample_type']!r}, upsample_type or a block type mixes "
            "convolutions and residual blocks between levels; only one of them for all is implemented"
        )
    return kinds.pop() if kinds else "conv"


def _once(values: Sequence[int], config: UNetConfig) -> int | list[int]:
    """One number if the levels that attend, and the middle, share it; else all."""
    used = {value for value, attends in zip(values, config.attention_levels, strict=True) if attends} | {values[-1]}
    return used.pop() if len(used) == 1 else list(values)


def _single(name: str, options: Mapping[str, Any]) -> Any:
    """Return an option that has one value for all levels, whether written once or once per level."""
    value = options[name]
    values = set(value) if isinstance(value, Sequence) else {value}
    if len(values) != 1:
        raise ValueError(f"unet option {name} = {value!r} is not implemented; only one value for all levels is")
    return values.pop()


def _plain_list(value: int | tuple[int, ...]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)


def _vector(options: Mapping[str, Any]) -> dict[str, int | None]:
    """vector_dim and frame_width: set by class_embed_type, or with a frame by addition_embed_type."""
    supported = {"class_embed_type": "projection", "addition_embed_type": FRAMED}
    for name, value in supported.items():
        if options[name] not in (None, value):
            raise ValueError(f"unet option {name} = {options[name]!r} is not implemented; only None and {value!r} are")
    values = [name for name in supported if options[name]]
    dim, width = options["projection_class_embeddings_input_dim"], options["addition_time_embed_dim"]
    if len(values) == 2:
        raise ValueError("unet options class_embed_type and addition_embed_type together are not implemented")
    if values and not dim:
        raise ValueError(
            f"unet option projection_class_embeddings_input_dim = {dim!r} must be a width; see {values[0]}"
        )
    framed = values == ["addition_embed_type"]
    if framed and not width:
        raise ValueError(f"unet option addition_time_embed_dim = {width!r} must be a width; see addition_embed_type")
    return {"vector_dim": dim if values else None, "frame_width": width if framed else None}
