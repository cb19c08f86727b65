"""What the drawing commands share: one table of flags, fields of what they set, and --help at once."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import stipple.commands.draw as draw
import stipple.commands.drawing.drawing_command as drawing
import stipple.commands.img2img as img2img
import stipple.commands.inpaint as inpaint
import stipple.commands.sample as sample
import stipple.commands.upscale as upscale
from ldm.sampling.settings import Settings
from stipple.commands.drawing.flags import INPUTS, MODEL, PICTURE, RUN
from stipple.commands.drawing.open_model import Opening

ROOT = Path(draw.__file__).parents[2]
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in (draw, img2img, inpaint, upscale, sample)}


def test_every_flag_is_a_field_and_every_field_that_a_user_sets_is_a_flag():
    assert {*PICTURE, *INPUTS} == {field.name for field in fields(Settings)} - {"prompt", "seed", "batch", "place"}
    assert set(MODEL) == {field.name for field in fields(Opening)}
    assert len({*PICTURE, *INPUTS, *MODEL, *RUN}) == sum(map(len, (PICTURE, INPUTS, MODEL, RUN)))


@pytest.mark.parametrize("name", COMMANDS)
def test_all_commands_have_the_same_flags(name):
    command = COMMANDS[name].COMMAND
    flags = {word for action in drawing.make_parser(command)._actions for word in action.option_strings}
    plain = {word for action in drawing.make_parser(draw.COMMAND)._actions for word in action.option_strings}
    assert flags == plain | set(command.spellings)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_thin(name):
    assert len(Path(COMMANDS[name].__file__).read_text().splitlines()) < 80


def test_help_of_every_command_imports_no_torch():
    code = (
        "import contextlib, importlib, io, sys\n"
        f"for name in {list(COMMANDS)}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(f'stipple.commands.{name}').main(['--help'])\n"
        "    assert '--strength' in out.getvalue(), name\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    ("name", "words", "settings", "prompts"),
    [
        ("draw", ["a", "--steps", "3", "b", "--prompt", "c"], {"steps": 3}, ["a", "b", "c"]),
        ("img2img", ["x.png", "--strength", "0.5", "a", "b"], {"image": "x.png", "strength": 0.5}, ["a", "b"]),
        ("img2img", ["a", "--image", "x.png"], {"image": "x.png"}, ["a"]),
        ("inpaint", ["x.png", "m.png", "--", "--a"], {"image": "x.png", "mask": "m.png"}, ["--a"]),
        ("inpaint", ["x.png", "--mask", "m.png", "a"], {"image": "x.png", "mask": "m.png"}, ["a"]),
        ("upscale", ["x.png"], {"image": "x.png"}, []),
        ("sample", ["--class-name", "a", "--layout", "b"], {}, ["a", "b"]),
        ("sample", ["--also", "1 a", "--also", "2 b"], {"also": "1 a\n2 b"}, []),
        ("img2img", ["--like", "y.png", "--prompt", "a"], {}, ["a"]),
        ("img2img", ["--like", "y.png", "a", "b"], {}, ["a", "b"]),
        ("inpaint", ["--like", "y.png", "a", "--image", "x.png"], {"image": "x.png"}, ["a"]),
    ],
)
def test_first_words_are_files_and_the_others_prompts(name, words, settings, prompts):
    command = COMMANDS[name].COMMAND
    request = drawing.read_request(command, drawing.read_arguments(command, words))
    assert (request.settings, request.prompts) == (settings, prompts)
