"""The pictures of diffusers' StableDiffusionPipeline, from the same folder, sampler and seed.

What diffusers does otherwise, and we do not, so that it is not compared:
- DDIMScheduler and PNDMScheduler step from t to t - 1000 // S whatever their list says. On leading times that is the
  next of them, on trailing ones where S divides 1000; on linspace never.
- One step of linspace begins at the first noise level in their Euler, Heun and DDIM, at t = 1 here.
- HeunDiscreteScheduler and PNDMScheduler ignore rescale_betas_zero_snr, so their noise levels are not the model's.
- The others put 2^-12 for an alpha of 0, which moved values by up to 0.7 / 255 in one step, 0.2 / 255 in more.
- Karras' times lie between the ends of their other spacing; here, as there for linspace, between those of all levels.
- Their trailing list has one time too many for some numbers of steps (61, 103, 121, ...: a rounding of numpy.arange).
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import txt2img
from ldm import TextToImage
from ldm.formats.diffusers.known_schedulers import CLASSES
from tests.helpers.models.small_models import build_model

SD = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
V = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
MODELS = {
    "SD1": (dict(prediction="noise"), SD),
    "SD2": (dict(prediction="velocity"), SD | V),
    "zero SNR": (
        dict(prediction="velocity"),
        SD | V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "VQ": (dict(prediction="noise", regularizer="vq"), SD | {"set_alpha_to_one": True, "_class_name": "DDIMScheduler"}),
}
SAMPLERS = ["ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"]
PROMPTS, NEGATIVE = ["a red heart", "a dark blue circle"], "a cat"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model as a folder that diffusers might have written, and opened by diffusers and by us."""
    built = {}
    for name, (options, scheduler) in MODELS.items():
        folder = tmp_path_factory.mktemp("model")
        build_model(tmp_path_factory.mktemp("encoder"), **options).save(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        index = json.loads((folder / "model_index.json").read_text())
        del index["_stipple"]
        index |= {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", scheduler["_class_name"]]}
        (folder / "model_index.json").write_text(json.dumps(index))
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        built[name] = folder, pipeline, pipeline.scheduler.config, TextToImage.load(folder)
    return built


def reference(models, name, sampler, seeds, spacing=None, **settings) -> torch.Tensor:
    """Pictures of diffusers [B, 3, H, W] in [0, 255], not rounded; its pipeline cannot decode with a VQModel itself."""
    _, pipeline, config, _ = models[name]
    change = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing} if spacing else {}
    pipeline.scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config, **change)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative = [NEGATIVE] * len(seeds)
    latents = pipeline(
        PROMPTS[: len(seeds)], negative_prompt=negative, generator=generators, output_type="latent", **settings
    ).images
    with torch.inference_mode():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (images.clamp(-1, 1) + 1) * 127.5


def stipple(models, name, sampler, seed, **settings) -> torch.Tensor:
    """Our pictures, the same."""
    model = models[name][-1]
    plan = model.plan(PROMPTS, sampler=sampler, seed=seed, negative_prompt=NEGATIVE, **settings)
    *_, last = model.sample(next(model.batches(plan, 2)))
    with torch.inference_mode():
        return (model.autoencoder.decode(last.z).clamp(-1, 1) + 1) * 127.5


def difference(models, name, sampler, steps, spacing=None, rescale=0.0, height=24, width=40) -> float:
    """The largest, in 1/255."""
    size = dict(height=height, width=width, guidance_scale=5.0, guidance_rescale=rescale)
    expected = reference(models, name, sampler, [5, 6], spacing, num_inference_steps=steps, **size)
    assert expected.std() > 10  # of something
    return (stipple(models, name, sampler, 5, steps=steps, spacing=spacing, **size) - expected).abs().max().item()


def comparable(name, sampler, spacing, steps) -> bool:
    walked = spacing or MODELS[name][1].get("timestep_spacing") or ("linspace" if sampler[0] in "eh" else "leading")
    if sampler in ("ddim", "pndm") and walked != "leading" and (walked == "linspace" or 1000 % steps):
        return False
    if name == "zero SNR" and (sampler in ("pndm", "heun") or spacing == "karras"):
        return False
    if spacing == "karras" and sampler not in ("euler", "heun", "dpmpp_2m", "unipc"):
        return False
    return not (walked in ("linspace", "karras") and steps == 1 and sampler not in ("dpmpp_2m", "unipc"))


def cases(names, spacings, steps):
    every = [(n, s, p, k) for n in names for s in SAMPLERS for p in spacings for k in steps]
    return [case for case in every if comparable(*case)]


@pytest.mark.parametrize(
    ("name", "sampler", "spacing", "steps"), cases(MODELS, [None], [1, 7]) + cases(["SD1"], [None], [30])
)
def test_a_model_makes_the_pictures_of_diffusers_with_every_sampler(models, name, sampler, spacing, steps):
    assert difference(models, name, sampler, steps) < (1 if name == "zero SNR" else 0.05)


@pytest.mark.parametrize(
    ("name", "sampler", "spacing", "steps"),
    cases(["SD1", "SD2"], ["leading", "trailing", "linspace", "karras"], [5]) + cases(["zero SNR", "VQ"], [None], [5]),
)
def test_a_model_makes_the_pictures_of_diffusers_with_every_spacing_and_rescaled_guidance(
    models, name, sampler, spacing, steps
):
    assert difference(models, name, sampler, steps, spacing, rescale=0.7) < (1 if name == "zero SNR" else 0.05)


@pytest.mark.parametrize(("name", "sampler"), [*(("SD1", sampler) for sampler in SAMPLERS), ("SD2", "ddim")])
def test_the_command_line_makes_the_png_of_diffusers(models, name, sampler, tmp_path, capsys):
    folder, pipeline, config, _ = models[name]
    arguments = [
        "--checkpoint",
        str(folder),
        "--outdir",
        str(tmp_path),
        "--sampler",
        sampler,
        "--seed",
        "11",
        "-n",
        "2",
    ]
    arguments += ["--steps", "4", "--negative-prompt", NEGATIVE, "--guidance-rescale", "0.5", "-H", "40", "-W", "24"]
    txt2img.main([PROMPTS[0], *arguments])
    made = [np.asarray(Image.open(path)).astype(int) for path in capsys.readouterr().out.split()]
    pipeline.scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (11, 12)]
    expected_value = dict(num_inference_steps=4, negative_prompt=NEGATIVE, guidance_rescale=0.5, height=40, width=24)
    expected = pipeline(PROMPTS[0], num_images_per_prompt=2, generator=generators, **expected_value).images
    assert np.abs(np.stack(made) - np.stack([np.asarray(image) for image in expected])).max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_diffusers_has_the_defaults_of_its_pipeline(models, name):
    defaults = models[name][-1].defaults
    kind = MODELS[name][1]["_class_name"]
    assert (CLASSES[defaults.sampler], defaults.steps, defaults.guidance_scale) == (kind, 50, 7.5)


def test_an_old_file_is_read_as_stable_diffusion_pipeline_reads_it(models, tmp_path):
    """Which sets steps_offset to 1 and clip_sample to false, whatever the file says."""
    folder = Path(tmp_path / "old")
    models["SD1"][-1].save(folder)
    for specified in ({"steps_offset": 0, "clip_sample": True}, {}):
        old = {name: value for name, value in SD.items() if name not in ("steps_offset", "clip_sample")} | specified
        old["_class_name"] = "DDIMScheduler"
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(old))
        assert TextToImage.load(folder).scheduling.offset == 1
