"""The command `stipple`: help, misspelt commands and flags, exit codes, recipes by name."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stipple.__main__ import DRAWING, MODULES, OTHERS, START, TRAINING, help_text, main
from stipple.cli.argument_parser import FIRST
from stipple.cli.launch import without_launch_flags
from stipple.cli.training_arguments import TRAINING as TRAINING_COMMANDS
from stipple.cli.training_arguments import read_arguments
from stipple_core.resources import find_recipe, resource

ROOT = Path(__file__).parents[2]
COMMANDS = DRAWING | TRAINING | OTHERS


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_help_lists_every_command_and_five_to_start_with():
    text = help_text()
    assert len(START) == 5 and all(command in text for command, _ in START)
    assert all(re.search(rf"^  {name} +{purpose}$", text, re.MULTILINE) for name, purpose in COMMANDS.items())


def test_help_imports_nothing_heavy_and_takes_less_than_0_3_seconds():
    """As processor time, because other processes may keep the machine busy."""
    code = (
        "import sys, time\n"
        "from stipple.__main__ import main\n"
        "main(['--help'])\n"
        "print({'torch', 'numpy', 'argparse', 'omegaconf'} & set(sys.modules), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, seconds = done.stderr.rsplit(maxsplit=1)
    assert done.stdout.startswith("usage: stipple") and heavy == "set()" and float(seconds) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_starts_with_the_most_used_flags(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: stipple {name} ")
    groups = [line for line in out.splitlines() if re.fullmatch(r"[a-z ]+:", line)]
    assert groups[0] == f"{FIRST}:"


def test_help_of_training_commands_imports_no_torch():
    code = (
        "import contextlib, sys\n"
        "from stipple.__main__ import TRAINING, main\n"
        "for name in TRAINING:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "False\n" and done.stdout.count("--processes N") == len(TRAINING)


def test_every_command_has_a_module_with_a_main():
    assert TRAINING.keys() == TRAINING_COMMANDS.keys()
    for name in DRAWING | OTHERS:
        assert callable(importlib.import_module(f"stipple.commands.{MODULES.get(name, name)}").main)
    for command in TRAINING_COMMANDS.values():
        module = importlib.import_module(command.module)
        assert callable(module.main) and callable(module.read_config) and callable(module.run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drow"], "command 'drow' is unknown; did you mean draw?"),
        (["xyz"], "command 'xyz' is unknown; the commands are draw, img2img"),
        (["train", "--confg", "emoji"], "unrecognized arguments: --confg; did you mean --config?"),
        (["train", "--config", "emojy"], "config file emojy does not exist; did you mean emoji?"),
        (["train", "--config", "emoji", "data.fold=x"], "unknown config key data.fold; did you mean data.folder?"),
        (["train", "--config", "emoji", "--processes", "2", "data.fold=x"], "did you mean data.folder?"),
        (["cache", "--config", "tiny"], "cache has no value; set it to the folder to write to: cache=FOLDER"),
        (["convert", "a", "b", "--precisoin", "fp16"], "did you mean --precision?"),
        (["embed", "--nam", "x"], "the following arguments are required"),
        (["config", "trian"], "invalid choice: 'trian'"),
        (["config", "train", "trainer.step"], "train has no config key trainer.step; did you mean trainer.steps?"),
        (["signal", "nowhere", "stop"], "nowhere is not a run folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest(words, message, capsys):
    assert message in refused(capsys, *words)


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("stipple.__main__.run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["draw"])
    assert capsys.readouterr().err == "interrupted\n"


def test_output_that_nobody_reads_to_its_end_is_no_error():
    command = f"{sys.executable} -m stipple config train-classifier | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_recipes_are_found_by_name_and_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", "emoji.yaml", "configs/ldm/emoji.yaml"):
        assert find_recipe(name, ["ldm", "finetune"]) == str(ROOT / "configs" / "ldm" / "emoji.yaml")
    assert find_recipe("lora", ["ldm", "finetune"]) == str(ROOT / "configs" / "finetune" / "lora.yaml")
    assert read_arguments("train-autoencoder", ["--config", "emoji"]).config.endswith("configs/autoencoder/emoji.yaml")
    Path("emoji").write_text("seed: 1")
    assert find_recipe("emoji", ["ldm"]) == "emoji"  # a file of the current folder comes first
    assert resource("checkpoints/emoji").is_dir()


def test_an_installed_package_has_its_resources_inside(tmp_path, monkeypatch):
    (tmp_path / "stipple" / "configs").mkdir(parents=True)
    monkeypatch.setattr("stipple_core.resources.PACKAGES", tmp_path)
    assert resource("configs") == tmp_path / "stipple" / "configs"
    assert resource("checkpoints") == tmp_path / "checkpoints"


def test_launch_flags_are_not_passed_to_the_processes():
    words = [
        "--processes",
        "2",
        "--config",
        "a",
        "--config_file=b",
        "--config-file",
        "c",
        "--machine_rank",
        "1",
        "x=--processes",
        "--compile",
    ]
    assert without_launch_flags(words) == ["--config", "a", "x=--processes", "--compile"]


def test_the_module_is_the_command(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stipple", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("stipple ")


@pytest.mark.parametrize(("output", "code"), [(">&-", 0), ("> /dev/full", 1)])
def test_output_that_cannot_be_written_is_no_traceback(output, code):
    command = f"{sys.executable} -m stipple --help {output}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == code and (code == 0 or "can't be written" in done.stderr)


@pytest.mark.parametrize("flag", ["--checkpoint", "--outdir", "--like"])
def test_an_empty_value_of_a_path_is_a_mistake(flag, capsys):
    assert f"{flag} is empty" in refused(capsys, "draw", "a heart", flag, "")


def test_a_word_that_only_resembles_a_launch_flag_stays():
    assert without_launch_flags(["x./processes", "./config_file", "--processes=2"]) == ["x./processes", "./config_file"]
