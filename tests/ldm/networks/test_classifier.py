"""The classifier of noisy latents, its training, and guidance by its gradient and by that of a CLIP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import stipple.commands.drawing.drawing_command as drawing
from autoencoder import Pixels, open_autoencoder
from conditioning.classes.class_conditioner import Unconditional
from ldm.formats.classifier_folder import load_classifier, save_classifier
from ldm.networks.classifier import POOLS, Classifier, ClassifierConfig, classify, translated
from ldm.sampling.gradient_guides import ClassifierGuide, ClipGuide
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple.commands.drawing.open_model import Opening, open_for_drawing
from stipple.stages.classifier.classifier_run import ClassifierRunConfig, build_classifier
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, Records
from stipple_core.embedders import EmbedderConfig, build_embedder
from stipple_core.images.images import image_to_tensor
from tests.helpers.models.drawn import refused
from tests.helpers.models.pixel_models import PIXEL_UNET, pixel_model
from tests.helpers.models.small_models import build_model_of
from tests.helpers.training.tiny_runs import differing, final_state, run_here

NAMES = ("apple", "dress")
COMMAND = drawing.DrawingCommand(name="test", about="test", example="test")


def classifier(pool: str = "attention", **options) -> Classifier:
    torch.manual_seed(0)
    config = ClassifierConfig(
        unet=PIXEL_UNET, pool=pool, names=NAMES, schedule=ScheduleConfig(name="linear"),
        autoencoder=Pixels().fingerprint(), **options,
    )  # fmt: skip
    made = Classifier(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if "conv2" in name or "to_out" in name:
            torch.nn.init.normal_(weight, std=0.1)  # zero at construction: the residual branches are to count
    return made


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_is_read_back_as_it_was_and_reads_any_size(tmp_path, pool):
    stipple_result = classifier(pool)
    save_classifier(stipple_result, tmp_path)
    again, t = load_classifier(tmp_path), torch.tensor([5.0, 700.0])
    for side in (16, 24):
        z_t = torch.randn(2, 3, side, side)
        assert torch.equal(again(z_t, t), stipple_result(z_t, t)) and stipple_result(z_t, t).shape == (2, 2)
    assert again.config == stipple_result.config
    with pytest.raises(ValueError, match="is not a classifier of noisy latents"):
        pixel_model().save(tmp_path / "model")
        load_classifier(tmp_path / "model" / "unet")


def test_its_logits_depend_on_the_noise_level_and_not_on_the_schedule():
    stipple_result, vp, ve = classifier(), *(make_schedule(ScheduleConfig(name=name)) for name in ("linear", "ve"))
    z_0, noise = torch.randn(2, 2, 3, 16, 16)
    at = 0.4
    alpha, sigma = (level.item() for level in vp(at))
    far = ve.time(sigma / alpha).item()
    here = classify(stipple_result, vp, *translated(alpha * z_0 + sigma * noise, at, vp, vp))
    there = classify(stipple_result, vp, *translated(z_0 + sigma / alpha * noise, far, ve, vp))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-3)
    assert (here - classify(stipple_result, vp, alpha * z_0 + sigma * noise, 0.9)).abs().max() > 1e-4


def test_a_guide_moves_the_estimate_towards_its_class_and_away_below_zero():
    stipple_result, schedule = classifier(), make_schedule(ScheduleConfig(name="linear"))
    z_t = torch.randn(4, 3, 16, 16)

    def share(scale: float) -> float:
        pictures = [Settings(prompt="dress", classifier_scale=scale)] * 4
        z_0 = ClassifierGuide(stipple_result).around(lambda z, t: torch.zeros_like(z), pictures, schedule)(z_t, 0.5)
        moved = z_t + 0.01 * z_0 / max(abs(scale), 1)
        return classify(stipple_result, schedule, moved, 0.5).softmax(1)[:, 1].mean().item()

    assert share(-1.0) < share(1e-9) < share(1.0)


def test_images_guided_by_a_classifier_differ_and_at_scale_0_do_not():
    stipple_result = pixel_model()
    plain = image_to_tensor(stipple_result("", seed=1)[0])
    stipple_result.gradient_guides["classifier_scale"] = ClassifierGuide(classifier())
    same = image_to_tensor(stipple_result("", seed=1, classifier_scale=0.0, classifier_class="apple")[0])
    led = image_to_tensor(stipple_result("", seed=1, classifier_scale=100.0, classifier_class="apple")[0])
    assert torch.equal(plain, same) and not torch.equal(plain, led)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An open_clip model of random weights as a folder."""
    import open_clip

    from tests.helpers.models.small_clip import CONFIG, save

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save(open_clip.CLIP(**CONFIG), folder)
    return folder


def test_clip_guidance_raises_the_cosine_of_picture_and_prompt(clip):
    embedder = build_embedder(EmbedderConfig(name=f"local-dir:{clip}"))
    schedule, clean = make_schedule(ScheduleConfig(name="linear")), 0.1 * torch.randn(2, 3, 16, 16)
    pictures = [Settings(clip_prompt="a red circle", clip_scale=1.0)] * 2

    def cosine(images: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(embedder.images(images), embedder.texts(["a red circle"] * 2))

    with torch.inference_mode():  # as the pipeline has it
        led = ClipGuide(embedder.images, embedder.texts, Pixels().decode)
        z_0 = led.around(lambda z, t: clean, pictures, schedule)(clean, 0.5)
    step = (z_0 - clean) / (z_0 - clean).abs().max()
    assert (cosine(clean + 0.02 * step) > cosine(clean)).all()


def test_the_drawing_commands_take_a_classifier_and_a_clip(tmp_path, clip, capsys):
    pixel_model().save(tmp_path / "model")
    save_classifier(classifier(), tmp_path / "classifier")
    command = ["--prompt", "", "--checkpoint", f"{tmp_path}/model", "--outdir", f"{tmp_path}/out", "--seed", "1"]
    command += ["--classifier", f"{tmp_path}/classifier", "--classifier-scale", "3", "--classifier-class", "apple"]
    drawing.draw(
        COMMAND,
        [*command, "--clip-guidance", str(clip), "--clip-scale", "2", "--clip-prompt", "a red circle"],
    )
    (picture,) = (tmp_path / "out").glob("*.png")
    drawing.draw(COMMAND, ["--like", str(picture), "--outdir", f"{tmp_path}/again"])
    (again,) = (tmp_path / "again").glob("*.png")
    assert picture.read_bytes() == again.read_bytes()
    trained_on = classifier()
    trained_on.head.weight.data.add_(1)
    save_classifier(trained_on, tmp_path / "classifier")
    capsys.readouterr()
    drawing.draw(COMMAND, ["--like", str(picture), "--outdir", f"{tmp_path}/again"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "it will differ" in line]
    assert f"{picture} was made with classifier " in line
    drawing.draw(COMMAND, ["--like", str(picture), "--outdir", f"{tmp_path}/again", *command[8:10]])
    assert "it will differ" not in capsys.readouterr().err  # another was asked for


@pytest.mark.parametrize(("name", "scale"), [("classifier", "classifier-scale"), ("clip-guidance", "clip-scale")])
def test_a_guide_without_a_scale_is_refused(tmp_path, capsys, name, scale):
    for words in ((), (f"--{scale}", 0)):
        error = refused(partial(drawing.draw, COMMAND), capsys, tmp_path / "out", "a", f"--{name}", "FOLDER", *words)
        assert f"--{name} has no effect without its scale; add --{scale}" in error


@pytest.mark.parametrize(("saved", "precision"), [(None, "fp16"), (None, "bf16"), (torch.float16, "fp32")])
def test_a_classifier_of_an_autoencoder_guides_in_every_precision(tmp_path, saved, precision):
    stipple_result = build_model_of(Unconditional())
    stipple_result.autoencoder.save(tmp_path / "stage-1")
    trained_on = open_autoencoder(tmp_path / "stage-1").fingerprint()
    shape = replace(PIXEL_UNET, in_channels=4, out_channels=4)
    specified = ClassifierConfig(unet=shape, names=NAMES, autoencoder=trained_on)
    save_classifier(Classifier(specified), tmp_path / "classifier")
    stipple_result.save(tmp_path / "model", saved)
    asked = dict(checkpoint=f"{tmp_path}/model", classifier=f"{tmp_path}/classifier", precision=precision, device="cpu")
    model, _ = open_for_drawing(Opening(**asked), {})
    assert "classifier_scale" in model.gradient_guides


def test_a_guide_that_does_not_fit_is_refused_in_one_line(tmp_path):
    stipple_result = pixel_model()
    with pytest.raises(ValueError, match="classifier scale 3.0 needs a classifier of noisy latents: --classifier"):
        stipple_result("", classifier_scale=3.0)
    stipple_result.gradient_guides["classifier_scale"] = ClassifierGuide(classifier())
    with pytest.raises(ValueError, match="'dres' is no class of the classifier; did you mean 'dress'"):
        stipple_result("", classifier_scale=3.0, classifier_class="dres")
    stipple_result.save(tmp_path / "model")
    other = classifier()
    other.config = ClassifierConfig(unet=PIXEL_UNET, names=NAMES, autoencoder="another")
    save_classifier(other, tmp_path)
    with pytest.raises(ValueError, match="reads latents of another autoencoder"):
        open_for_drawing(Opening(checkpoint=f"{tmp_path}/model", classifier=str(tmp_path), device="cpu"), {})


TRAIN = [
    *(
        "stipple.commands.train_classifier",
        "--config",
        "configs/classifier/pixels-small.yaml",
        "data.folder=tests/pictures",
    ),
    *("data.captions=['{style}']", "data.image_size=16", "data.validation=0.2", "data.verify=false"),
    *("unet.sample_size=16", "unet.block_out_channels=[8, 16]", "unet.attention_levels=[false, true]"),
    *("unet.attention_heads=[1]", "unet.norm_num_groups=4", "trainer.batch_size=4", "trainer.micro_batch_size=2"),
    *("trainer.log_every=1", "validation.every=4", "validation.images=2", "validation.levels=2"),
]


def test_a_run_that_is_resumed_trains_the_same_classifier_to_the_last_bit(tmp_path, settings_of_runs):
    run_here(*TRAIN, f"run={tmp_path}/whole", "trainer.steps=4")
    for steps in (2, 4):
        run_here(*TRAIN, f"run={tmp_path}/resumed", f"trainer.steps={steps}")
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "resumed")
    assert not differing(tmp_path / "whole" / "model" / "classifier", tmp_path / "resumed" / "model" / "classifier")
    assert len(load_classifier(tmp_path / "whole" / "model").config.names) > 2


def test_a_class_that_only_held_out_pictures_have_is_one_of_the_classifiers_and_maps_are_refused():
    data = DataConfig(folder="", image_size=16)
    config = ClassifierRunConfig(data=data, autoencoder="pixels", unet=PIXEL_UNET)
    records = Records([Record("", "", (("cat",),))], [Record("", "", (("dog",),))], [])
    made, _ = build_classifier(config, records, torch.device("cpu"))
    assert list(made.config.names) == ["cat", "dog"]
    with pytest.raises(ValueError, match="data.maps maps has no effect"):
        build_classifier(replace(config, data=replace(data, maps="maps")), records, torch.device("cpu"))
