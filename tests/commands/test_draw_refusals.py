"""What `stipple draw` refuses: one line, exit code 2, and nothing written."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

import stipple.commands.draw as draw
from ldm import TextToImage
from stipple_core.images.drawn_pictures import RECORD, encode_png


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
        (
            ["--guidance-method", "cfg_plus_plus", "--guidance-bound", 1],
            "does not support guidance rescale and guidance bound",
        ),
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
    "wrong count": (["--from-file", "{tmp}/count.jsonl"], "num images 'two' must be a whole number"),
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
