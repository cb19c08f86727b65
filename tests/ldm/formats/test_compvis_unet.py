"""UNets of CompVis' single files: recognized by shape, renamed without loss, and the same network under both names."""

import hashlib
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ldm.formats.compvis.compvis_schedule import PUBLISHED_BETAS, schedule_from_compvis
from ldm.formats.compvis.compvis_unet import KNOWN, unet_config, unet_from_compvis, unet_keys, unet_to_compvis
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.models.compvis_shapes import lines
from tests.helpers.models.compvis_unets import Reference, unet_shapes
from tests.helpers.models.published_unets import PUBLISHED
from tests.helpers.models.small_unets import close

SD = dict(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    attention_resolutions=(4, 2, 1),
    use_spatial_transformer=True,
)
F4 = dict(in_channels=3, out_channels=3, attention_resolutions=(8, 4, 2))
CONDITIONED = dict(use_spatial_transformer=True)
OPTIONS = {  # unet_config.params of the YAML files
    "text-to-image": SD | dict(context_dim=1280),
    "SD1": SD | dict(context_dim=768),
    "SD1 inpainting": SD | dict(context_dim=768, in_channels=9),
    "SD2": SD | dict(context_dim=1024, use_linear_in_transformer=True),
    "ImageNet, f = 8": SD | dict(model_channels=256, channel_mult=(1, 2, 4), context_dim=512),
    "ImageNet": dict(model_channels=192, channel_mult=(1, 2, 3, 5), context_dim=512, **CONDITIONED, **F4),
    "smaller text-to-image": dict(model_channels=192, channel_mult=(1, 2, 3, 5), context_dim=640, **CONDITIONED, **F4),
    "layout": dict(
        model_channels=128, channel_mult=(1, 2, 3, 4), context_dim=512, transformer_depth=3, **CONDITIONED, **F4
    ),
    "retrieval": SD
    | dict(in_channels=16, out_channels=16, model_channels=448, channel_mult=(1, 2, 3, 4), context_dim=768),
    "CelebA-HQ, FFHQ, bedrooms": dict(model_channels=224, channel_mult=(1, 2, 3, 4), **F4),
    "churches": dict(
        in_channels=4,
        out_channels=4,
        model_channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        attention_resolutions=(1, 2, 4, 8),
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "inpainting": F4 | dict(in_channels=7, model_channels=256, channel_mult=(1, 2, 3, 4), resblock_updown=True),
    "semantic": F4 | dict(in_channels=6, model_channels=128, channel_mult=(1, 4, 8), attention_resolutions=(32, 16, 8)),
    "super-resolution": F4
    | dict(in_channels=6, model_channels=160, channel_mult=(1, 2, 2, 4), attention_resolutions=(16, 8)),
}


def shapes_of(weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def empty(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def ours_of(config: UNetConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return UNet(config).state_dict()


def test_the_shapes_to_be_read_are_those_of_the_original_classes():
    text = "\n".join(lines(unet_shapes(**OPTIONS["SD1"])))  # the digest is of a dump of CompVis' own UNetModel
    assert len(text.splitlines()) == 686
    assert hashlib.sha256(text.encode()).hexdigest().startswith("b0828585f6719ebf3393cd4f537c8b83e90dbddbb12e34b1")


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_unets_are_recognized_and_every_key_is_placed(model):
    (config, _), reference = PUBLISHED[model], unet_shapes(**OPTIONS[model])
    assert unet_config(empty(reference)) == config
    has_positions = unet_from_compvis(empty(reference), config)
    assert shapes_of(has_positions) == shapes_of(ours_of(config))
    assert shapes_of(unet_to_compvis(has_positions, config)) == reference


def test_each_row_of_the_table_is_of_a_published_unet():
    rows = {(config.block_out_channels, config.cross_attention_dim) for config, _ in PUBLISHED.values()}
    assert rows == set(KNOWN)


def drawn(seed: int) -> tuple[dict, dict, UNetConfig]:
    """A small UNet: CompVis' options of its shapes, what the YAML says besides, and our config."""
    draw = random.Random(seed)
    levels, plain = draw.choice([1, 2, 3]), draw.random() < 0.5
    mult = tuple(sorted(draw.choice([1, 2, 3]) for _ in range(levels)))
    mult = (1, *mult[1:])
    attends = tuple(draw.random() < 0.6 for _ in range(levels))
    heads, width = draw.choice([1, 2, 4]), draw.choice([8, 16, 32])
    channels, layers = tuple(32 * m for m in mult), draw.choice([1, 2])
    widths = {dim for dim, attention in zip(channels, attends, strict=True) if attention} | {channels[-1]}
    by_width, context = draw.random() < 0.5, draw.choice([24, 40] if len(widths) == 1 else [24, 40, None])
    options = dict(
        in_channels=draw.choice([4, 5]),
        out_channels=4,
        model_channels=32,
        channel_mult=mult,
        attention_resolutions=tuple(2**level for level in range(levels) if attends[level]),
        num_res_blocks=layers,
        use_scale_shift_norm=draw.random() < 0.5,
    )
    shape = dict(
        sample_size=16,
        in_channels=options["in_channels"],
        block_out_channels=channels,
        layers_per_block=layers,
        attention_levels=attends,
        attention_heads=tuple(dim // width if by_width else heads for dim in channels),
        scale_shift=options["use_scale_shift_norm"],
    )
    if plain:
        options["resblock_updown"] = levels > 1 and draw.random() < 0.5
        resample = "residual" if options["resblock_updown"] else "conv"
        config = UNetConfig(attention="plain", cross_attention_dim=None, resample=resample, **shape)
    else:
        depth, projection, vector = draw.choice([1, 2]), draw.random() < 0.5, draw.choice([None, 6])
        options |= dict(use_spatial_transformer=True, transformer_depth=depth, context_dim=context)
        options |= dict(use_linear_in_transformer=projection, adm_in_channels=vector)
        config = UNetConfig(
            cross_attention_dim=context,
            transformer_layers=depth,
            use_linear_projection=projection,
            vector_dim=vector,
            **shape,
        )
    return options, {"num_head_channels": width} if by_width else {"num_heads": heads}, config


@pytest.mark.parametrize("seed", range(16))
def test_any_unet_survives_the_way_to_compvis_and_back_bit_by_bit(seed):
    options, heads, config = drawn(seed)
    torch.manual_seed(seed)
    weights = {name: torch.randn(value.shape) for name, value in ours_of(config).items()}
    reference = unet_to_compvis(weights, config)
    assert shapes_of(reference) == unet_shapes(**options)
    assert unet_config(reference, {"image_size": 16, **heads}) == config
    back = unet_from_compvis(reference, config)
    assert list(back) == list(weights)
    assert all(torch.equal(value, back[name]) for name, value in weights.items())


@pytest.mark.parametrize("seed", range(16))
def test_under_both_names_it_is_the_same_network(seed):
    options, _, config = drawn(seed)
    options["adm_in_channels"] = None  # the reference has no vector
    config = replace(config, vector_dim=None)
    torch.manual_seed(seed)
    reference = {
        name: torch.randn(shape) * (0.1 if len(shape) == 1 else (shape[1] * len(shape)) ** -0.5)
        for name, shape in unet_shapes(**options).items()
    }
    unet = UNet(config)
    unet.load_state_dict(unet_from_compvis(reference, config))
    condition = SimpleNamespace(tokens=None, mask=None, vector=None, latents=None)
    if config.cross_attention_dim:
        condition.tokens = torch.randn(2, 5, config.cross_attention_dim)
    x, timesteps = torch.randn(2, config.in_channels, 8, 8), torch.tensor([3.0, 700.0])
    heads = dict(zip(config.block_out_channels, config.attention_heads, strict=True))  # the last of its width counts
    with torch.no_grad():
        expected = Reference(reference, config.layers_per_block, lambda dim: heads[dim])(x, timesteps, condition.tokens)
        assert close(unet(x, timesteps, condition), expected, 2e-5)


def test_the_yaml_has_the_heads_of_an_unknown_unet_and_overrides_those_of_a_known_one():
    unknown = empty(unet_shapes(**SD | dict(model_channels=64, context_dim=96)))
    with pytest.raises(
        ValueError, match=r"heads of a UNet of \(64, 128, 256, 256\) channels with context width 96 are unknown"
    ):
        unet_config(unknown)
    assert unet_config(unknown, {"num_heads": 4, "image_size": 8}).attention_heads == (4, 4, 4, 4)
    known = empty(unet_shapes(**OPTIONS["SD1"]))
    yaml = {"num_heads": -1, "num_head_channels": 64, "image_size": 32, "channel_mult": [1, 2, 4, 4]}
    config = unet_config(known, yaml)
    assert (config.attention_heads, config.sample_size) == ((5, 10, 20, 20), 64)  # 32 is "unused", SD's YAML says


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model_channels": 192}, "model_channels is 192 in the YAML and 320 in the weights"),
        ({"channel_mult": [1, 2, 4]}, "channel_mult is .* in the YAML"),
        ({"in_channels": 9}, "in_channels is 9 in the YAML and 4"),
        ({"num_head_channels": 48}, "num_head_channels 48 does not divide 320 channels"),
    ],
)
def test_the_yaml_of_another_model_is_refused(params, message):
    with pytest.raises(ValueError, match=message) as error:
        unet_config(empty(unet_shapes(**OPTIONS["SD1"])), params)
    assert "\n" not in str(error.value)


def test_an_order_of_heads_that_we_do_not_know_is_refused():
    with pytest.raises(ValueError, match="use_new_attention_order"):
        unet_config(empty(unet_shapes(**OPTIONS["churches"])), {"use_new_attention_order": True})


def test_keys_without_place_are_named():
    (config, _), reference = PUBLISHED["SD1"], empty(unet_shapes(**OPTIONS["SD1"]))
    reference["label_emb.weight"] = reference.pop("out.2.bias")
    reference["time_embed.0.bias"] = torch.empty(3, device="meta")
    with pytest.raises(ValueError) as error:
        unet_from_compvis(reference, config)
    for part in ("out.2.bias is missing", "label_emb.weight is not known", "time_embed.0.bias is [3], not [1280]"):
        assert part in str(error.value)
    stipple = ours_of(config)
    stipple["stray"] = stipple.pop("conv_in.bias")
    with pytest.raises(ValueError, match="conv_in.bias is missing; stray is not known"):
        unet_to_compvis(stipple, config)


def test_what_is_no_unet_is_refused_in_one_line():
    for key in ("decoder.conv_in.weight", "output_blocks.0.0.x", "output_blocks.999999999.1.conv.weight"):
        with pytest.raises(ValueError, match="this is no UNet of LDM: .* is missing"):
            unet_config({key: torch.zeros(1)})
    with pytest.raises(ValueError, match="this is no UNet of LDM: "):
        unet_config({"output_blocks.x.0": torch.zeros(1)})


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_unet_ends_in_one_line(seed):
    options, heads, _ = drawn(seed)
    draw, whole = random.Random(seed), unet_shapes(**options)
    for _ in range(8):
        shapes = dict(whole)
        for name in draw.sample(sorted(shapes), 3):
            shape = shapes.pop(name)
            name, shape = draw.choice(
                [(name, shape[:-1]), (name, (*shape, 2)), (name.replace("0", "7"), shape), ("", ())]
            )
            shapes |= {name: shape} if name else {}
        with pytest.raises(ValueError) as error:
            unet_from_compvis(empty(shapes), unet_config(empty(shapes), heads))
        assert "\n" not in str(error.value)


def test_what_a_compvis_file_cannot_store_is_not_written():
    config = replace(drawn(0)[2], norm_num_groups=8)
    with pytest.raises(ValueError, match="norm_num_groups 8 can't be stored in a CompVis file; only 32 can"):
        unet_to_compvis(ours_of(config), config)


def whole_file() -> dict[str, torch.Tensor]:
    names = unet_shapes(**OPTIONS["SD1"])
    assert len({name.replace(".", "") for name in names}) == len(names)
    state = {f"model.diffusion_model.{name}": torch.tensor(0.0) for name in names}
    state |= {f"model_ema.diffusion_model{name.replace('.', '')}": torch.tensor(1.0) for name in names}
    return state | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        "betas": torch.ones(1),
    }


def test_weights_averaged_over_training_are_preferred_where_there_are_any():
    state, names = whole_file(), set(unet_shapes(**OPTIONS["SD1"]))
    averaged = unet_keys(state)
    assert set(averaged) == names and all(state[key] == 1 for key in averaged.values())
    without = unet_keys([key for key in state if not key.startswith("model_ema.diffusion")])
    assert set(without) == names and all(state[key] == 0 for key in without.values())


def test_half_an_average_is_refused():
    state = whole_file()
    del state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match="1 of 686 averaged weights are missing, .* model_ema.diffusion_modelout2bias"):
        unet_keys(state)
    with pytest.raises(ValueError, match="no key begins with model.diffusion_model."):
        unet_keys(["unet.conv_in.weight"])


def buffers(betas: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"betas": betas.to(dtype), "alphas_cumprod": (1 - betas).cumprod(0).to(dtype)}


def ldm_linear(start: float, end: float, timesteps: int = 1000) -> torch.Tensor:
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [("betas", "alphas_cumprod"), ("betas",), ("alphas_cumprod",)], ids="+".join)
@pytest.mark.parametrize("ends", PUBLISHED_BETAS)
def test_published_schedules_are_recognized_from_their_tables_in_any_precision(ends, kept, dtype):
    tables = buffers(ldm_linear(*ends), dtype)
    config, prediction = schedule_from_compvis({name: tables[name] for name in kept}, {"linear_start": 0.1})
    assert config == ScheduleConfig(beta_start=ends[0], beta_end=ends[1]) and prediction == "noise"


@pytest.mark.parametrize("kept", ["betas", "alphas_cumprod"])
@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(beta_start=0.00123, beta_end=0.0234, timesteps=500),
        ScheduleConfig(name="linear", beta_start=1e-4, beta_end=0.02),
        ScheduleConfig(name="linear", beta_start=1e-4, beta_end=0.02, timesteps=4000),
        ScheduleConfig(name="cosine"),
        ScheduleConfig(beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
    ],
)
def test_other_schedules_of_stipple_are_recognized_from_their_tables(config, kept):
    levels = config.timesteps
    alpha_bar = make_schedule(config)((torch.arange(levels, dtype=torch.float64) + 1) / levels)[0].square()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    assert schedule_from_compvis({kept: buffers(betas)[kept]})[0] == config


def test_a_table_of_no_schedule_is_refused():
    with pytest.raises(ValueError, match="the noise schedule in the file is none that is implemented: .* 1000 levels"):
        schedule_from_compvis(buffers(ldm_linear(0.00085, 0.012) * torch.linspace(1, 1.1, 1000)))


def test_without_tables_the_yaml_decides_or_else_the_schedule_is_that_of_sd():
    assert schedule_from_compvis({}) == (ScheduleConfig(beta_start=0.00085, beta_end=0.012), "noise")
    yaml = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 500, "parameterization": "v"}
    expected = ScheduleConfig(beta_start=0.0015, beta_end=0.0195, timesteps=500), "velocity"
    assert schedule_from_compvis({}, yaml) == expected
    assert schedule_from_compvis({}, {"beta_schedule": "cosine"})[0] == ScheduleConfig(name="cosine")
    assert schedule_from_compvis({}, {"beta_schedule": "sqrt_linear"})[0].name == "linear"
    for params in ({"beta_schedule": "sqrt"}, {"parameterization": "mu"}):
        with pytest.raises(ValueError, match=f"{next(iter(params))} .* is not implemented; only"):
            schedule_from_compvis({}, params)
