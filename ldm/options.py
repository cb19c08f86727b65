"""Our configs in the options of diffusers, and back: what the config.json files of a model folder say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.prediction import check_prediction
from ldm.schedule import SPACINGS, ScheduleConfig, make_schedule
from ldm.unet import UNetConfig

# Options of diffusers' UNet2DConditionModel for which we implement one value.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}

# Options that we read, with diffusers' defaults (a config.json may leave them out).
UNET_READ: dict[str, Any] = {
    "attention_head_dim": 8,  # a misnomer of diffusers: the number of heads
    "block_out_channels": (320, 640, 1280, 1280),
    "class_embed_type": None,
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "dropout": 0.0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "sample_size": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "use_linear_projection": False,
}

# Options without effect on the result here: half precision of attention, and the heads of an embedding we don't have.
UNET_IGNORED = ("upcast_attention", "addition_embed_type_num_heads")

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
OWN_SCHEDULER = "Schedule"  # the class name in scheduler_config.json where diffusers has none of the kind


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """What a scheduler_config.json says."""

    schedule: ScheduleConfig  # the noise levels
    prediction: str  # what the network outputs, a key of PREDICTIONS
    spacing: str = "trailing"  # how a sampler chooses its times, a key of SPACINGS


def scheduling_to_diffusers(scheduling: Scheduling) -> dict[str, Any]:
    """Say a schedule in the options of diffusers' schedulers, or in our own words where diffusers has none like it."""
    schedule, prediction, spacing = make_schedule(scheduling.schedule).config, scheduling.prediction, scheduling.spacing
    check_prediction(prediction)
    if schedule.name in BETA_SCHEDULES and prediction in PREDICTION_TYPES:
        betas = (
            {} if schedule.beta_start is None else {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        )
        return betas | {
            "_class_name": "DDIMScheduler",
            "beta_schedule": BETA_SCHEDULES[schedule.name],
            "clip_sample": False,
            "num_train_timesteps": schedule.timesteps,
            "prediction_type": PREDICTION_TYPES[prediction],
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "set_alpha_to_one": True,  # the last step ends in clean latents
            "steps_offset": 1,  # of leading; other spacings ignore it, and diffusers warns of 0
            "timestep_spacing": spacing,
        }
    if (schedule.name, prediction) == ("flow", "flow"):
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": schedule.timesteps,
            "shift": schedule.shift,
            "timestep_spacing": spacing,  # for us; diffusers' flow matching knows only linspace
        }
    return {"_class_name": OWN_SCHEDULER, "prediction": prediction, "spacing": spacing, "schedule": asdict(schedule)}


def scheduling_from_diffusers(options: Mapping[str, Any]) -> Scheduling:
    """Read a scheduler_config.json, of any of diffusers' schedulers that has betas, of its flow matching, or ours.

    Raises:
        ValueError: naming the option that we don't implement.
    """
    kind = options.get("_class_name")
    if kind == OWN_SCHEDULER:
        schedule = make_schedule(ScheduleConfig(**options["schedule"])).config
        return Scheduling(schedule=schedule, prediction=options["prediction"], spacing=options["spacing"])
    for name in ("trained_betas", "clip_sample", "thresholding", "use_dynamic_shifting", "invert_sigmas"):
        if options.get(name):
            raise ValueError(f"scheduler option {name} = {options[name]!r} is not implemented; only without it")
    timesteps = options.get("num_train_timesteps", 1000)
    if kind == "FlowMatchEulerDiscreteScheduler":
        schedule = ScheduleConfig(name="flow", timesteps=timesteps, shift=options.get("shift", 1.0))
        return Scheduling(schedule=schedule, prediction="flow", spacing=options.get("timestep_spacing", "linspace"))
    if "beta_schedule" not in options:
        raise ValueError(f"scheduler {kind} has no beta_schedule; only those made of betas and flow are implemented")
    name = _translate("beta_schedule", options["beta_schedule"], BETA_SCHEDULES)
    betas = (None, None) if name == "cosine" else (options.get("beta_start", 1e-4), options.get("beta_end", 0.02))
    schedule = ScheduleConfig(
        name=name,
        timesteps=timesteps,
        beta_start=betas[0],
        beta_end=betas[1],
        zero_terminal_snr=options.get("rescale_betas_zero_snr", False),
    )
    prediction = _translate("prediction_type", options.get("prediction_type", "epsilon"), PREDICTION_TYPES)
    spacing = _translate(
        "timestep_spacing", options.get("timestep_spacing", "leading"), {name: name for name in SPACINGS}
    )
    return Scheduling(schedule=schedule, prediction=prediction, spacing=spacing)


def _translate(option: str, theirs: str, names: Mapping[str, str]) -> str:
    """Find our name for diffusers' value of a scheduler option."""
    for ours, name in names.items():
        if name == theirs:
            return ours
    raise ValueError(f"scheduler option {option} = {theirs!r} is not implemented; only {', '.join(names.values())} are")


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """Say a UNetConfig in the options of diffusers' UNet2DConditionModel."""
    levels, heads = config.attention_levels, config.attention_heads
    context_dim = config.cross_attention_dim or list(config.block_out_channels)  # each level attends to itself
    return UNET_FIXED | {
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
        "block_out_channels": list(config.block_out_channels),
        "class_embed_type": None if config.vector_dim is None else "projection",
        "cross_attention_dim": context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in levels],
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.vector_dim,
        "sample_size": config.sample_size,
        "transformer_layers_per_block": config.transformer_layers,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(levels)],
        "use_linear_projection": config.use_linear_projection,
    }


def unet_from_diffusers(options: Mapping[str, Any]) -> UNetConfig:
    """Read the options of diffusers' UNet2DConditionModel.

    Raises:
        ValueError: naming an option that we don't know or of which we don't implement the value.
    """
    for name, value in options.items():
        if name in UNET_FIXED:
            _require(name, value, UNET_FIXED[name])
        elif name not in UNET_READ and name not in UNET_IGNORED:
            raise ValueError(f"unet option {name} = {value!r} is not known; only options of LDM's UNet are implemented")
    read = UNET_READ | dict(options)
    attends = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    for kind in read["down_block_types"]:
        if kind not in attends:
            raise ValueError(f"unet option down_block_types has {kind}; only {' and '.join(attends)} are implemented")
    levels = tuple(attends[kind] for kind in read["down_block_types"])
    mirrored = ["CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(levels)]
    if list(read["up_block_types"]) != mirrored:
        raise ValueError(f"unet option up_block_types = {read['up_block_types']} must mirror the way down: {mirrored}")
    if read["norm_num_groups"] is None:
        raise ValueError("unet option norm_num_groups = None is not implemented; only a number of groups is")
    heads, channels = read["attention_head_dim"], tuple(read["block_out_channels"])
    itself = read["cross_attention_dim"] in (channels, list(channels))  # no context: see unet_to_diffusers
    return UNetConfig(
        sample_size=64 if read["sample_size"] is None else _single("sample_size", read),  # as diffusers' pipelines
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        block_out_channels=channels,
        layers_per_block=_single("layers_per_block", read),
        attention_levels=levels,
        attention_heads=(heads,) if isinstance(heads, int) else tuple(heads),
        cross_attention_dim=None if itself else _single("cross_attention_dim", read),
        transformer_layers=_single("transformer_layers_per_block", read),
        use_linear_projection=read["use_linear_projection"],
        vector_dim=_vector_dim(read),
        dropout=read["dropout"],
        norm_num_groups=read["norm_num_groups"],
    )


def _require(name: str, value: Any, implemented: Any) -> None:
    """Accept the one value that we implement; False and None mean the same, and so do a value and a list of it."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any((item or None) != (implemented or None) for item in values):
        raise ValueError(f"unet option {name} = {value!r} is not implemented; only {implemented!r} is")


def _single(name: str, options: Mapping[str, Any]) -> Any:
    """Return an option that has one value for all levels, whether written once or once per level."""
    value = options[name]
    values = set(value) if isinstance(value, Sequence) else {value}
    if len(values) != 1:
        raise ValueError(f"unet option {name} = {value!r} is not implemented; only one value for all levels is")
    return values.pop()


def _vector_dim(options: Mapping[str, Any]) -> int | None:
    kind = options["class_embed_type"]
    if kind not in (None, "projection"):
        raise ValueError(f"unet option class_embed_type = {kind!r} is not implemented; only None and 'projection' are")
    return options["projection_class_embeddings_input_dim"] if kind else None
