"""Training state on disk, as tensors and JSON, written so that a crash at any moment leaves a whole one.

The order is: temporary folder, files, fsync, manifest with a SHA-256 per file, fsync, rename, fsync of the parent;
older checkpoints are removed only after that. Nothing is pickled, so nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` in one step: `write` fills a temporary folder beside it, which is made durable, then renamed.

    An existing `folder` is replaced; there is no moment at which neither is complete under its name or the aside name.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{TEMPORARY}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # safetensors makes its files readable to their owner alone
        sums = {path.relative_to(temporary).as_posix(): _sha256_synced(path) for path in files}
        manifest = temporary / MANIFEST
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        manifest.write_text(json.dumps({"sha256": sums, "bytes": sizes}, indent=1))
        _sha256_synced(manifest)
        for inner in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            _sync_directory(inner)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    aside = folder.parent / f"{TEMPORARY}old-{folder.name}"
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(temporary, folder)
    _sync_directory(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def problem(folder: Path, sums: bool = True) -> str | None:
    """What is wrong with a folder that `write_folder` made; None when every file has its recorded sum.

    With `sums` false only sizes are compared, which reads no file: for folders that were verified when written.
    """
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text())
        expected_sums, expected_bytes = manifest["sha256"], manifest["bytes"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, expected in expected_sums.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected_bytes[name]:
            return f"{name} has {path.stat().st_size} bytes, not {expected_bytes[name]}"
        if sums and _sha256(path) != expected:
            return f"{name} is damaged (SHA-256 differs from the manifest's)"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `step-NNNNNNN` in a folder, oldest first, good or not."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir())


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; each newer one that does not is named on stderr."""
    for path in reversed(checkpoints(folder)):
        wrong = problem(path)
        if wrong is None:
            return path
        print(f"checkpoint {path} is not used: {wrong}", file=sys.stderr)
    return None


def clear_temporaries(folder: Path) -> None:
    """Remove what an interrupted `write_folder` left behind; a complete folder that was moved aside is put back."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        name = path.name.removeprefix(f"{TEMPORARY}old-")
        if name != path.name and not (path.parent / name).exists():
            os.rename(path, path.parent / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 2) valid checkpoints, and the broken ones older than them."""
    kept = 0
    for path in reversed(checkpoints(folder)):
        if kept >= max(keep, 2):
            shutil.rmtree(path)
        elif problem(path, sums=False) is None:
            kept += 1


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as `state.safetensors` + `state.json`."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _take_tensors(state, "", tensors)
    save_file(tensors, Path(folder) / "state.safetensors")
    (Path(folder) / "state.json").write_text(json.dumps(skeleton))


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on the CPU."""
    tensors = load_file(Path(folder) / "state.safetensors")
    return _put_tensors(json.loads((Path(folder) / "state.json").read_text()), tensors)


def _take_tensors(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        # clone: safetensors refuses tensors that share memory; contiguous: it refuses strides (channels_last weights)
        tensors[name] = node.detach().to("cpu").contiguous().clone()
        return {"$tensor": name}
    if isinstance(node, dict):
        return {"$dict": [[key, _take_tensors(value, f"{name}/{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_take_tensors(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{name}: a {type(node).__name__} cannot be saved as tensors and JSON")


def _put_tensors(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if "$tensor" in node:
            return tensors[node["$tensor"]]
        return {key: _put_tensors(value, tensors) for key, value in node["$dict"]}
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    return node


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_synced(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
