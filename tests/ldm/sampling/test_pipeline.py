"""From prompts to pictures: what a picture depends on, and what a model folder keeps."""

import itertools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm import TextToImage
from ldm.networks.unet import UNet
from ldm.samplers.registry import SAMPLERS
from ldm.sampling.settings import Settings
from stipple_core.operators.winograd import Convolution
from tests.helpers.models.small_encoders import build_scratch
from tests.helpers.models.small_models import SIDE, build_model

KINDS = {
    "KL, CLIP": dict(regularizer="kl", encoder="clip"),
    "VQ, BERT": dict(regularizer="vq", encoder="bert"),
    "KL, BERT, flow": dict(regularizer="kl", encoder="bert", prediction="flow", name="flow"),
}
PROMPTS = ["a red heart", "a dark blue circle"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One small model of each kind, in memory and in a folder: name -> (model, folder)."""
    built = {}
    for name, kind in KINDS.items():
        folder = tmp_path_factory.mktemp("model")
        model = build_model(tmp_path_factory.mktemp("encoder"), **kind)
        model.save(folder)
        built[name] = model, folder
    return built


@pytest.fixture
def model(models) -> TextToImage:
    return models["KL, BERT, flow"][0]


@pytest.fixture(params=KINDS)
def each(models, request) -> TextToImage:
    return models[request.param][0]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def sizes_of_passes(model, monkeypatch) -> list[int]:
    """How many estimates the UNet makes at each call from here on."""
    seen, forward = [], model.unet.forward

    def counted(*condition):
        output = forward(*condition)
        seen.append(len(output))
        return output

    monkeypatch.setattr(model.unet, "forward", counted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_makes_the_same_pictures(models, kind, tmp_path):
    """Bit for bit once it has been loaded; loading changes how weights lie in memory, and so last bits."""
    model, folder = models[kind]
    loaded = TextToImage.load(folder)
    assert loaded.defaults == model.defaults
    made = pixels(loaded(PROMPTS, num_images=2))
    assert np.abs(made - pixels(model(PROMPTS, num_images=2))).max() <= 1
    loaded.save(tmp_path)
    assert np.array_equal(pixels(TextToImage.load(tmp_path)(PROMPTS, num_images=2)), made)


def test_half_precision_is_a_format_of_files_not_of_computing(model, tmp_path):
    model.save(tmp_path, torch.float16)
    loaded = TextToImage.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert np.abs(pixels(loaded(PROMPTS)) - pixels(model(PROMPTS))).mean() < 2


def test_prompt_negative_prompt_and_seed_all_bear_on_a_picture(each):
    plain = pixels(each(PROMPTS[0]))
    changes = [{"seed": 43}, {"guidance_scale": 5}, {"steps": 1}, {"sampler": "ddpm"}]
    strong, away = (pixels(each(PROMPTS[0], guidance_scale=9, negative_prompt=text)) for text in ("", "a cat"))
    assert not np.array_equal(strong, away)
    for change in changes:
        assert not np.array_equal(plain, pixels(each(PROMPTS[0], **change))), change
    assert not np.array_equal(plain, pixels(each(PROMPTS[1])))


def test_picture_i_of_a_request_is_the_picture_of_seed_plus_i(each):
    together = pixels(each(PROMPTS, num_images=2, seed=7))
    alone = [each(PROMPTS[i // 2], seed=7 + i)[0] for i in range(4)]
    assert np.array_equal(together, pixels(alone))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(model, sampler):
    settings = dict(num_images=3, sampler=sampler, seed=2**64 - 6)
    apart = np.abs(pixels(model(PROMPTS, **settings)) - pixels(model(PROMPTS, batch_size=4, **settings)))
    assert apart.max() <= 1  # the last bits of matrix products depend on the number of rows
    assert (apart > 0).mean() < 1e-3


def test_a_picture_of_a_batch_is_made_again_bit_for_bit_without_the_others(each):
    for picture in each.generate(PROMPTS, num_images=2, batch_size=3):
        batch = [picture.settings] * picture.settings.batch
        *_, last = each.sample(batch)
        (again,) = each.finish(batch, last.z)
        assert again.image.tobytes() == picture.image.tobytes()


def test_sampling_leaves_global_randomness_alone(model):
    before = torch.random.get_rng_state()
    first = pixels(model("a cat", sampler="ddim", eta=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert np.array_equal(pixels(model("a cat", sampler="ddim", eta=1)), first)


def test_guidance_scale_1_makes_no_unconditional_pass_and_others_one(model, monkeypatch):
    seen = sizes_of_passes(model, monkeypatch)
    model("a cat", guidance_scale=1, negative_prompt="a dog", sampler="euler")
    assert seen == [1] * 4
    seen.clear()
    model("a cat", guidance_scale=0, sampler="euler")
    assert seen == [1] * 4
    seen.clear()
    model("a cat", sampler="euler", num_images=3, batch_size=2)
    assert seen == [4] * 4 + [2] * 4


def test_guidance_moves_away_from_the_negative_prompt_and_scale_0_is_the_negative_prompt(model):
    assert np.array_equal(pixels(model("a cat", guidance_scale=0)), pixels(model("", guidance_scale=1)))
    swapped = model("a cat", guidance_scale=0, negative_prompt="a heart")
    assert np.array_equal(pixels(swapped), pixels(model("a heart", guidance_scale=1)))


def test_what_the_caller_leaves_out_comes_from_the_model(models, tmp_path):
    model, _ = models["KL, CLIP"]
    (expected_value,) = model.plan("a cat", steps=None, sampler=None)
    assert (expected_value.steps, expected_value.sampler, expected_value.guidance_scale) == (4, "dpmpp_2m", 3.0)
    assert (expected_value.height, expected_value.width) == (SIDE, SIDE)
    defaults = Settings(steps=7, sampler="heun", guidance_scale=2.5, spacing="leading", guidance_rescale=0.5)
    parts = model.autoencoder, model.unet, model.conditioner, model.scheduling
    TextToImage(*parts, defaults).save(tmp_path)
    assert TextToImage.load(tmp_path).defaults == replace(defaults, height=SIDE, width=SIDE)


def test_a_folder_without_our_own_defaults_is_opened(models, tmp_path):
    models["KL, CLIP"][0].save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["_stipple"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert TextToImage.load(tmp_path).defaults.steps == Settings().steps


def test_sizes_need_not_be_square_or_those_of_training(model):
    (image,) = model("a cat", height=20, width=44)
    assert image.size == (44, 20)


def test_an_image_has_all_settings_that_made_it(model):
    made = list(model.generate(PROMPTS, num_images=2, seed=-1, negative_prompt="a dog", batch_size=3))
    seeds = [picture.settings.seed for picture in made]
    assert seeds == list(range(seeds[0], seeds[0] + 4))
    assert seeds != [p.settings.seed for p in model.generate(PROMPTS, num_images=2, seed=-1, steps=1)]
    assert [picture.settings.prompt for picture in made] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [(picture.settings.batch, picture.settings.place) for picture in made] == [(3, 0), (3, 1), (3, 2), (1, 0)]


def test_pictures_arrive_as_they_are_finished(model, monkeypatch):
    seen = sizes_of_passes(model, monkeypatch)
    pictures = model.generate("a cat", num_images=3)
    assert seen == []
    next(pictures)
    assert len(seen) == 4


def test_pictures_of_different_settings_share_no_batch(model):
    expected_value = [*model.plan(PROMPTS), *model.plan(PROMPTS, steps=2)]
    assert [len(batch) for batch in model.batches(expected_value, 4)] == [2, 2]
    assert [len(batch) for batch in model.batches(expected_value[:2] * 5, 4)] == [4, 4, 2]


def test_a_prompt_that_is_too_long_is_made_and_what_was_cut_is_named(model):
    prompt = "heart " * 30 + "finally a cat"
    with pytest.warns(UserWarning, match="longer than 24 tokens; not seen by the model: .*finally a cat"):
        (image,) = model(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model("a cat")


@pytest.mark.parametrize("prompt", ["", "\0", "\ud800", "💚 Ж", "x" * 100_000], ids=["none", "NUL", "half", "", "long"])
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_any_text_is_a_prompt(model, prompt):
    assert len(model(prompt, steps=1)) == 1


def test_previews_are_the_colors_of_latents_where_known_and_decoded_where_not(model):
    *_, step = model.sample(model.plan("a cat"))
    assert model.preview(step.z_0)[0].tobytes() == model.decode(step.z_0)[0].tobytes()
    model.autoencoder.latent_rgb = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    try:
        (image,) = model.preview(step.z_0)
    finally:
        model.autoencoder.latent_rgb = None
    assert image.size == (SIDE, SIDE)
    corner = (step.z_0[0, :3, 0, 0].clamp(-1, 1) + 1) * 127.5
    assert np.abs(np.asarray(image)[3, 3] - corner.numpy()).max() <= 0.5


def test_overflow_in_half_precision_is_an_error_not_a_black_picture(model):
    with pytest.raises(ValueError, match="not finite in float32"):
        model.decode(torch.full((1, 4, 2, 2), float("nan")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "dpmp_2m"}, "sampler 'dpmp_2m' is unknown; did you mean dpmpp_2m\\?"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"steps": 1001}, "1001 steps is not between 1 and 1000"),
        ({"steps": "ten"}, "steps 'ten' is not a whole number"),
        ({"steps": True}, "steps True is not a whole number"),
        ({"guidance_scale": float("nan")}, "guidance scale nan must be a finite number"),
        ({"guidance_scale": float("-inf")}, "guidance scale -inf must be a finite number"),
        ({"eta": 1.5, "sampler": "ddim"}, "eta 1.5 must be between 0"),
        ({"eta": 0.5}, "eta 0.5 does not go with sampler dpmpp_2m; leave it out or use ddim"),
        ({"height": 30}, "height 30 is not a multiple of 4 .*; use 28 or 32"),
        ({"width": 3}, "width 3 is not a multiple of 4 .*; use 4 or more"),
        ({"width": -8}, "width -8 is not a multiple"),
        ({"seed": 2**64}, "seed 18446744073709551616 must be between 0 and 2\\^64 - 1"),
        ({"seed": -2}, "seed -2 must be"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed 18446744073709551616 must be"),
        ({"num_images": 0}, "num images 0 must be"),
        ({"batch_size": 0}, "batch size 0 must be"),
        ({"spacing": "even"}, "spacing 'even' is unknown; did you mean"),
        ({"guidance_rescale": 1.5}, "guidance rescale 1.5 must be between 0"),
        ({"prompt": [5]}, "a prompt must be text, not int: 5"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_computed(model, monkeypatch, change, message):
    seen = sizes_of_passes(model, monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        model(**({"prompt": "a cat"} | change))
    assert "\n" not in str(error.value)
    assert seen == []


def test_parts_that_do_not_fit_together_are_refused(models, monkeypatch):
    model, _ = models["KL, CLIP"]
    wide = models["VQ, BERT"][0]
    assert wide.conditioner.context_dim == model.conditioner.context_dim  # else the next line proves nothing
    thin = build_scratch()
    monkeypatch.setattr(type(thin), "context_dim", 16)
    with pytest.raises(ValueError, match="the UNet reads tokens of width 32, the conditioner makes tokens of width 16"):
        TextToImage(model.autoencoder, model.unet, thin, model.scheduling)


@pytest.mark.parametrize("part", ["model_index.json", "vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(models, part, tmp_path):
    folder = tmp_path / "model"
    models["KL, BERT, flow"][0].save(folder)
    (folder / part).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=part) as error:
        TextToImage.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["config_yaml", "tokenizer", "prediction", "variant"])
def test_an_option_that_does_not_go_with_the_source_is_refused(models, option, tmp_path):
    folder, file = models["KL, CLIP"][1], tmp_path / "model.safetensors"
    file.touch()
    source, other = (file, "a model folder") if option == "variant" else (folder, "a single file")
    with pytest.raises(ValueError, match=f"{option} is an option of {other}; leave it out"):
        TextToImage.load(source, **{option: "noise"})
    with pytest.raises(TypeError, match="varaint"):
        TextToImage.load(folder, varaint="fp16")


def test_half_precision_on_a_cpu_warns(models):
    with pytest.warns(UserWarning, match="torch.bfloat16 is 40 to 100 times slower"):
        loaded = TextToImage.load(models["KL, BERT, flow"][1], dtype=torch.bfloat16)
    exact = pixels(models["KL, BERT, flow"][0](PROMPTS, steps=2))
    assert np.abs(pixels(loaded(PROMPTS, steps=2)) - exact).mean() < 12


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_diffusers_opens_the_folder_and_makes_the_same_picture(spacing, prediction, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    model = build_model(tmp_path, prediction=prediction)
    model.defaults = replace(model.defaults, spacing=spacing)
    model.save(tmp_path / "model")
    reference = DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert type(reference) is StableDiffusionPipeline
    reference.set_progress_bar_config(disable=True)
    for size in ({}, {"height": 24, "width": 40}):
        generator = torch.Generator("cpu").manual_seed(5)
        shared = dict(negative_prompt="a cat", guidance_scale=3.0, **size)
        # 5 divides 1000: with other numbers of steps their DDIM steps to t - 1000 // steps, not to its next timestep
        expected = reference("a red heart", num_inference_steps=5, generator=generator, **shared).images
        stipple = model("a red heart", steps=5, sampler="ddim", seed=5, **shared)
        assert np.abs(pixels(stipple) - pixels(expected)).max() <= 1


def test_only_a_model_that_stable_diffusion_pipeline_computes_is_called_one(models):
    kinds = {name: json.loads((folder / "model_index.json").read_text()) for name, (_, folder) in models.items()}
    assert kinds["KL, CLIP"]["_class_name"] == "StableDiffusionPipeline"
    assert kinds["VQ, BERT"]["_class_name"] == kinds["KL, BERT, flow"]["_class_name"] == "TextToImage"
    assert kinds["VQ, BERT"]["vae"] == ["diffusers", "VQModel"]


def test_a_model_that_learned_variances_draws_by_them(tmp_path):
    model = build_model(tmp_path, encoder="bert")
    config = replace(model.unet.config, out_channels=2 * model.unet.config.out_channels)
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    learned = TextToImage(model.autoencoder, unet, model.conditioner, model.scheduling, model.defaults)
    same = dict(sampler="ddpm", steps=5, seed=3)
    pictures = [pixels(learned("a red heart", variance=variance, **same)) for variance in ("small", "large", "learned")]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))
    channels = model.unet.config.out_channels
    for output, exponent in ((-1.0, 0), (1.0, 1)):  # what stands for v = 0 and 1
        with torch.no_grad():
            unet.conv_out.weight[channels:].zero_()
            unet.conv_out.bias[channels:].fill_(output)
        assert (pixels(learned("a red heart", variance="learned", **same)) == pictures[exponent]).all()


def test_kept_transforms_change_no_picture_but_in_the_last_bits(models):
    model, folder = models["KL, CLIP"]
    kept = TextToImage.load(folder, keep_transforms=True)
    assert all(module.keeps_transform for module in kept.unet.modules() if isinstance(module, Convolution))
    assert abs(pixels(kept(PROMPTS)) - pixels(model(PROMPTS))).max() <= 1


def test_shift_moves_the_times_of_a_flow(model):
    plain, shifted, same = (pixels(model(PROMPTS[0], shift=shift)) for shift in (None, 3.0, 1.0))
    assert (plain == same).all() and (plain != shifted).any()


def test_several_weighted_prompts_are_composed(model):
    """Of weight 0 nothing is added; a prompt besides itself is more of it; against itself, nothing is left of it."""
    plain = pixels(model(PROMPTS[0], guidance_scale=3.0))
    assert (pixels(model(PROMPTS[0], guidance_scale=3.0, also=f"0 {PROMPTS[1]}")) == plain).all()
    twice = pixels(model(PROMPTS[0], guidance_scale=3.0, also=f"1 {PROMPTS[0]}"))
    assert abs(twice - pixels(model(PROMPTS[0], guidance_scale=6.0))).max() <= 1
    nothing = pixels(model(PROMPTS[0], guidance_scale=3.0, also=f"-1 {PROMPTS[0]}"))
    assert abs(nothing - pixels(model(PROMPTS[0], guidance_scale=0.0))).max() <= 1


def test_only_a_model_of_the_same_latents_and_text_can_be_the_weaker_one(models):
    model, _ = models["KL, CLIP"]
    with pytest.raises(ValueError, match="same autoencoder and text encoder"):
        model.guide_by(models["VQ, BERT"][0])
