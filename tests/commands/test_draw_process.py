"""txt2img.py as a process; `help` of samplers, guidance methods and spacings; the default checkpoint."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import stipple.commands.draw as draw
from ldm.guidance.registry import GUIDANCES
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS
from stipple.commands.drawing import open_model as opening
from stipple.commands.drawing.choices import RECOMMENDED

SCRIPT = Path(__file__).parents[2] / "txt2img.py"


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
