"""`stipple draw`: prompts, flags and prompt files become pictures."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stipple.commands.draw as draw
from ldm import TextToImage
from ldm.sampling.settings import Settings
from stipple_core.images.drawn_pictures import read_record
from tests.helpers.models.small_models import SIDE


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def settings(path: Path) -> dict:
    (picture,) = read_record(path)["pictures"]
    return picture


def test_the_command_and_python_draw_the_same_picture(run, checkpoint, tmp_path):
    (path,) = run("a red heart", "--steps", 3, "--seed", 5)
    assert path == tmp_path / "out" / "00000.png"
    (expected,) = TextToImage.load(checkpoint)("a red heart", steps=3, seed=5)
    assert np.array_equal(pixels(path), np.asarray(expected))


def test_every_spelling_of_a_flag_sets_its_setting(run):
    (path,) = run(
        "--prompt", "a heart", "--negative_prompt=a cat", "--cfg_scale", 2, "--ddim_steps", 3, "--sampler", "ddim",
        "--eta", 0.5, "--guidance_rescale", 0.7, "--spacing", "karras", "-H", 24, "-W", 40, "--seed", 9,
    )  # fmt: skip
    expected = dict(prompt="a heart", negative_prompt="a cat", guidance_scale=2.0, steps=3, sampler="ddim", eta=0.5)
    expected |= dict(height=24, width=40, seed=9, batch=1, place=0, spacing="karras", guidance_rescale=0.7)
    assert settings(path) == asdict(Settings()) | expected
    assert Image.open(path).size == (40, 24)
    (same,) = run(
        "--scale=2", "--negative-prompt", "a cat", "--steps=3", "--sampler=ddim", "--eta=.5", "--height=24",
        "--guidance-rescale=.7", "--spacing=karras",
        "--width=40", "--seed=9", "--", "a heart",
    )  # fmt: skip
    assert same.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        {"guidance-method": "apg", "guidance-norm": 2.0, "guidance-start": 0.9, "guidance-stop": 0.2},
        {"guidance-method": "perturbed_attention", "perturbed-scale": 2.0, "reuse": 2},
        {"guidance-method": "cfg_plus_plus", "sampler": "ddim"},
        {"guidance-method": "cfg_zero_star", "guidance-bound": 2.0, "guidance-percentile": 95.0},
        {"sampler": "heun", "churn": 3.0},
        {"sampler": "ddpm", "variance": "large"},
        {"sampler": "ode", "tolerance": 0.1},
        {"also": "0.5 a blue fish", "negative-prompt": "a sun"},
    ],
    ids=lambda flags: next(iter(flags.values())),
)
def test_flags_of_guidance_and_samplers_change_the_picture_and_are_recorded(run, flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    sampler = flags.get("sampler", "dpmpp_2m")
    (plain,), (path,) = run("a heart", "--steps", 4, "--sampler", sampler), run("a heart", "--steps", 4, *words)
    assert settings(path).items() >= {name.replace("-", "_"): value for name, value in flags.items()}.items()
    assert not np.array_equal(pixels(path), pixels(plain))
    (again,) = run("--like", path)
    assert again.read_bytes() == path.read_bytes()


def test_autoguidance_records_the_weaker_model(run, checkpoint, tmp_path, capsys):
    weaker = tmp_path / "weaker"
    model = TextToImage.load(checkpoint)
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(0.5)
    model.save(weaker)
    flags = ["--guidance-method", "autoguidance", "--guidance-model", weaker, "--guidance-scale", 2]
    (path,) = run("a heart", "--steps", 2, *flags)
    assert read_record(path)["guidance_model"] == str(weaker)
    (same,), (plain,) = run("--like", path), run("a heart", "--steps", 2, "--guidance-scale", 1)
    assert same.read_bytes() == path.read_bytes() and not np.array_equal(pixels(path), pixels(plain))
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(0.5)
    model.save(weaker)
    draw.main(["--like", str(path), "--outdir", str(tmp_path / "out")])
    assert f"{path} was made with guidance model" in capsys.readouterr().err


def test_null_in_a_prompt_file_leaves_a_setting_to_the_model(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "seed": None, "steps": 1, "sampler": None}))
    (path,) = run("--from-file", tmp_path / "prompts.jsonl")
    assert settings(path)["seed"] == 42 and settings(path)["sampler"] == "dpmpp_2m"


def test_a_prompt_may_begin_with_a_dash_after_two_dashes(run):
    (path,) = run("--steps", 1, "--", "--no_such_flag")
    assert settings(path)["prompt"] == "--no_such_flag"


def test_prompts_are_drawn_in_order_and_seeds_count_up(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fish\n\n  a cat  \r\n", encoding="utf-8-sig")
    paths = run("a heart", "--prompt", "a sun", "--from-file", tmp_path / "prompts.txt", "-n", 2, "--steps", 1)
    made = [(settings(path)["prompt"], settings(path)["seed"]) for path in paths]
    assert made == [(p, 42 + 2 * i + j) for i, p in enumerate(["a heart", "a sun", "a fish", "a cat"]) for j in (0, 1)]
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(8)]


def test_lines_of_json_set_their_own_settings(run, tmp_path):
    lines = [{"prompt": "a fish", "seed": 7, "steps": 2}, {"prompt": "a cat", "num_images": 2, "guidance_scale": 1}]
    text = "\n".join(map(json.dumps, lines)) + "\na sun\n"
    (tmp_path / "prompts.jsonl").write_text(text)
    paths = run("--from-file", tmp_path / "prompts.jsonl", "--steps", 1, "--seed", 7)
    made = [settings(path) for path in paths]
    assert [p["seed"] for p in made] == [7, 8, 9, 10]
    assert [p["steps"] for p in made] == [2, 1, 1, 1]
    assert [p["guidance_scale"] for p in made] == [3.0, 1.0, 1.0, 3.0]


def test_seed_minus_1_is_random_and_recorded(run):
    first, second = run("a heart", "--seed", -1, "-n", 2, "--steps", 1)
    (third,) = run("a heart", "--seed", -1, "--steps", 1)
    assert settings(second)["seed"] == settings(first)["seed"] + 1
    assert settings(third)["seed"] not in (42, settings(first)["seed"])


def test_a_prompt_that_is_too_long_warns_of_what_was_cut(run, checkpoint, tmp_path, capsys):
    draw.main(["heart " * 30 + "and a cat", "--steps=1", f"--checkpoint={checkpoint}", f"--outdir={tmp_path}"])
    err = capsys.readouterr().err
    assert err.startswith("warning: a prompt is longer than 24 tokens; not seen by the model: ")
    assert "and a cat" in err
    assert err.count("\n") == 1


def test_half_precision_on_a_cpu_warns_and_works(run, checkpoint, tmp_path, capsys):
    arguments = ["a cat", "--steps=1", "--precision=bf16", f"--checkpoint={checkpoint}", f"--outdir={tmp_path}"]
    draw.main(arguments)
    assert "warning: torch.bfloat16 is 40 to 100 times slower" in capsys.readouterr().err
    assert read_record(tmp_path / "00000.png")["precision"] == "bf16"


def test_previews_replace_one_file(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preview-0002.png").write_text("another file")
    (path,) = run("a heart", "--steps", 5, "--sampler", "euler", "--preview-every", 2)
    (preview,) = (tmp_path / "out").glob("preview-0003.png")
    assert sorted(p.name for p in path.parent.iterdir()) == ["00000.png", "preview-0002.png", preview.name]
    assert Image.open(preview).size == (SIDE, SIDE)
    assert not np.array_equal(pixels(preview), pixels(path))  # it shows step 4
