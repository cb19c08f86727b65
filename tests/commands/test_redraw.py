"""What is recorded in pictures, how it is read by --like and by other programs, and how files are numbered."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stipple.commands.draw as draw
from ldm.formats.single_file_writer import save_single_file
from stipple_core.images.drawn_pictures import RECORD, a1111_parameters, encode_png, read_record, write_numbered
from tests.helpers.models.single_files import build_parts, write_yaml
from tests.helpers.models.small_models import SIDE


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def settings(path: Path) -> dict:
    (picture,) = read_record(path)["pictures"]
    return picture


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
    for wrong, expected in (
        (plain[:2], "specify its YAML"),
        ([*plain, "--variant", "fp16"], "variant is an option of"),
    ):
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
    writers = [subprocess.Popen([*command, name, tmp_path], cwd=Path(__file__).parents[2]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    contents = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert sorted(contents) == sorted(f"{name} {i}" for name in "ab" for i in range(100))
    assert [text for text in contents if text[0] == "a"] == [f"a {i}" for i in range(100)]


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_numbered("not bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []
