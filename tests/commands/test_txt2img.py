"""`stipple draw` and txt2img.py: what they write, what they refuse, how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stipple.commands.draw as draw
from ldm import TextToImage
from ldm.formats.single_file_writer import save_single_file
from ldm.guidance.registry import GUIDANCES
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS
from ldm.sampling.settings import Settings
from stipple.commands.drawing import open_model as opening
from stipple.commands.drawing.choices import RECOMMENDED
from stipple_core.images.drawn_pictures import RECORD, a1111_parameters, encode_png, read_record, write_numbered
from tests.helpers.single_files import build_parts, write_yaml
from tests.helpers.small_models import SIDE, build_model

SCRIPT = Path(__file__).parents[2] / "txt2img.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    build_model(tmp_path_factory.mktemp("encoder"), encoder="bert").save(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run the command in this process; returns the paths that it prints."""

    def call(*arguments) -> list[Path]:
        model = [] if "--checkpoint" in arguments or "--like" in arguments else ["--checkpoint", checkpoint]
        draw.main([str(word) for word in ["--outdir", tmp_path / "out", *model, *arguments]])
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return call


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-method", "apgg"], "did you mean apg?"),
        (["--guidance-method", "autoguidance"], "or --guidance-model"),
        (["--guidance-norm", 3], "is for method apg"),
        (["--guidance-start", 0.2, "--guidance-stop", 0.5], "must satisfy 1 >= start >= stop >= 0"),
        (["--guidance-percentile", 99], "needs a guidance bound"),
        (["--guidance-scale", "nan"], "finite"),
        (["--guidance-scale", "inf"], "finite"),
        (["--churn", 3], "churn 3.0 does not go with sampler"),
        (["--sampler", "heun", "--churn", -1], "churn -1.0 must be 0"),
        (["--sampler", "ddpm", "--variance", "learned"], "needs a model that learned it"),
        (["--sampler", "ode", "--tolerance", 0], "between 0 and 1"),
        (["--shift", 3], "is for schedule flow"),
        (["--reuse", 0], "at least 1"),
        (["--steps", 0], "at least 1"),
        (["--also", "a blue fish"], "must be a weight and a prompt"),
        (["--also", "nan a blue fish"], "finite"),
        (["--guidance-model", "checkpoints/emoji"], "give both, or none"),
        (["--perturbed-scale", 9], "is for perturbed_attention"),
        (["--also", "1 a fish", "--guidance-rescale", 1], "no guidance rescale"),
        (["--guidance-method", "cfg_plus_plus", "--guidance-bound", 1], "leave out guidance rescale"),
        (["--also", "1 a fish", "--guidance-method", "apg"], "goes with guidance method classifier_free"),
    ],
)
def test_invalid_settings_are_one_line(run, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run("a heart", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "guidance_method": ["apg"]},
        {"prompt": "a", "guidance_method": {"a": 1}},
        {"prompt": "a", "guidance_scale": 10**400},
        {"prompt": None, "steps": "two"},
    ],
    ids=["list", "dict", "digits", "null"],
)
def test_a_wrong_type_in_a_prompt_file_is_one_line(run, line, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    with pytest.raises(SystemExit) as stop:
        run("--from-file", tmp_path / "prompts.jsonl")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_null_in_a_prompt_file_leaves_a_setting_to_the_model(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "seed": None, "steps": 1, "sampler": None}))
    (path,) = run("--from-file", tmp_path / "prompts.jsonl")
    assert settings(path)["seed"] == 42 and settings(path)["sampler"] == "dpmpp_2m"


@pytest.mark.parametrize("flag", ["sampler", "guidance-method", "spacing"])
def test_help_recommends_three_choices_and_marks_the_default(run, flag, capsys):
    draw.main([f"--{flag}", "help"])
    names = {"sampler": SAMPLERS, "guidance-method": GUIDANCES, "spacing": SPACINGS}[flag]
    first, *lines, last = capsys.readouterr().out.splitlines()
    choices = [line.split()[0].removesuffix("*") for line in lines if line.startswith("  ") and line[2] != " "]
    assert sorted(choices) == sorted(names)
    recommended = list(RECOMMENDED[flag.replace("-", "_")])
    assert (first, choices[:3]) == ("recommended:", recommended)
    default = {"sampler": "unipc", "guidance-method": "classifier_free", "spacing": "ays"}[flag]
    assert [line.split()[0] for line in lines if "*" in line.split()[0]] == [f"{default}*"]
    assert last == "* the default of the model that comes with Stipple"


def test_help_marks_the_default_of_the_checkpoint(checkpoint, capsys):
    draw.main(["--sampler", "help", "--checkpoint", str(checkpoint)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  dpmpp_2m*")] == ["dpmpp_2m*"]
    assert lines[-1] == f"* the default of {checkpoint}"


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


@pytest.mark.parametrize("batch", [1, 3])
def test_like_redraws_the_same_bytes(run, batch):
    paths = run("a heart", "a café, 💚", "-n2", "--batch-size", batch, "--negative-prompt", "a\ncat", "--sampler=ddpm")
    for path in paths:
        (again,) = run("--like", path)
        assert again != path
        assert again.read_bytes() == path.read_bytes()


def test_flags_about_a_single_file_are_recorded_and_read_by_like(run, tmp_path, capsys):
    file, yaml = tmp_path / "model.safetensors", write_yaml(tmp_path)
    save_single_file(build_parts("bert", tmp_path / "words"), file)
    plain = ["--checkpoint", file, "--yaml", yaml, "--tokenizer", tmp_path / "words"]
    (path,) = run("a cat", *plain, "--prediction", "velocity", "--steps", 1)
    opening = {"config_yaml": str(yaml), "tokenizer": f"{tmp_path}/words", "prediction": "velocity"}
    assert opening.items() <= read_record(path).items() and "variant" not in read_record(path)
    (again,) = run("--like", path)
    assert again.read_bytes() == path.read_bytes()
    (other,) = run("--like", path, *plain)  # the record describes its own checkpoint only
    assert not np.array_equal(pixels(other), pixels(path)) and "prediction" not in read_record(other)
    for wrong, expected in ((plain[:2], "give its YAML"), ([*plain, "--variant", "fp16"], "variant is an option of")):
        with pytest.raises(SystemExit):
            run("a cat", *wrong)
        assert expected in capsys.readouterr().err


def test_flags_override_the_record_of_like(run, checkpoint):
    (path,) = run("a heart", "--steps", 2, "--seed", 5, "--negative-prompt", "a cat")
    changed = run("--like", path, "--steps", 3, "--seed", 8, "-n", 2, "--checkpoint", checkpoint, "--prompt", "a sun")
    for i, other in enumerate(changed):
        assert settings(other) == settings(path) | {"steps": 3, "seed": 8 + i, "prompt": "a sun"}


def test_a_grid_shows_all_pictures_and_is_redrawn_with_them(run):
    *paths, grid = run("a heart", "-n", 3, "--steps", 1, "--grid")
    assert grid.name == "grid-0000.png"
    assert len(paths) == 3
    assert np.array_equal(pixels(grid)[4 : 4 + SIDE, 4 : 4 + SIDE], pixels(paths[0]))
    *again, second = run("--like", grid)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert (second.name, second.read_bytes()) == ("grid-0001.png", grid.read_bytes())


def test_redrawing_with_another_model_warns(run, checkpoint, tmp_path, capsys):
    (path,) = run("a heart", "--steps", 1)
    record = read_record(path) | {"model_hash": "0123456789"}
    path.write_bytes(encode_png(Image.open(path), {RECORD: json.dumps(record)}))
    draw.main(["--like", str(path), "--outdir", str(tmp_path)])
    assert "was made by model 0123456789, this is" in capsys.readouterr().err


def test_other_programs_can_parse_the_metadata(run):
    (path,) = run('a "red, heart": one\ntwo', "--negative-prompt", "a cat", "--steps", 1, "--scale", 2.5)
    *prompt, negative, last = Image.open(path).info["parameters"].split("\n")
    assert "\n".join(prompt) == 'a "red, heart": one\ntwo'
    assert negative == "Negative prompt: a cat"
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'  # AUTOMATIC1111's own
    values = dict(re.findall(pattern, last))
    assert values.pop("Model hash") == read_record(path)["model_hash"]
    size = {"Size": f"{SIDE}x{SIDE}"}
    expected = {"Steps": "1", "Sampler": "DPM++ 2M", "CFG scale": "2.5", "Seed": "42", "Model": "small"}
    assert values == expected | size


def test_values_with_separators_are_quoted(run):
    picture = dict(prompt="p", negative_prompt="", steps=1, sampler="ddim", guidance_scale=1, seed=1, width=8, height=8)
    text = a1111_parameters(picture | {"eta": 0.5}, 'my "model", v2: new', "abc")
    assert json.loads(re.search(r"Model: (.*), Eta: 0.5$", text)[1]) == 'my "model", v2: new'


def test_the_record_names_model_precision_and_software(run, checkpoint):
    (path,) = run("a heart", "--steps", 1)
    record = read_record(path)
    assert (record["checkpoint"], record["precision"], record["device"]) == (str(checkpoint), "fp32", "cpu")
    assert record["torch"] == torch.__version__


def test_no_metadata_writes_none(run):
    (path,) = run("a heart", "--steps", 1, "--no-metadata")
    assert Image.open(path).info == {}


@pytest.mark.parametrize("prompt", ["\ud800 half", "nul \0 byte", "Ж 💚", "x" * 70_000])
def test_any_prompt_is_recorded_and_redrawn(run, prompt):
    (path,) = run("--steps", 1, "--prompt", prompt)
    assert settings(path)["prompt"] == prompt
    (again,) = run("--like", path)
    assert again.read_bytes() == path.read_bytes()


def test_files_are_numbered_above_the_highest_and_never_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("00007.png", "00012-upscaled.png", "99999.txt", "grid-0400.png", "cat.png"):
        (tmp_path / "out" / name).write_text(name)
    paths = run("a heart", "-n", 2, "--steps", 1)
    assert [path.name for path in paths] == ["00013.png", "00014.png"]
    paths[1].unlink()
    assert run("a heart", "--steps", 1)[0].name == "00014.png"
    assert (tmp_path / "out" / "00007.png").read_text() == "00007.png"


def test_two_processes_that_write_to_one_folder_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from stipple_core.images.drawn_pictures import write_numbered\n"
        "for i in range(100): write_numbered(f'{sys.argv[1]} {i}'.encode(), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, name, tmp_path], cwd=SCRIPT.parent) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    contents = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert sorted(contents) == sorted(f"{name} {i}" for name in "ab" for i in range(100))
    assert [text for text in contents if text[0] == "a"] == [f"a {i}" for i in range(100)]


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_numbered("not bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_previews_replace_one_file(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preview-0002.png").write_text("another file")
    (path,) = run("a heart", "--steps", 5, "--sampler", "euler", "--preview-every", 2)
    (preview,) = (tmp_path / "out").glob("preview-0003.png")
    assert sorted(p.name for p in path.parent.iterdir()) == ["00000.png", "preview-0002.png", preview.name]
    assert Image.open(preview).size == (SIDE, SIDE)
    assert not np.array_equal(pixels(preview), pixels(path))  # it shows step 4


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


def test_sampler_help_describes_each_sampler(capsys):
    draw.main(["--sampler", "help"])
    (heun,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "heun")
    assert "order 2  either by churn 2 S - 1 calls  linspace  Heun's rule" in heun


def test_the_default_checkpoint_comes_with_the_package(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stipple_core.resources.PACKAGES", checkpoint.parent)
    monkeypatch.setattr(opening, "CHECKPOINT", "small")
    draw.main(["a heart", "--steps=1"])
    assert capsys.readouterr().out == "outputs/00000.png\n"
    draw.main(["--like=outputs/00000.png"])
    assert Path("outputs/00001.png").read_bytes() == Path("outputs/00000.png").read_bytes()
    monkeypatch.setattr(opening, "CHECKPOINT", "large")
    with pytest.raises(SystemExit, match="2"):
        draw.main(["a heart"])
    assert "checkpoint large does not exist; give a model folder or file with --checkpoint" in capsys.readouterr().err


BAD = {
    "no prompt": ([], "there is no prompt; give one"),
    "unknown flag": (["a", "--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
    "no number": (["a", "--steps", "many"], "argument --steps/--ddim-steps: invalid int value: 'many'"),
    "sampler": (["a", "--sampler", "dpmp_2m"], "sampler 'dpmp_2m' is unknown; did you mean dpmpp_2m? There are ddim"),
    "steps 0": (["a", "--steps", "0"], "steps 0 must be at least 1"),
    "steps above T": (["a", "--steps", "2000"], "2000 steps is not between 1 and 1000"),
    "nan": (["a", "--scale", "nan"], "guidance scale nan must be a finite number"),
    "inf": (["a", "--guidance-scale=-inf"], "guidance scale -inf must be a finite number"),
    "eta": (["a", "--sampler", "ddim", "--eta", "2"], "eta 2.0 must be between 0"),
    "eta without use": (["a", "--eta", "1", "--sampler", "euler"], "eta 1.0 does not go with sampler euler"),
    "height": (["a", "--height", "30"], "height 30 is not a multiple of 4 (autoencoder downsampling); use 28 or 32"),
    "width 0": (["a", "-W", "0"], "width 0 is not a multiple of 4"),
    "spacing": (["a", "--spacing", "even"], "spacing 'even' is unknown; did you mean"),
    "rescale": (["a", "--guidance-rescale", "-1"], "guidance rescale -1.0 must be between 0 (off) and 1"),
    "seed": (["a", "--seed", "-5"], "seed -5 must be between 0 and 2^64 - 1; -1 alone"),
    "large seed": (["a", "--seed", str(2**64)], f"seed {2**64} must be between"),
    "num images": (["a", "-n", "0"], "--num-images 0 must be at least 1"),
    "batch size": (["a", "--batch-size", "-1"], "--batch-size -1 must be at least 1"),
    "preview": (["a", "--preview-every", "0"], "--preview-every 0 must be at least 1"),
    "checkpoint": (["a", "--checkpoint", "no/such"], "checkpoint no/such does not exist; give a model folder"),
    "no model": (["a", "--checkpoint", "{tmp}"], "{tmp} is not a model folder: there is no model_index.json"),
    "precision": (["a", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    "device": (["a", "--device", "toaster"], "device 'toaster' is not here; use auto"),
    "outdir in a file": (["a", "--outdir", "{tmp}/file/out"], "outdir {tmp}/file/out can't be made"),
    "outdir a file": (["a", "--outdir", "{tmp}/file"], "can't be made, because {tmp}/file is a file"),
    "no prompt file": (["--from-file", "{tmp}/none.txt"], "prompt file {tmp}/none.txt does not exist"),
    "empty prompt file": (["--from-file", "{tmp}/file"], "there is no prompt"),
    "binary prompt file": (["--from-file", "{tmp}/binary"], "prompt file {tmp}/binary is not UTF-8 text"),
    "broken line": (["--from-file", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl line 2 begins with {{ but is not"),
    "unknown key": (
        ["--from-file", "{tmp}/key.jsonl"],
        "line 1 has 'step', which is not a setting; did you mean steps?",
    ),
    "line without": (["--from-file", "{tmp}/without.jsonl"], "{tmp}/without.jsonl line 1 has no prompt"),
    "wrong type": (["--from-file", "{tmp}/type.jsonl"], "steps 'few' is not a whole number"),
    "wrong count": (["--from-file", "{tmp}/count.jsonl"], "num_images 'two' must be a whole number"),
    "like nothing": (["--like", "{tmp}/none.png"], "{tmp}/none.png does not exist"),
    "like a text": (["--like", "{tmp}/binary"], "{tmp}/binary is not a readable PNG file"),
    "like any picture": (["--like", "{tmp}/plain.png"], "{tmp}/plain.png does not contain its settings"),
    "like no JSON": (["--like", "{tmp}/odd.png"], "{tmp}/odd.png has a record that is not readable"),
    "like no picture": (["--like", "{tmp}/none-in.png"], "the record in {tmp}/none-in.png has no prompt"),
    "like a wrong one": (["--like", "{tmp}/wrong.png"], "place 3 must be between 0 and batch - 1"),
}


@pytest.fixture
def bad_files(tmp_path) -> Path:
    """Faulty files."""
    (tmp_path / "file").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "broken.jsonl").write_text('a heart\n{"prompt": \n')
    (tmp_path / "key.jsonl").write_text('{"prompt": "a", "step": 3}')
    (tmp_path / "without.jsonl").write_text('{"steps": 3}')
    (tmp_path / "type.jsonl").write_text('{"prompt": "a", "steps": "few"}')
    (tmp_path / "count.jsonl").write_text('{"prompt": "a", "num_images": "two"}')
    wrong = {"pictures": [{"prompt": "a", "batch": 2, "place": 3}]}
    records = {"plain": {}, "odd": {RECORD: "[[["}, "none-in": {RECORD: "{}"}, "wrong": {RECORD: json.dumps(wrong)}}
    records["none-in"] = {RECORD: '{"torch": "2"}'}
    for name, texts in records.items():
        (tmp_path / f"{name}.png").write_bytes(encode_png(Image.new("RGB", (8, 8)), texts))
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2_with_nothing_written(name, checkpoint, bad_files, capsys):
    arguments, message = BAD[name]
    before = sorted(bad_files.rglob("*"))
    model = [] if "--checkpoint" in arguments else ["--checkpoint", str(checkpoint)]
    model += [] if "--outdir" in arguments else ["--outdir", str(bad_files / "out")]
    with pytest.raises(SystemExit) as ended:
        draw.main([*model, *(word.format(tmp=bad_files) for word in arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message.format(tmp=bad_files) in err
    assert sorted(bad_files.rglob("*")) == before


def test_a_read_only_outdir_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)  # the superuser can write everywhere
    with pytest.raises(SystemExit, match="2"):
        run("a heart")
    assert "is read-only; use another --outdir" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_picture(run, tmp_path, monkeypatch, capsys):
    def full(self, *rest):
        raise OSError(28, "No space left on device", "00000.png")

    monkeypatch.setattr("stipple.commands.drawing.output.write_numbered", full)
    with pytest.raises(SystemExit, match="2"):
        run("a heart", "--steps", 1)
    assert capsys.readouterr().err == "error: 00000.png: No space left on device\n"


def test_too_little_memory_ends_in_one_line(run, monkeypatch, capsys):
    def starved(*rest):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")

    monkeypatch.setattr(TextToImage, "sample", starved)
    with pytest.raises(SystemExit, match="2"):
        run("a heart")
    assert capsys.readouterr().err.startswith("error: there is not enough memory; use a smaller")


def test_help_takes_less_than_a_second_and_imports_no_torch(tmp_path):
    code = "import sys, txt2img\ntry: txt2img.main(['--help'])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert "--guidance-scale" in done.stdout
    assert time.process_time() - started < 1


def test_ctrl_c_keeps_what_is_finished_and_exits_with_130(checkpoint, tmp_path):
    command = [sys.executable, SCRIPT, "a heart", "--checkpoint", checkpoint, "--outdir", "out", "-n", "2000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # background jobs ignore Ctrl-C, and so would the process
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=listen, **pipes)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; finished pictures are kept\n"
    paths = sorted((tmp_path / "out").iterdir())
    assert [tmp_path / line for line in (first + rest).splitlines()] == paths
    for path in paths:
        Image.open(path).load()


def test_drawing_imports_no_heavy_library_besides_torch(checkpoint, tmp_path):
    code = (
        "import sys, txt2img\n"
        f"txt2img.main(['a heart', '--steps=1', '--checkpoint={checkpoint}', '--outdir={tmp_path}'])\n"
        "print(*sorted({'transformers', 'open_clip', 'accelerate', 'torchvision', 'torch._dynamo', 'omegaconf'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(tmp_path / "00000.png"), ""], done.stderr
