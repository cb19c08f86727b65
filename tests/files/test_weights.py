"""Weight files: all formats read alike, code in a file is never run, and each error is one line."""

import errno
import json
import math
import os
import pickle
import stat
import struct
import sys
import time
import types

import pytest
import torch
from safetensors import SafetensorError

import stipple_core.files.safetensors_file
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import (
    averaged_keys,
    find_weights,
    misfits,
    outline,
    place,
    read_folder,
    read_metadata,
    read_weights,
    write_weights,
)

STEM = "diffusion_pytorch_model"


def tensors(count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3, i + 1, generator=g) for i in range(count)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_as(kind, weights, folder):
    """Write weights in one of the formats that are in use."""
    if kind == "safetensors":
        path = folder / "x.safetensors"
        write_weights(weights, path)
        return path
    path = folder / "x.ckpt"
    nested = {"state_dict": weights, "epoch": 3, "global_step": 10}
    torch.save(weights if kind == "bare" else nested, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bare", "nested", "legacy"])
def test_every_format_gives_the_same_tensors(kind, tmp_path):
    assert same(read_weights(save_as(kind, tensors(), tmp_path)), tensors())


@pytest.mark.parametrize("kind", ["safetensors", "bare", "nested", "legacy"])
def test_only_wanted_tensors_are_read_and_the_outline_has_them_all(kind, tmp_path):
    weights = tensors() | {"half": torch.ones(2, dtype=torch.float16), "steps": torch.tensor(3)}
    path = save_as(kind, weights, tmp_path)
    assert same(read_weights(path, lambda name: name == "half"), {"half": weights["half"]})
    shapes = outline(path)
    assert all(value.is_meta for value in shapes.values())
    described = [{name: (value.shape, value.dtype) for name, value in state.items()} for state in (shapes, weights)]
    assert described[0] == described[1]


@pytest.mark.parametrize("kind", ["safetensors", "bare"])
def test_tensors_do_not_depend_on_the_file_after_reading(kind, tmp_path):
    path = save_as(kind, tensors(), tmp_path)
    weights = read_weights(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(weights, tensors())


def test_an_expanded_tensor_takes_no_memory(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "x.ckpt")
    assert read_weights(tmp_path / "x.ckpt")["a"].shape == (1 << 40,)


@pytest.mark.parametrize("other", [tensors(20, seed=1), tensors(3), {"a": torch.zeros(3)}, None])
def test_a_file_replaced_while_it_is_read_is_an_error_and_never_a_mixture(other, tmp_path, monkeypatch):
    path, opened = tmp_path / "x.safetensors", []
    write_weights(tensors(20), path)
    safe_open = stipple_core.files.safetensors_file.safe_open

    def replacing(*arguments, **options):
        opened.append(1)
        if len(opened) == 3:  # the header and one tensor are read
            path.unlink() if other is None else write_weights(other, path)
        return safe_open(*arguments, **options)

    monkeypatch.setattr(stipple_core.files.safetensors_file, "safe_open", replacing)
    monkeypatch.setattr(stipple_core.files.safetensors_file, "MAPPED_TOGETHER", 1)
    with pytest.raises(ValueError, match="x.safetensors was replaced while it was read; try again") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_written_files_are_complete_readable_by_all_and_have_their_metadata(tmp_path):
    tied = torch.randn(2, 3)
    weights = {"a": tied, "b": tied, "t": torch.randn(3, 2).T, "half": torch.ones(2, dtype=torch.float16)}
    path = tmp_path / "x.safetensors"
    write_weights(weights, path, {"modelspec.title": "x"})
    assert same(read_weights(path), weights)
    assert read_metadata(path) == {"format": "pt", "modelspec.title": "x"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def write_parts(weights, folder, suffix, variant, count=2):
    """Write several weight files and their index, under the names of diffusers and transformers."""
    stem, middle = STEM, f".{variant}" if variant else ""
    where = {}
    for i in range(count):
        part = dict(list(weights.items())[i::count])
        name = f"{stem}{middle}-{i + 1:05d}-of-{count:05d}.{suffix}"
        torch.save(part, folder / name) if suffix == "bin" else write_weights(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = f"{stem}.{suffix}.index{middle}.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_folders_are_read_from_one_file_or_several_with_or_without_a_variant(suffix, variant, in_parts, tmp_path):
    if in_parts:
        write_parts(tensors(), tmp_path, suffix, variant)
    else:
        path = tmp_path / ".".join(filter(None, (STEM, variant, suffix)))
        torch.save(tensors(), path) if suffix == "bin" else write_weights(tensors(), path)
    assert same(read_folder(tmp_path, STEM, variant), tensors())
    assert same(read_folder(tmp_path, STEM), tensors())  # the only variant there is
    assert outline(find_weights(tmp_path, STEM)).keys() == tensors().keys()


def test_transformers_bin_files_have_their_own_stem(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert same(read_folder(tmp_path, "model"), tensors())


def test_the_plain_file_comes_before_variants_and_safetensors_before_pickles(tmp_path):
    torch.save(tensors(seed=1), tmp_path / f"{STEM}.bin")
    write_weights(tensors(seed=2), tmp_path / f"{STEM}.safetensors")
    write_weights(tensors(seed=3), tmp_path / f"{STEM}.fp16.safetensors")
    assert same(read_folder(tmp_path, STEM), tensors(seed=2))
    assert same(read_folder(tmp_path, STEM, "fp16"), tensors(seed=3))


def test_the_error_for_a_missing_variant_names_the_available_ones(tmp_path):
    for variant in ("fp16", "non_ema"):
        write_weights(tensors(), tmp_path / f"{STEM}.{variant}.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"no {STEM}.bf16.safetensors in .*there are .*fp16.safetensors"):
        find_weights(tmp_path, STEM, "bf16")
    with pytest.raises(FileNotFoundError, match="there are .*non_ema"):
        find_weights(tmp_path, STEM)  # which of the two?
    with pytest.raises(FileNotFoundError, match="is the model folder complete"):
        find_weights(tmp_path / "nowhere", STEM)


def test_a_missing_file_of_an_index_is_named(tmp_path):
    write_parts(tensors(), tmp_path, "safetensors", None)
    (tmp_path / f"{STEM}-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names .*-00002-of-00002.safetensors, which does not exist"):
        read_folder(tmp_path, STEM)


BAD_INDEXES = ["{", "[]", "[" * 100_000, "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["../x.safetensors"]}}']


@pytest.mark.parametrize("text", [*BAD_INDEXES, '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_index_that_is_malformed_or_names_other_folders_is_refused(text, tmp_path):
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match="not readable|a JSON object|not an index of weight files|not a file in the same folder"
    ) as caught:
        read_folder(tmp_path, STEM)
    assert "\n" not in str(caught.value)


class Malicious:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["in the weights", "beside them", "legacy", "bare pickle"])
def test_code_in_a_pickle_is_not_run(kind, tmp_path):
    bomb, path = Malicious(tmp_path / "ran"), tmp_path / "x.ckpt"
    value = {"state_dict": tensors(), "extra": bomb} if kind == "beside them" else {"state_dict": {"a": bomb}}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match=r"would run code \((posix|nt).system\); if you") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_classes_of_lightning_beside_the_weights_are_neither_needed_nor_run(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name, "__setstate__": Malicious})
    callback = module.ModelCheckpoint()
    callback.best = 1.0
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
        patch.setitem(sys.modules, name, module)
        torch.save(
            {"callbacks": {module.ModelCheckpoint: {"best": 1.0}, "c": callback}, "state_dict": tensors()},
            tmp_path / "x.ckpt",
        )
    assert name not in sys.modules
    assert same(read_weights(tmp_path / "x.ckpt"), tensors())


def header(text):
    return struct.pack("<Q", len(text)) + text.encode()


OVERFLOW = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
DAMAGED = {
    "empty": b"",
    "json": b'{"a": 1}',
    "a web page": b"<!DOCTYPE html><html>not found</html>",
    "header bomb": struct.pack("<Q", 10**12) + b"{}",
    "nested header": header("[" * 100_000),
    "overflowing shape": header(OVERFLOW) + b"0000",
}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", DAMAGED)
def test_other_contents_are_an_error_of_one_line(name, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=rf"x\.{suffix} .*") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_header_of_500000_empty_tensors_is_refused_at_once(tmp_path):
    """The library would take 20 seconds and a gigabyte."""
    entry = '"layers.%d.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    (tmp_path / "x.safetensors").write_bytes(header("{" + ",".join(entry % i for i in range(500_000)) + "}"))
    for reads in (read_weights, outline, read_metadata):
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"a header of \d+ bytes, weight files have at most \d+\); get it again"):
            reads(tmp_path / "x.safetensors")
        assert time.monotonic() - started < 1


def test_a_duplicate_name_in_a_header_is_named(tmp_path):
    """The library reads the last one; another program may read the first."""
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    (tmp_path / "x.safetensors").write_bytes(header("{" + f"{entry},{entry}" + "}") + b"\0\0\x80?")
    with pytest.raises(ValueError, match="it names 'a' twice"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_placing_refuses_numbers_that_are_not_finite_and_names_the_first_five(dtype, number):
    module = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])
    weights = {name: value.detach().to(dtype) for name, value in module.state_dict().items()}
    bad = [name for name in weights if name != "0.weight"]
    for name in bad:
        weights[name].view(-1)[-1] = number if number == math.nan or dtype.itemsize > 1 else math.nan
    expected = "; ".join(f"{name} has values that are not finite" for name in bad[:5])
    with pytest.raises(ValueError, match=f"^here.ckpt does not fit its configuration: {expected}; and 2 more$"):
        place(module, weights, "here.ckpt")


def test_placing_accepts_numbers_whose_sum_overflows(tmp_path):
    module = torch.nn.Linear(4, 4)
    place(module, {name: torch.full_like(value, 3e38) for name, value in module.state_dict().items()}, "x")


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(stipple_core.files.safetensors_file, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_weights(tensors(), tmp_path / "x.safetensors")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    assert caught.value.filename == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "nested", "legacy"])
def test_a_file_truncated_anywhere_is_an_error_of_one_line(kind, tmp_path):
    path = save_as(kind, tensors(), tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 12)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="get it again") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, message",
    [
        ([1, 2], "does not contain a state dict"),
        ({}, "does not contain a state dict"),
        ({"a": 3}, "'a' is a int, not a tensor"),
    ],
)
def test_other_objects_than_state_dicts_are_refused(value, message, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "x.pt")


def test_missing_files_and_unknown_suffixes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt does not exist"):
        read_weights(tmp_path / "gone.ckpt")
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="x.onnx is not a weight file; use a file with one of the suffixes .safetensors"
    ):
        read_weights(tmp_path / "x.onnx")


def test_placing_names_the_first_five_differences():
    module = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
    weights = dict(module.state_dict())
    weights["0.weight"] = torch.zeros(3, 2)
    weights["9.weight"] = weights.pop("1.weight")
    for name in ("1.bias", "2.weight", "2.bias"):
        del weights[name]
    with pytest.raises(ValueError) as caught:
        place(module, weights, "here.ckpt")
    message = str(caught.value)
    assert message.startswith("here.ckpt does not fit its configuration: 1.weight is missing; 1.bias is missing; ")
    assert "9.weight is not known" in message and message.endswith("; and 1 more")
    assert misfits(module.state_dict(), weights)[-1] == "0.weight is [3, 2], not [2, 2]"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_placing_refuses_numbers_that_are_not_floating_point_where_some_are_needed(dtype):
    module = torch.nn.BatchNorm1d(2)  # which counts batches in int64
    place(module, module.state_dict(), "x")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"x does not fit .*: weight is {kind}, not a floating-point number$"):
        place(module, module.state_dict() | {"weight": torch.zeros(2, dtype=dtype)}, "x")


def test_placing_fills_a_module_on_meta():
    full = torch.nn.Linear(3, 2)
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    place(empty, full.state_dict(), "x")
    assert same(empty.state_dict(), full.state_dict())


def test_unaligned_weights_are_copied_and_aligned_ones_are_not():
    full = torch.nn.Linear(16, 16)
    for offset in (0, 1):  # PyTorch aligns memory to 64 bytes
        views = {name: torch.empty(value.numel() + offset)[offset:] for name, value in full.state_dict().items()}
        weights = {name: views[name].view_as(value).copy_(value) for name, value in full.state_dict().items()}
        with torch.device("meta"):
            module = torch.nn.Linear(16, 16)
        place(module, weights, "x")
        assert all(value.data_ptr() % 64 == 0 for value in module.state_dict().values())
        assert (module.weight.data_ptr() == weights["weight"].data_ptr()) == (offset == 0)
        assert same(module.state_dict(), full.state_dict())


def test_averages_are_used_for_all_weights_or_none():
    keys = ["model.a.weight", "b.bias"]
    averages = ["model_ema.aweight", "model_ema.bbias"]
    assert averaged_keys(keys, keys) == dict(zip(keys, keys, strict=True))
    assert averaged_keys(keys, keys + averages) == dict(zip(keys, averages, strict=True))
    with pytest.raises(ValueError, match="1 of 2 averaged weights are missing, the first model_ema.bbias; remove"):
        averaged_keys(keys, keys + averages[:1])


def test_json_is_read_as_written_and_anything_else_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "x.json"
    write_json({"b": [1, None], "a": "ü"}, path)
    assert read_json(path) == {"a": "ü", "b": [1, None]} and [*tmp_path.iterdir()] == [path]
    for data in (b"{", b"\xff", b"[" * 100_000, b"[1]", b"3", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not readable JSON|does not contain a JSON object") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="^nothing here$"):
        read_json(tmp_path / "absent.json", "nothing here")
