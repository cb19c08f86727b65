"""Weight files: safetensors, pickled state dicts, and several files with an index."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from stipple_core.files import pickled_weights
from stipple_core.files import safetensors_file as safe_tensors
from stipple_core.files.atomic import replacing
from stipple_core.files.json_file import read_json

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # all but the first are pickles
BIN_STEMS = {"model": "pytorch_model"}  # transformers' .bin files have another stem than its .safetensors
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
ALIGNMENT = 64  # bytes of a cache line, to which PyTorch aligns the tensors that it allocates
AVERAGE = "model_ema."  # prefix of the weights averaged over training in CompVis' files; their names have no dots


def read_weights(path: str | os.PathLike, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read one weight file: safetensors, or a pickled state dict that contains only tensors.

    Args:
        path: the file.
        wanted: selects the names to read. None reads all. (`outline` returns the names without reading.)

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, is not a weight file, was replaced while it was read, or would run code.
    """
    path, wanted = Path(path), wanted or (lambda name: True)
    _require_weight_file(path)
    return (safe_tensors if path.suffix == ".safetensors" else pickled_weights).read(path, wanted)


def outline(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of a weight file, or of all files of an index, as tensors on "meta"."""
    path = Path(path)
    if path.suffix == ".json":
        return {name: value for file in _files_of_index(path) for name, value in outline(file).items()}
    _require_weight_file(path)
    return (safe_tensors if path.suffix == ".safetensors" else pickled_weights).outline(path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file; {} if there is none, or for another kind of file."""
    return safe_tensors.read_metadata(Path(path)) if Path(path).suffix == ".safetensors" else {}


def read_folder(folder: str | os.PathLike, stem: str, variant: str | None = None) -> dict[str, Tensor]:
    """Read STEM.safetensors, or else STEM.bin, from a folder: one file, or the files that an index names.

    Args:
        folder: the folder of one component of a model, such as MODEL/unet.
        stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers, whose .bin stem is "pytorch_model").
        variant: "fp16" reads STEM.fp16.safetensors. None reads the plain file, or the only variant if there is none.

    Raises:
        FileNotFoundError, ValueError: the message names the file.
    """
    file = find_weights(folder, stem, variant)
    files = _files_of_index(file) if file.suffix == ".json" else [file]
    return {name: value for each in files for name, value in read_weights(each).items()}


def find_weights(folder: str | os.PathLike, stem: str, variant: str | None = None) -> Path:
    """Return the file that `read_folder` reads: a weight file, or the index (.json) of several."""
    folder = Path(folder)
    names = [rf"{stem}(?:\.(\w+))?\.safetensors", rf"{BIN_STEMS.get(stem, stem)}(?:\.(\w+))?\.bin"]
    by_variant: dict[str | None, list[Path]] = {}  # best first
    for pattern in (kind + index for kind in names for index in ("", r"\.index(?:\.(\w+))?\.json")):
        for path in sorted(folder.glob("*")):
            if match := re.fullmatch(pattern, path.name):
                by_variant.setdefault(next(filter(None, match.groups()), None), []).append(path)
    selected = next(iter(by_variant)) if variant is None and len(by_variant) == 1 else variant
    if selected in by_variant:
        return by_variant[selected][0]
    available = [path.name for paths in by_variant.values() for path in paths]
    have = f"; there are {', '.join(available)}" if available else ""
    name = ".".join(filter(None, (stem, variant, "safetensors")))
    raise FileNotFoundError(f"no {name} in {folder}{have}; is the model folder complete?")


def write_weights(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically and durably. Its metadata always contains `format: pt`."""
    seen, state = set(), {}
    for name, value in tensors.items():
        value = value.detach().to("cpu").contiguous()
        state[name] = value.clone() if value.data_ptr() in seen else value  # safetensors refuses shared memory
        seen.add(value.data_ptr())
    with replacing(path) as temporary:
        safe_tensors.write(state, Path(temporary), {**(metadata or {}), "format": "pt"})


def place(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Make `weights` the parameters and buffers of `module`, which may be on "meta". All names must match.

    A weight whose memory is not aligned is copied: matrix products of unaligned weights differ in their last bits, so
    the same model would generate other images from another file.

    Args:
        module: the module, changed in place.
        weights: one tensor for each name in the module's state dict.
        source: where the weights come from, for error messages.

    Raises:
        ValueError: names the first five keys that are missing, unexpected, of another shape, not floating-point where
            the module has floating-point numbers, or not finite.
    """
    require_fit(misfits(module.state_dict(), weights), source)
    require_fit([f"{name} has values that are not finite" for name, w in weights.items() if not _finite(w)], source)
    module.load_state_dict({name: _aligned(weight) for name, weight in weights.items()}, strict=True, assign=True)


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Compare names, shapes and kinds of numbers of tensors; return one sentence for each difference."""
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not known" for name in weights if name not in expected]
    pairs = [(name, value, weights[name]) for name, value in expected.items() if name in weights]
    wrong += [f"{name} is {list(b.shape)}, not {list(a.shape)}" for name, a, b in pairs if a.shape != b.shape]
    for name, reference, weight in pairs:
        if reference.is_floating_point() and not weight.is_floating_point():
            wrong.append(f"{name} is {str(weight.dtype).removeprefix('torch.')}, not a floating-point number")
    return wrong


def require_fit(wrong: list[str], source: str | os.PathLike) -> None:
    """Raise a ValueError that contains the first five of `misfits`, if there are any."""
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(wrong[:5])}{more}")


def averaged_keys(keys: Iterable[str], present: Container[str]) -> dict[str, str]:
    """Map each weight of a CompVis file to the key to read it from: its average over training, or else itself.

    CompVis' LitEma stores an average as `model_ema.` and the name without its dots, for all weights or for none.

    Args:
        keys: the keys of weights, without averages.
        present: all keys of the file.

    Raises:
        ValueError: some weights have an average and others have none.
    """
    averages = {key: AVERAGE + key.removeprefix("model.").replace(".", "") for key in keys}
    missing = [average for average in averages.values() if average not in present]
    if missing and len(missing) < len(averages):
        raise ValueError(
            f"{len(missing)} of {len(averages)} averaged weights are missing, the first {missing[0]}; "
            f"remove the keys that begin with {AVERAGE}, or get the file again"
        )
    return {key: key for key in averages} if missing else averages


def rename_old_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename attention layers called query, key, value and proj_attn, as in files of diffusers before 0.17."""
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name): value for name, value in weights.items()}


def _require_weight_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; is the model complete?")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not a weight file; use a file with one of the suffixes {', '.join(SUFFIXES)}")


def _files_of_index(index: Path) -> list[Path]:
    """The weight files that an index.json names, all in its own folder. Raises FileNotFoundError if one is missing."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} is not an index of weight files: it has no weight_map; get it again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file in the same folder; get it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which does not exist; get the missing file")
    return files


def _aligned(weight: Tensor) -> Tensor:
    """The weight, copied if its memory is not aligned: the last bits of matrix products depend on it."""
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


def _finite(weight: Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it 20 times faster than a look at each value."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    if weight.itemsize == 1:  # float8, which PyTorch can't add
        weight = weight.float()
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())
