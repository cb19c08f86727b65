"""Every option of diffusers' UNets: read as it is meant there, or refused by name; and UNetConfig in their words."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ldm.formats.diffusers.known_unet_options import FIXED
from ldm.formats.diffusers.unet_options import unet_from_diffusers, unet_to_diffusers
from ldm.networks.unet import UNet
from tests.helpers.models.diffusers_unets import SHAPES, run_diffusers
from tests.helpers.models.published_unets import PUBLISHED
from tests.helpers.models.small_unets import PLAIN, SMALL, close, context, random_unet


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_configs_survive_the_round_trip_through_diffusers_options(config):
    assert unet_from_diffusers(unet_to_diffusers(config)) == config
    assert unet_from_diffusers(json.loads(json.dumps(unet_to_diffusers(config)))) == config


@pytest.mark.parametrize("published", [config for config, _ in PUBLISHED.values()], ids=PUBLISHED)
def test_configs_of_published_models_survive_the_round_trip(published):
    assert unet_from_diffusers(json.loads(json.dumps(unet_to_diffusers(published)))) == published


OLD = {  # what config.json files say that diffusers wrote when these models came out
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "sample_size": 64,
}
SD_TYPES = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "norm_eps": 1e-05,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("SD1", SD_TYPES | {"_diffusers_version": "0.6.0", "attention_head_dim": 8, "cross_attention_dim": 768}),
        ("SD1 inpainting", SD_TYPES | {"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 9}),
        (
            "SD2",
            SD_TYPES
            | {
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "dual_cross_attention": False,
                "num_class_embeds": None,
                "only_cross_attention": False,
                "upcast_attention": True,
                "use_linear_projection": True,
            },
        ),
        ("text-to-image", SD_TYPES | {"attention_head_dim": 8, "cross_attention_dim": 1280, "sample_size": 32}),
        (
            "CelebA-HQ, FFHQ, bedrooms",
            {
                "_class_name": "UNet2DModel",
                "attention_head_dim": 32,
                "block_out_channels": [224, 448, 672, 896],
                "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
                "in_channels": 3,
                "norm_eps": 1e-05,
                "out_channels": 3,
                "time_embedding_type": "positional",
                "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
            },
        ),
    ],
)
def test_config_files_of_published_models_are_understood(model, options):
    assert unet_from_diffusers(OLD | options) == PUBLISHED[model][0]


@pytest.mark.parametrize("kind", [UNet2DConditionModel, UNet2DModel])
def test_a_config_that_leaves_out_options_means_diffusers_defaults(kind):
    with torch.device("meta"):
        reference = kind()
    options = {name: value for name, value in reference.config.items() if not name.startswith("_")}
    assert unet_from_diffusers({"_class_name": kind.__name__}) == unet_from_diffusers(
        {"_class_name": kind.__name__, **options}
    )


def test_heads_that_diffusers_cannot_tell_apart_make_it_refuse_the_folder():
    config = replace(PLAIN, attention_levels=(True, True), attention_heads=(4,))  # 8 channels each, then 16
    options = unet_to_diffusers(config)
    assert options["attention_head_dim"] == [8, 16] and unet_from_diffusers(options) == config
    with pytest.raises(TypeError):
        UNet2DModel(**options)


# Values to try of options that have no number or truth to change; None stands in the signature of many.
OTHERS = {
    "act_fn": ["gelu"],
    "addition_embed_type": ["text", "text_time"],
    "addition_time_embed_dim": [8],
    "attention_head_dim": [4, None, [4, 8]],
    "attention_type": ["gated"],
    "attn_norm_num_groups": [4],
    "block_out_channels": [[64, 64]],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "cross_attention_dim": [16, [12, 16], [32, 64]],
    "cross_attention_norm": ["layer_norm"],
    "down_block_types": [
        ["DownBlock2D", "DownBlock2D"],
        ["AttnDownBlock2D", "DownBlock2D"],
        ["ResnetDownsampleBlock2D", "DownBlock2D"],
        ["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
        ["SkipDownBlock2D", "DownBlock2D"],
    ],
    "downsample_type": ["resnet", "fir"],
    "encoder_hid_dim": [12],
    "encoder_hid_dim_type": ["text_proj"],
    "layers_per_block": [2, [1, 2]],
    "mid_block_only_cross_attention": [True, False],
    "mid_block_type": [None, "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"],
    "norm_num_groups": [4, None],
    "num_attention_heads": [2],
    "num_class_embeds": [10],
    "num_train_timesteps": [500],
    "only_cross_attention": [True, [True, False]],
    "projection_class_embeddings_input_dim": [6],
    "resnet_time_scale_shift": ["scale_shift", "spatial"],
    "reverse_transformer_layers_per_block": [[1, 2]],
    "sample_size": [16, [8, 16]],
    "time_cond_proj_dim": [8, 9],
    "time_embedding_act_fn": ["silu"],
    "time_embedding_dim": [64],
    "time_embedding_type": ["fourier"],
    "timestep_post_act": ["silu"],
    "transformer_layers_per_block": [2, [1, 2]],
    "up_block_types": [["UpBlock2D", "UpBlock2D"], ["UpBlock2D", "AttnUpBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]],
    "upsample_type": ["resnet", "fir"],
}


FUZZED = {UNet2DConditionModel: unet_to_diffusers(SMALL), UNet2DModel: unet_to_diffusers(SHAPES["plain"])}


def changes(kind: type) -> Iterator[tuple[type, str, object]]:
    """Every option in the signature of a diffusers class, with values that it has not in FUZZED."""
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        default, one_for_all = parameter.default, kind is UNet2DModel and name == "attention_head_dim"
        if name in OTHERS:
            values = [value for value in OTHERS[name] if not (one_for_all and isinstance(value, list))]
        elif isinstance(default, bool):
            values = [not default]
        else:
            values = [default * 2 or 1]  # numbers; an option of a new kind fails here, and belongs in OTHERS
        yield from ((kind, name, value) for value in values if value != FUZZED[kind].get(name, default))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [change for kind in FUZZED for change in changes(kind)],
    ids=lambda part: part.__name__ if isinstance(part, type) else str(part),
)
def test_every_option_of_diffusers_is_implemented_or_refused_by_name(kind, name, value):
    options = FUZZED[kind] | {name: value}
    try:
        config = unet_from_diffusers(options)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    stipple, reference = random_unet(config).eval(), kind(**options).eval()
    reference.load_state_dict(stipple.state_dict(), strict=True)
    condition, z_t = context(width=config.cross_attention_dim), torch.randn(2, config.in_channels, 8, 8)
    condition.guidance = torch.tensor([1.5, 8.0])
    with torch.no_grad():
        expected = run_diffusers(reference, z_t, torch.tensor([3.0, 700.0]), condition)
        assert close(stipple(z_t, torch.tensor([3.0, 700.0]), condition), expected)


WRONG = ("x", -1, 0, [], {}, None, [None], 1.5, [1, 2, 3], True)
TAKEN = {  # of these, what options that we read may be
    "attention_head_dim": {UNet2DModel: (None, [1, 2, 3])},  # a list: one per level, as we write it; the rest is unread
    "downsample_type": (None,),
    "dropout": (0,),
    "norm_eps": (-1, 0, 1.5),  # a number, however strange
    "sample_size": (None,),
    "upsample_type": (None,),
    "use_linear_projection": (True,),
}


def is_taken(kind: type, name: str, value: object) -> bool:
    """Whether a value of WRONG means something; options of one value are as they are, or off, in many ways."""
    taken = TAKEN.get(name, ())
    taken = taken.get(kind, ()) if isinstance(taken, dict) else taken
    if name in FIXED[kind.__name__]:
        on = FIXED[kind.__name__][name]
        taken = ([], *((True,) if on == 1 else ())) if on else (None, 0, [], {}, [None])
    return any(type(value) is type(other) and value == other for other in (FUZZED[kind][name], *taken))


@pytest.mark.parametrize("kind", FUZZED)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(kind):
    pairs = [(name, value) for name in FUZZED[kind] for value in WRONG if name != "_class_name"]
    assert sum(not is_taken(kind, *pair) for pair in pairs) > 150
    for name, value in pairs:
        with torch.device("meta"):
            if is_taken(kind, name, value):
                UNet(unet_from_diffusers(FUZZED[kind] | {name: value}))
                continue
            with pytest.raises(ValueError, match=r"^[^\n]+$"):
                UNet(unet_from_diffusers(FUZZED[kind] | {name: value}))


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (SMALL, {"an_option_of_tomorrow": 1}),
        (SMALL, {"class_embed_type": "projection"}),  # of an unknown width
        (SMALL, {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}),
        (PLAIN, {"attn_norm_num_groups": None}),  # to diffusers: none in the middle if there is scale and shift
        (PLAIN, {"attention_head_dim": 24}),
        (PLAIN, {"cross_attention_dim": 12}),
        (PLAIN, {"downsample_type": "conv"}),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_an_option_that_we_do_not_implement_is_named(config, change):
    with pytest.raises(ValueError, match=f"unet option .*{next(iter(change))}") as error:
        unet_from_diffusers(unet_to_diffusers(config) | change)
    assert "\n" not in str(error.value)
