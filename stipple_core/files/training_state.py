"""Training state on disk: nested dicts and lists as JSON, and their tensors as safetensors. Nothing is pickled.

`state.json` contains the nesting. `state.safetensors` contains the tensors; of a tensor that is partitioned over
processes it contains the rows of the first process, and `state-1.safetensors` and so on those of the others. The
metadata of each file contain the first row of each partitioned tensor, so that any number of processes can read the
files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stipple_core.files import safetensors_file as safe_tensors


class IncompleteTensor(ValueError):
    """Some rows of a tensor are in no file."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that one process holds of a tensor that is partitioned over processes along its first dimension."""

    tensor: torch.Tensor  # [last - first, ...]
    first: int  # index of the first of these rows in the full tensor
    shape: torch.Size  # of the full tensor


@dataclass(frozen=True, eq=False)
class Saved:
    """A tensor on disk. Indexing it reads only the requested rows."""

    name: str
    pieces: list[tuple[Any, int]]  # open files, each with the index of its first row, in the order of rows
    shape: torch.Size  # of the full tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        file = self.pieces[0][0]
        return file.get_slice(self.name)[:0].dtype if self.shape else file.get_tensor(self.name).dtype

    def __getitem__(self, wanted: Any) -> torch.Tensor:
        """Read the rows of a slice, or the full tensor for `...`. Raises IncompleteTensor if a row is in no file."""
        if len(self.pieces) == 1 and wanted is ...:
            whole = self.pieces[0][0].get_tensor(self.name)
            if whole.shape == self.shape:
                return whole
        first, last, _ = slice(None).indices(self.shape[0]) if wanted is ... else wanted.indices(self.shape[0])
        parts = []
        for file, begin in self.pieces:
            piece = file.get_slice(self.name)
            end = begin + piece.get_shape()[0]
            if begin <= first < end or (first == last and not parts):
                part = piece[first - begin : min(last, end) - begin] if begin <= first < end else piece[:0]
                parts.append(part)
                first += len(part)
        if first < last:
            raise IncompleteTensor(f"rows {first} to {last - 1} of {self.name} are in no file")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def save_state(folder: Path, state: dict[str, Any], rank: int = 0) -> Path:
    """Write nested dicts and lists of tensors, `Rows`, numbers, strings and None; return the safetensors file.

    Args:
        folder: where `state.json` and `state.safetensors` are written.
        state: the state, with the same nesting on every process.
        rank: the number of this process. Processes other than 0 write only their `Rows`, to `state-RANK.safetensors`.

    Raises:
        RuntimeError: a tensor has a value that is not finite. Nothing is written.
    """
    tensors: dict[str, torch.Tensor] = {}
    begins: dict[str, int] = {}
    skeleton = _take_tensors(state, "", tensors, begins)
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise RuntimeError(f"{name.lstrip('/')} has a value that is not finite; this state is not saved")
    path = Path(folder) / (f"state-{rank}.safetensors" if rank else "state.safetensors")
    if rank:
        tensors = {name: tensors[name] for name in begins}
    safe_tensors.write(tensors, path, {"first_rows": json.dumps(begins)} if begins else None)
    if not rank:
        (Path(folder) / "state.json").write_text(json.dumps(skeleton))
    return path


def load_state(folder: Path) -> dict[str, Any]:
    """Read what any number of processes wrote by `save_state`, as full tensors on the CPU."""
    return whole_state(open_state(folder))


def open_state(folder: Path) -> dict[str, Any]:
    """Read the nesting of a state, with a `Saved` for each tensor, which is read only when it is indexed.

    The files stay open as long as the `Saved` objects exist.

    Raises:
        ValueError: the files are not those of `save_state`.
    """
    pieces: dict[str, list[tuple[Any, int]]] = {}
    for path in sorted(Path(folder).glob("state*.safetensors")):
        with safe_tensors.readable(path):
            file = safe_open(path, "pt")
            begins = json.loads((file.metadata() or {}).get("first_rows", "{}"))
            for name in file.keys():  # noqa: SIM118  (not a dict)
                pieces.setdefault(name, []).append((file, begins.get(name, 0)))
    try:
        state = _put_tensors(json.loads((Path(folder) / "state.json").read_text()), pieces)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder} does not contain a training state ({type(error).__name__} in state.json)") from None
    if not isinstance(state, dict):
        raise ValueError(f"{folder} does not contain a training state (state.json contains a {type(state).__name__})")
    return state


def whole_state(node: Any) -> Any:
    """Replace each `Saved` in the result of `open_state` by its full tensor."""
    if isinstance(node, Saved):
        return node[...]
    if isinstance(node, dict):
        return {key: whole_state(value) for key, value in node.items()}
    return [whole_state(value) for value in node] if isinstance(node, list) else node


def _take_tensors(node: Any, name: str, tensors: dict[str, torch.Tensor], begins: dict[str, int]) -> Any:
    if isinstance(node, Rows):
        begins[name] = node.first
        _take_tensors(node.tensor, name, tensors, begins)
        return {"$tensor": name, "shape": list(node.shape)}
    if isinstance(node, torch.Tensor):
        # clone: safetensors refuses tensors that share memory; contiguous: it refuses strides (channels_last weights)
        tensors[name] = node.detach().to("cpu").contiguous().clone()
        return {"$tensor": name}
    if isinstance(node, dict):
        inner = ([key, _take_tensors(value, f"{name}/{key}", tensors, begins)] for key, value in node.items())
        return {"$dict": list(inner)}
    if isinstance(node, (list, tuple)):
        return [_take_tensors(value, f"{name}/{i}", tensors, begins) for i, value in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{name}: a {type(node).__name__} cannot be saved as tensors and JSON")


def _put_tensors(node: Any, pieces: dict[str, list[tuple[Any, int]]]) -> Any:
    if isinstance(node, dict):
        if "$tensor" in node:
            files = sorted(pieces[node["$tensor"]], key=lambda piece: piece[1])
            shape = node.get("shape") or files[0][0].get_slice(node["$tensor"]).get_shape()
            return Saved(node["$tensor"], files, torch.Size(shape))
        return {key: _put_tensors(value, pieces) for key, value in node["$dict"]}
    if isinstance(node, list):
        return [_put_tensors(value, pieces) for value in node]
    return node


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(map(torch.isfinite, torch.aminmax(tensor)))
