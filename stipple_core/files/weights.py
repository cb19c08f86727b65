"""Weight files: safetensors and pickled state dicts, one or in shards, read without running any code of theirs; JSON.

Nothing of ours but `stipple_core.files.safetensors_file` is imported here, so that every room can read and write weights in the same
way.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stipple_core.files import safetensors_file as safe_tensors

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # all but the first are pickles
BIN_STEMS = {"model": "pytorch_model"}  # transformers' .bin files have another stem than its .safetensors
# what Lightning's checkpoints name beside the weights; neither imported nor run, see `_stand_in`
INERT = ("pytorch_lightning.", "lightning.", "numpy.", "_codecs.encode")
# names that diffusers gave the layers of plain attention before 0.17; such files are still in use
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ALIGNMENT = 64  # bytes, of a cache line, at which torch places tensors itself
MAX_JSON = 1 << 26  # bytes; the index of a sharded model with 100,000 weights has about 10 MB
AVERAGE = "model_ema."  # before the averages over training in CompVis' files, whose names have no dots


def read_weights(path: str | os.PathLike, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read one weight file: .safetensors, or a pickled state dict of tensors and nothing else.

    Args:
        path: of the file.
        wanted: which names are read; None: all. (`outline` tells them beforehand.)

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: in one line: damaged, not a weight file, replaced meanwhile, or it holds code, which is not run.
    """
    path, wanted = Path(path), wanted or (lambda name: True)
    _require_weight_file(path)
    if path.suffix == ".safetensors":
        return safe_tensors.read(path, wanted)
    return {name: _owned(value) for name, value in _state_dict(_read_pickle(path), path).items() if wanted(name)}


def outline(path: str | os.PathLike) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a weight file, or of an index of shards: tensors on "meta"."""
    if Path(path).suffix == ".json":
        return {name: value for shard in _shards(Path(path)) for name, value in outline(shard).items()}
    path = Path(path)
    _require_weight_file(path)
    if path.suffix != ".safetensors":
        return {name: value.to("meta") for name, value in _state_dict(_read_pickle(path), path).items()}
    return safe_tensors.outline(path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} where there is none, or in a file of another kind."""
    return safe_tensors.read_metadata(Path(path)) if Path(path).suffix == ".safetensors" else {}


def read_folder(folder: str | os.PathLike, stem: str, variant: str | None = None) -> dict[str, Tensor]:
    """Read STEM.safetensors, or else STEM.bin, of a folder, whole or in the shards that an index names.

    Args:
        folder: of one part of a model, such as MODEL/unet.
        stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers, whose .bin stem is "pytorch_model").
        variant: "fp16" reads STEM.fp16.safetensors. None reads the plain file, or the only variant where there is none.

    Raises:
        FileNotFoundError, ValueError: in one line naming the file.
    """
    file = find_weights(folder, stem, variant)
    shards = _shards(file) if file.suffix == ".json" else [file]
    return {name: value for shard in shards for name, value in read_weights(shard).items()}


def find_weights(folder: str | os.PathLike, stem: str, variant: str | None = None) -> Path:
    """The file that `read_folder` reads: weights, or the index (.json) of their shards."""
    folder = Path(folder)
    names = [rf"{stem}(?:\.(\w+))?\.safetensors", rf"{BIN_STEMS.get(stem, stem)}(?:\.(\w+))?\.bin"]
    found: dict[str | None, list[Path]] = {}  # by variant, best first
    for pattern in (kind + index for kind in names for index in ("", r"\.index(?:\.(\w+))?\.json")):
        for path in sorted(folder.glob("*")):
            if match := re.fullmatch(pattern, path.name):
                found.setdefault(next(filter(None, match.groups()), None), []).append(path)
    wanted = next(iter(found)) if variant is None and len(found) == 1 else variant
    if wanted in found:
        return found[wanted][0]
    there = [path.name for paths in found.values() for path in paths]
    have = f"; there are {', '.join(there)}" if there else ""
    name = ".".join(filter(None, (stem, variant, "safetensors")))
    raise FileNotFoundError(f"no {name} in {folder}{have}; is this the folder of a whole model?")


def write_weights(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step, readable by all; its metadata always say that it is of PyTorch."""
    path, seen, state = Path(path), set(), {}
    for name, value in tensors.items():
        value = value.detach().to("cpu").contiguous()
        state[name] = value.clone() if value.data_ptr() in seen else value  # safetensors refuses shared memory
        seen.add(value.data_ptr())
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safe_tensors.write(state, unfinished, {**(metadata or {}), "format": "pt"})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def place(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Make `weights` the parameters and buffers of `module` (which may be on "meta"), all of them and no others.

    A weight that a file has at an odd place is copied: matrix products have other last bits then, so that the same
    model would draw other pictures from another file.

    Raises:
        ValueError: naming the first five keys that are missing, left over, of another shape, no floating-point
            numbers where the module has some, or not finite.
    """
    require_fit(misfits(module.state_dict(), weights), source)
    require_fit([f"{name} has values that are not finite" for name, w in weights.items() if not _finite(w)], source)
    module.load_state_dict({name: _aligned(weight) for name, weight in weights.items()}, strict=True, assign=True)


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What differs between expected and given names, shapes and kinds of numbers of tensors, a sentence for each."""
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not known" for name in weights if name not in expected]
    both = [(name, value, weights[name]) for name, value in expected.items() if name in weights]
    wrong += [f"{name} is {list(b.shape)}, not {list(a.shape)}" for name, a, b in both if a.shape != b.shape]
    for name, ours, given in both:
        if ours.is_floating_point() and not given.is_floating_point():
            wrong.append(f"{name} is {str(given.dtype).removeprefix('torch.')}, not a floating-point number")
    return wrong


def averaged_keys(keys: Iterable[str], there: Container[str]) -> dict[str, str]:
    """For each key of a CompVis file where its weights are best taken from: their average over training, or itself.

    CompVis' LitEma keeps averages as `model_ema.` and the name without its dots, for all weights or none.

    Args:
        keys: of weights, not averages.
        there: all keys of the file.

    Raises:
        ValueError: some are averaged and others not.
    """
    averages = {key: AVERAGE + key.removeprefix("model.").replace(".", "") for key in keys}
    missing = [average for average in averages.values() if average not in there]
    if missing and len(missing) < len(averages):
        raise ValueError(
            f"{len(missing)} of {len(averages)} averaged weights are missing, the first {missing[0]}; "
            f"remove the keys that begin with {AVERAGE}, or get the file again"
        )
    return {key: key for key in averages} if missing else averages


def rename_old_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names, from files whose attention layers are called query, key, value, proj_attn."""
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name): value for name, value in weights.items()}


def require_fit(wrong: list[str], source: str | os.PathLike) -> None:
    """Raise a ValueError that names the first five of `misfits`, if there are any."""
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(wrong[:5])}{more}")


def read_json(path: str | os.PathLike, absent: str | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        absent: what to say where there is none.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: in one line: it is not JSON, or holds another value than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(absent or f"{path} does not exist; is this the folder of a whole model?")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, JSON of a model at most {MAX_JSON}; get it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({_line(error)}); get it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; get it again")
    return value


def write_json(value: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write an object as a JSON file in one step, its keys in order."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_weight_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; is the model whole?")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not a weight file; give one of {', '.join(SUFFIXES)}")


def _owned(value: Tensor) -> Tensor:
    """A copy of a tensor of a mapped file; of one that repeats its memory, which a copy could not hold, itself."""
    plain = value.layout == torch.strided and value.nbytes <= value.untyped_storage().nbytes()
    return value.clone() if plain else value


def _read_pickle(path: Path) -> Any:
    """The object in a file of torch.save, made of tensors and plain containers only."""
    try:
        zipped = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote another format, which can't be mapped
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert = [_stand_in(name) for name in foreign if name.startswith(INERT)]
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
            return torch.load(path, "cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # what a broken or hostile pickle raises may be anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors, and reading it would run code of its maker's ({code[1]}); if you "
                "trust it, make it safe elsewhere: safetensors.torch.save_file(torch.load(FILE, weights_only=False)"
                '["state_dict"], "FILE.safetensors")'
            ) from None
        raise ValueError(f"{path} is not a readable file of torch.save ({_line(error)}); get it again") from None


def _stand_in(name: str) -> type:
    """A class without behavior in place of one that a file names; it takes whatever the other would."""

    def ignore(self: object, *arguments: object, **options: object) -> None:
        """Do nothing."""

    module, _, own = name.rpartition(".")  # by which torch finds it
    return type(own, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{path} holds no weights by name (a state dict); give a file that does")
    for name, item in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} is no state dict: it has the key {name!r}, which is not a name")
        if not isinstance(item, Tensor):
            raise ValueError(f"{path} is no state dict: {name!r} is a {type(item).__name__}, not a tensor")
    return dict(value)


def _shards(index: Path) -> list[Path]:
    """The files that an index.json names, each beside it. Raises FileNotFoundError for one that is not there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} is no index of shards: it has no weight_map; get it again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it; get it again")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{index} names {shard.name}, which is not there; get the missing shard")
    return shards


def _aligned(weight: Tensor) -> Tensor:
    """The weight where memory is as PyTorch allots it: elsewhere, the last bits of matrix products are others."""
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


def _finite(weight: Tensor) -> bool:
    """Whether all numbers are finite, in a twentieth of the time of reading them: a finite sum has finite terms."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    if weight.itemsize == 1:  # float8, which torch can't add
        weight = weight.float()
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def _line(error: BaseException) -> str:
    return " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:150] or type(error).__name__
