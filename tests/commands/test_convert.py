"""`stipple convert` between single files and model folders: round trips, and errors of one line that write nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoencoder import Autoencoder
from ldm.formats.model_folder import save_model
from ldm.formats.opening import open_model
from ldm.formats.single_file_writer import save_first_stage, save_single_file
from stipple.commands.convert import main
from stipple_core.files.weights import read_weights, write_weights
from tests.helpers.models.single_files import build_parts, save_words, write_yaml

ROOT = Path(__file__).parents[2]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with the file of an unconditional model, a YAML config for it, and faulty files."""
    folder = tmp_path_factory.mktemp("sources")
    write_yaml(folder)
    save_single_file(build_parts("unconditional", folder / "words"), folder / "good.safetensors")
    data, state = (folder / "good.safetensors").read_bytes(), read_weights(folder / "good.safetensors")
    (folder / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "web page.ckpt").write_text("<html>404</html>")
    torch.save({"state_dict": state | {"bomb": Bomb(folder / "ran")}}, folder / "pickled.ckpt")
    prefix = "model.diffusion_model.input_blocks.1."
    names = [name for name in state if name.startswith(prefix) and "out_layers.3" not in name]
    write_weights(state | {name: torch.zeros(7) for name in names[:8]}, folder / "misshapen.safetensors")
    kernels = [name for name in state if name.startswith("model.diffusion_model.") and state[name].ndim == 4]
    write_weights(state | {name: torch.zeros(3) for name in kernels[:8]}, folder / "flat.safetensors")
    write_weights(state | {kernels[0]: torch.full_like(state[kernels[0]], torch.nan)}, folder / "nan.safetensors")
    few = {name: value for name, value in state.items() if not name.startswith("first_stage_model.decoder.up.0.b")}
    write_weights(few, folder / "incomplete.safetensors")
    write_weights({f"layers.{i}.weight": torch.zeros(2) for i in range(9)}, folder / "unknown.safetensors")
    return folder


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def convert(*arguments):
    """Run the command as a process; return its exit code and what it writes to standard error."""
    command = [sys.executable, "-m", "stipple.commands.convert", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr.strip()


def test_converting_a_file_to_a_folder_and_back_keeps_all_tensors(sources, tmp_path):
    code, message = convert(sources / "good.safetensors", tmp_path / "new" / "model", "--yaml", sources / "model.yaml")
    assert (code, message) == (0, "")
    assert (tmp_path / "new" / "model" / "model_index.json").is_file()
    main([str(tmp_path / "new" / "model"), str(tmp_path / "other" / "back.safetensors")])
    assert same(read_weights(tmp_path / "other" / "back.safetensors"), read_weights(sources / "good.safetensors"))


FAULTS = {
    "truncated.safetensors": "is not a readable safetensors file",
    "web page.ckpt": "is not a readable file of torch.save",
    "pickled.ckpt": "contains more than tensors, and reading it would run code",
    "flat.safetensors": r"other numbers or dimensions: (\S* is \[3\];? ?){5}; and 3 more",
    "nan.safetensors": r"the UNet does not fit its configuration: conv_in.weight has values that are not finite",
    "misshapen.safetensors": r"input_blocks.1.0.in_layers.0.weight is \[7\], not \[64\]; (\S* is .*){4}; and 3 more",
    "incomplete.safetensors": r"decoder.up.0.block.0.norm1.weight is missing; (\S* is missing; ){4}and 13 more",
    "unknown.safetensors": "no key begins with model.diffusion_model.; the first keys are layers.0.weight, layers.1",
    "absent.safetensors": "does not exist",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_source_is_reported_in_one_line_and_nothing_is_written(name, sources, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(sources / name), str(tmp_path / "new" / "model"), "--yaml", str(sources / "model.yaml")])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert re.search(FAULTS[name], message), message
    assert not any(tmp_path.iterdir()) and not (sources / "ran").exists()


def test_the_process_exits_with_2_and_one_line(sources, tmp_path):
    code, message = convert(sources / "truncated.safetensors", tmp_path / "model")
    assert code == 2 and message.startswith("error: ") and "\n" not in message and not any(tmp_path.iterdir())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1
    return message


def test_existing_targets_and_unknown_flags_are_refused(sources, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert "exists already" in refused(capsys, sources / "good.safetensors", tmp_path / "taken")
    assert "both files" in refused(capsys, sources / "good.safetensors", tmp_path / "x.safetensors")
    assert "must end in .safetensors" in refused(capsys, tmp_path / "taken", tmp_path / "x.ckpt")
    assert "--precision" in refused(capsys, sources / "good.safetensors", tmp_path / "m", "--precision", "fp8")
    assert "heads of a UNet" in refused(capsys, sources / "good.safetensors", tmp_path / "m")  # without its YAML config
    assert "is the model folder complete" in refused(capsys, tmp_path / "taken", tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_model_that_the_compvis_format_cannot_hold_writes_nothing(sources, tmp_path, capsys):
    from tests.helpers.models.small_models import build_model

    build_model(tmp_path / "own").save(tmp_path / "model")
    before = sorted(tmp_path.iterdir())
    message = refused(capsys, tmp_path / "model", tmp_path / "new" / "x.safetensors")
    assert "norm_num_groups 8 can't be stored in a CompVis file" in message
    assert sorted(tmp_path.iterdir()) == before


def test_precision_is_that_of_the_source_unless_specified(sources, tmp_path):
    source, yaml = str(sources / "good.safetensors"), str(sources / "model.yaml")
    main([source, str(tmp_path / "half"), "--yaml", yaml, "--precision", "fp16"])
    main([str(tmp_path / "half"), str(tmp_path / "same.safetensors")])
    main([str(tmp_path / "half"), str(tmp_path / "full.safetensors"), "--precision", "fp32"])
    weight = "model.diffusion_model.out.2.weight"
    half, full = (read_weights(tmp_path / f"{name}.safetensors")[weight] for name in ("same", "full"))
    assert (half.dtype, full.dtype) == (torch.float16, torch.float32) and torch.equal(half.float(), full)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_a_first_stage_converts_to_a_folder_with_vae_and_back(regularizer, tmp_path):
    parts = build_parts("sd1" if regularizer == "kl" else "class", save_words(tmp_path / "words"))
    source = tmp_path / "vae.safetensors"
    save_first_stage(parts.autoencoder, source)
    torch.save({"state_dict": read_weights(source) | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    main([str(tmp_path / "vae.ckpt"), str(tmp_path / "model")])
    assert [path.name for path in sorted((tmp_path / "model").iterdir())] == ["manifest.json", "vae"]
    assert same(Autoencoder.load(tmp_path / "model").state_dict(), parts.autoencoder.state_dict())
    main([str(tmp_path / "model"), str(tmp_path / "back.safetensors")])
    assert same(read_weights(tmp_path / "back.safetensors"), read_weights(source))


def test_a_variant_of_a_folder_is_converted(sources, tmp_path):
    save_model(build_parts("unconditional", tmp_path), tmp_path / "model", torch.float16)
    for path in list((tmp_path / "model").rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    main([str(tmp_path / "model"), str(tmp_path / "x.safetensors"), "--variant", "fp16"])
    expected = open_model(tmp_path / "model").unet.conv_in.weight.half()
    assert torch.equal(
        read_weights(tmp_path / "x.safetensors")["model.diffusion_model.input_blocks.0.0.weight"], expected
    )
