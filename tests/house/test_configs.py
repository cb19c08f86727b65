"""The recipes in configs/: each is valid, has the expected size, and fits the recipes that it is used with."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

from autoencoder import Autoencoder, PatchDiscriminator
from autoencoder.losses.perceptual import PERCEPTUAL, make_perceptual
from conditioning.conditioners import ConditionerConfig
from conditioning.encoders.scratch import random_transformer, train_tokenizer
from conditioning.readers.frame import FrameReader
from conditioning.readers.spatial import SpatialReader
from conditioning.text.text_conditioner import TextConditioner
from ldm.denoising.denoiser import Denoiser
from ldm.formats.diffusers.network_kinds import KINDS, folder_of
from ldm.networks.unet import UNet
from ldm.sampling.settings import Settings
from ldm.schedules.registry import make_schedule
from stipple.stages.autoencoder.autoencoder_run import AutoencoderRunConfig
from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init
from stipple.training.optimization.learning_rate import SCHEDULES
from stipple_core.config import load_config, save_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
AUTOENCODERS = sorted(path.stem for path in (CONFIGS / "autoencoder").glob("*.yaml"))
LDMS = sorted(path.stem for path in (CONFIGS / "ldm").glob("*.yaml"))
FROM_SCRATCH = [name for name in LDMS if "\ninit_from:" not in (CONFIGS / "ldm" / f"{name}.yaml").read_text("utf-8")]
LAUNCHES = sorted(path.stem for path in (CONFIGS / "accelerate").glob("*.yaml"))
ALL = sorted(CONFIGS.glob("*/*.yaml"))
LARGE = [name for name in AUTOENCODERS if re.fullmatch(r"(kl|vq)-f\d+", name)]  # of the paper, for GPUs
PLACES = ["data.folder=FOLDER", "data.maps=MAPS"]  # the second is for second stages
PARAMETERS = {  # of CompVis' released weights
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f8": 67_717_295,
    "vq-f16": 69_593_371,
}
WIDTHS = {  # hidden_size of the frozen encoders that recipes name, on the hub or as a folder
    "clip-vit-large-patch14": 768,
    "all-minilm-l6-v2": 384,
    "checkpoints/emoji": 384,
    "t5-v1-1-xxl": 4096,
    "vit-l-14": 768,
    "shapes-clip": 64,
}


@cache
def read_autoencoder(name: str, *overrides: str) -> AutoencoderRunConfig:
    path = str(CONFIGS / "autoencoder" / f"{name}.yaml")
    return load_config(AutoencoderRunConfig, path, ["data.folder=FOLDER", *overrides])


@cache
def read_ldm(name: str, *overrides: str) -> LdmRunConfig:
    path = str(CONFIGS / "ldm" / f"{name}.yaml")
    return load_config(LdmRunConfig, path, [*PLACES, *overrides], of_shipped_model)


def of_shipped_model(values: dict) -> dict:
    """The defaults that a recipe takes from the model of init_from, if that is in the repository."""
    return config_from_init(values) if (ROOT / str(values.get("init_from"))).is_dir() else {}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def leaves(value, key: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of all values that are not mappings or lists."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{key}.{k}")]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, key)]
    return [(key, value)]


def all_keys(value) -> list:
    """All keys of all nested mappings."""
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in all_keys(item))]
    return [key for item in value for key in all_keys(item)] if isinstance(value, list) else []


def encoder_width(name: str) -> int:
    return next(width for encoder, width in WIDTHS.items() if encoder in name.lower().replace("_", "-"))


def of_prompts(config: ConditionerConfig) -> tuple[int, int]:
    """Widths of the tokens and of the vector of the prompt conditioner; 0: none."""
    if config.kind in ("transformers", "open_clip"):
        return encoder_width(config.name), 0
    if config.kind == "class" and config.classes.told_as == "vector":
        return 0, config.classes.width
    widths = {"scratch": config.scratch.width, "layout": config.layout.width, "class": config.classes.width}
    return widths.get(config.kind, 0), 0


def context_widths(config: ConditionerConfig) -> tuple[int, int, int]:
    """Widths of the tokens, the vector and the latents of the conditioner of a config; 0: none."""
    (tokens, vector), latents = of_prompts(config), 0
    with torch.device("meta"):
        readers = [kind(part) for kind, part in ((SpatialReader, config.spatial), (FrameReader, config.frame)) if part]
    for widths in (reader.widths for reader in readers):
        vector, latents = vector + widths.vector, latents + widths.latents
    if config.image is not None:
        dim = encoder_width(config.image.encoder.name)
        tokens, vector = tokens or config.image.token_dim or dim, vector + dim * config.image.vector
    if config.retrieval is not None:
        tokens = encoder_width(config.retrieval.encoder.name)
    if config.text is not None:
        vector += encoder_width(config.text.encoder.name)
    return tokens, vector, latents


# -- YAML --------------------------------------------------------------------------------------------------------------


def test_each_autoencoder_of_the_paper_has_a_recipe():
    assert set(PARAMETERS) == set(LARGE)
    assert {"tiny", "emoji"} <= set(AUTOENCODERS) and {"tiny", "emoji"} <= set(LDMS)
    assert {"txt2img-1p4b", "text2img-256", "txt2img-small"} <= set(LDMS)


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_all_yaml_readers_read_the_same_values_and_keys(path):
    text = path.read_text("utf-8")
    assert text.startswith("# "), "a recipe starts with a comment that describes it"
    plain = yaml.safe_load(text)
    assert plain == OmegaConf.to_container(OmegaConf.create(text))  # PyYAML reads 1e-4 as text, OmegaConf as a number
    assert all(isinstance(key, str) for key in all_keys(plain))  # on, off, yes and no are truth values
    for key, value in leaves(plain):
        if isinstance(value, str) and key not in (".gpu_ids", ".samples.prompts"):
            with pytest.raises(ValueError):  # text that is no number
                float(value)
    assert not re.search(r":\s*\d+_\d", text), "1_000 is a number to YAML 1.1 only"


@pytest.mark.parametrize("script", ["autoencoder", "ldm"])
def test_a_recipe_is_read_back_equal_from_the_run_folder(script, tmp_path):
    names, read = (AUTOENCODERS, read_autoencoder) if script == "autoencoder" else (LDMS, read_ldm)
    for name in names:
        config, path = read(name), str(tmp_path / f"{name}.yaml")
        save_config(config, path)
        assert load_config(type(config), path) == config


def test_a_large_recipe_without_a_data_folder_names_the_key():
    for script, cls, name in [("autoencoder", AutoencoderRunConfig, "kl-f8"), ("ldm", LdmRunConfig, "txt2img-small")]:
        with pytest.raises(ValueError, match=r"data\.folder has no value; set it .* data\.folder="):
            load_config(cls, str(CONFIGS / script / f"{name}.yaml"), [])


# -- stage 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_networks_of_a_first_stage_can_be_built(name):
    config = read_autoencoder(name)
    with torch.device("meta"):
        autoencoder = Autoencoder(config.autoencoder)
        PatchDiscriminator(config.discriminator)
        if config.perceptual.kind != "lpips":
            make_perceptual(config.perceptual)
    assert config.perceptual.kind in PERCEPTUAL and config.optimizer.schedule in SCHEDULES
    assert config.data.image_size % autoencoder.downsampling == 0
    assert config.autoencoder.sample_size == config.data.image_size
    assert config.discriminator_start is None or config.discriminator_start < config.trainer.steps
    assert name not in PARAMETERS or count(autoencoder) == PARAMETERS[name]


@pytest.mark.parametrize("name", LARGE)
def test_the_papers_first_stages_are_trained_as_in_the_paper(name):
    config, vq = read_autoencoder(name), name.startswith("vq")
    assert config.autoencoder.regularizer == name[:2]
    assert config.autoencoder.downsampling == int(name[4:])
    assert config.optimizer.rate(0, 1) == pytest.approx(4.5e-6 * config.trainer.batch_size)
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.optimizer.clip_norm) == ([0.5, 0.9], 0, 0)
    starts = {"vq-f4": 0, "vq-f8": 1, "vq-f16": 250_001}
    assert config.discriminator_start == starts.get(name, 50_001)
    assert config.loss.adversarial == (0.6 if name == "vq-f8" else 0.75 if vq else 0.5)
    assert config.loss.kl == 1e-6 and config.loss.codebook == 1.0 and config.autoencoder.commitment == 0.25
    assert config.data.image_size == 256 and config.run == f"runs/{name}"


# -- stage 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_the_network_of_a_second_stage_can_be_built_and_its_schedule_fits_its_prediction(name):
    config = read_ldm(name)
    with torch.device("meta"):
        network = KINDS[folder_of(config.network)].build(config.network)
    schedule = make_schedule(config.diffusion.schedule)
    Denoiser(network, schedule, config.diffusion.prediction)
    Settings(sampler=config.samples.sampler, steps=config.samples.steps)
    assert config.optimizer.schedule in SCHEDULES and config.save_precision in ("fp32", "fp16")
    assert not (schedule.ends_in_pure_noise and config.diffusion.weighting == "min_snr")  # would not train t = 1


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_network_has_the_widths_of_its_conditioner(name):
    config = read_ldm(name)
    tokens, vector, latents = context_widths(config.conditioner)
    if config.conditioner.second is not None:
        pytest.skip("two text encoders: test_two_encoders.py")
    assert (config.network.cross_attention_dim or 0, config.network.vector_dim or 0) == (tokens, vector)
    assert config.network.in_channels == config.network.out_channels + latents


@pytest.mark.parametrize("name", [name for name in FROM_SCRATCH if folder_of(read_ldm(name).network) == "unet"])
def test_a_second_stage_fits_the_recipe_of_the_autoencoder_that_it_names(name):
    config = read_ldm(name)
    recipes = {f"{read_autoencoder(other).run}/model": read_autoencoder(other).autoencoder for other in AUTOENCODERS}
    recipes |= {"runs/layouts-autoencoder/model": read_autoencoder("shapes").autoencoder}  # on other images
    first = recipes.get(config.autoencoder)
    f, channels = (1, 3) if config.autoencoder == "pixels" else (first.downsampling, first.code_channels)
    assert config.unet.out_channels == channels
    assert config.unet.sample_size * f == config.data.image_size
    coarsest = config.unet.sample_size / 2 ** (len(config.unet.block_out_channels) - 1)
    assert coarsest.is_integer() and coarsest >= 2


@pytest.mark.parametrize("name", [name for name in FROM_SCRATCH if read_ldm(name).conditioner.kind == "scratch"])
def test_a_text_transformer_from_scratch_can_be_built(name):
    scratch = read_ldm(name).conditioner.scratch
    tokenizer = train_tokenizer(["a red heart", "a green heart"], 600, scratch.max_length)
    with torch.device("meta"):
        encoder = random_transformer(scratch, tokenizer, seed=0)
    conditioner = TextConditioner(tokenizer, encoder, use_mask=False, trainable=True)
    assert (conditioner.context_dim, conditioner.max_length) == (scratch.width, scratch.max_length)
    blocks = 12 * scratch.layers * scratch.width**2  # 4 matrices of attention, 8 of the feed-forward network
    assert blocks < count(encoder) < 1.2 * blocks + 2**21


@pytest.mark.parametrize(
    "name, overrides, parameters",
    [
        ("txt2img-1p4b", (), 872_300_484),
        ("txt2img-1p4b", ("unet.cross_attention_dim=768",), 859_520_964),  # Stable Diffusion 1
        ("text2img-256", (), 403_623_939),
        ("txt2img-small", (), 251_148_100),
        ("txt2img-mini", (), 136_651_779),
        ("cin256-v2", (), 400_920_579),
        ("layout2img-256", (), 246_277_379),
        ("celeba-256", (), 274_056_163),
        ("churches-256", (), 294_966_916),
        ("inpaint-places", (), 387_245_827),
        ("semantic-landscapes", (), 215_229_315),
        ("bsr-sr", (), 113_622_563),
        ("rdm-768", (), 1_335_480_400),
        ("sdxl", (), 2_567_463_684),
        ("ddpm-cifar10", (), 35_746_307),
    ],
)
def test_unets_have_the_parameters_of_the_published_models(name, overrides, parameters):
    with torch.device("meta"):
        assert count(UNet(read_ldm(name, *overrides).unet)) == parameters


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("lcm-sd1", 859_520_964 + 256 * 320),  # Stable Diffusion 1 with an embedding of the guidance scale
        ("inpaint-text", 859_535_364),
        ("depth", 865_913_604),
    ],
)
def test_unets_of_fine_tuning_recipes_have_the_parameters_of_the_published_models(name, parameters):
    path = str(CONFIGS / "ldm" / f"{name}.yaml")
    config = load_config(LdmRunConfig, path, ["data.folder=FOLDER", "data.maps=null"])
    with torch.device("meta"):
        assert count(UNet(config.unet)) == parameters


def test_the_text_encoder_of_the_paper_has_32_layers_and_77_tokens():
    for name, width in [("txt2img-1p4b", 1280), ("text2img-256", 640)]:
        scratch = read_ldm(name).conditioner.scratch
        assert (scratch.layers, scratch.max_length, scratch.width) == (32, 77, width)


# -- launching ---------------------------------------------------------------------------------------------------------


@cache
def launch(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_its_configs(name):
    config = launch(name)
    assert config.mixed_precision == "no"  # trainer.precision decides; an unquoted no would be False
    assert config.num_processes % config.num_machines == 0
    several = config.distributed_type.value in ("MULTI_GPU", "FSDP")
    assert several == (config.num_processes > 1)


def test_accelerate_configs_have_the_number_of_processes_in_their_names():
    processes = {name: (launch(name).num_processes, launch(name).num_machines) for name in LAUNCHES}
    assert processes == {
        "cpu": (1, 1), "one_gpu": (1, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2), "fsdp": (8, 1)
    }  # fmt: skip
    assert launch("cpu").use_cpu and not launch("one_gpu").use_cpu


@pytest.mark.parametrize("name", [*LARGE, *(name for name in LDMS if name.startswith(("txt2img", "text2img")))])
def test_a_large_recipe_divides_its_batch_over_one_and_eight_gpus_and_over_two_nodes_if_it_is_a_second_stage(name):
    trainer = (read_ldm(name) if name in LDMS else read_autoencoder(name)).trainer
    for launched in ["one_gpu", "eight_gpus", *["two_nodes"] * (name in LDMS)]:
        assert trainer.batch_size % (trainer.micro_batch_size * launch(launched).num_processes) == 0, launched


# -- documents ---------------------------------------------------------------------------------------------------------


def test_every_config_that_a_page_a_script_or_a_recipe_mentions_exists():
    places = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*.py"), *ALL]
    mentioned = {
        (name, path.relative_to(ROOT))
        for path in places
        for name in re.findall(r"configs/[\w-]+/[\w.-]+\.yaml", path.read_text("utf-8"))
        if "YOURS" not in name and "KIND" not in name
    }
    assert mentioned
    assert not [(name, str(path)) for name, path in mentioned if not (ROOT / name).is_file()]


def test_every_command_and_override_in_the_comments_of_recipes_is_valid():
    scripts = {"autoencoder": AutoencoderRunConfig, "ldm": LdmRunConfig}
    commands = r"stipple [\w-]+\s+(?:--config_file \S+\s+)?--config (configs/(\w+)/\S+\.yaml)((?:\s+[a-z_.]+=\S+)*)"
    for path in [path for path in ALL if path.parent.name in scripts]:
        comments = " ".join(re.findall(r"#(.*)", path.read_text("utf-8"))).replace("\\", " ")
        for config, folder, overrides in re.findall(commands, comments):
            places = PLACES[: 1 + (folder == "ldm")]
            load_config(scripts[folder], str(ROOT / config), [*places, *overrides.split()])
        rest = re.sub(commands, "", comments)
        overrides = re.findall(r"(?<![\w.])[a-z_.]+=[\w./-]+\b", rest)
        load_config(scripts[path.parent.name], str(path), [*PLACES[: 1 + (path.parent.name == "ldm")], *overrides])
