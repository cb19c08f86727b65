"""Training state on disk: rows written by any number of processes can be read by any other number."""

from __future__ import annotations

import math

import pytest
import torch

from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.training_state import Rows, load_state, open_state, save_state


def partition(tensor: torch.Tensor, world: int) -> list[Rows]:
    """The rows of a tensor that each of `world` processes holds; the last ones may be empty."""
    each = -(-len(tensor) // world)
    return [
        Rows(tensor[rank * each : (rank + 1) * each], min(rank * each, len(tensor)), tensor.shape)
        for rank in range(world)
    ]


def write(folder, tensors: dict[str, torch.Tensor], world: int) -> None:
    partitioned = {name: partition(tensor, world) for name, tensor in tensors.items()}
    for rank in reversed(range(world)):
        rows = {name: parts[rank] for name, parts in partitioned.items()}
        save_state(folder, {"parts": rows, "same": torch.arange(3), "step": 5}, rank)


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_rows_of_any_number_of_processes_are_read_as_full_tensors_and_as_any_slice(world, tmp_path):
    draws = torch.Generator().manual_seed(world)
    shapes = [(7, 3), (1,), (4, 2, 3, 3), (12,), (10, 1)]
    tensors = {f"{i}": torch.randn(shape, generator=draws) for i, shape in enumerate(shapes)}
    tensors["half"] = torch.randn(5, 2, generator=draws).to(torch.bfloat16)
    write(tmp_path, tensors, world)
    assert len(list(tmp_path.glob("state*.safetensors"))) == world
    whole, saved = load_state(tmp_path), open_state(tmp_path)["parts"]
    assert whole["step"] == 5 and torch.equal(whole["same"], torch.arange(3))
    for name, tensor in tensors.items():
        assert torch.equal(whole["parts"][name], tensor)
        assert saved[name].shape == tensor.shape and saved[name].dtype == tensor.dtype
        for first in range(len(tensor) + 1):
            for last in range(first, len(tensor) + 1):
                assert torch.equal(saved[name][first:last], tensor[first:last])


def test_missing_rows_are_an_error_that_names_them(tmp_path):
    write(tmp_path, {"a": torch.arange(6.0)}, 3)
    (tmp_path / "state-1.safetensors").unlink()
    with pytest.raises(ValueError, match="rows 2 to 5 of /parts/a are in no file"):
        load_state(tmp_path)
    assert torch.equal(open_state(tmp_path)["parts"]["a"][4:6], torch.tensor([4.0, 5.0]))
    (tmp_path / "state-2.safetensors").unlink()  # one file with rows remains
    with pytest.raises(ValueError, match="rows 2 to 5 of /parts/a are in no file"):
        load_state(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_an_error_and_nothing_is_written(bad, dtype, tmp_path):
    weights = {"good": torch.ones(3), "empty": torch.empty(0), "worse": torch.ones(4, 4, dtype=dtype)}
    weights["worse"][2, 1] = bad
    with pytest.raises(RuntimeError, match="parts/worse has a value that is not finite"):
        save_state(tmp_path, {"parts": weights})
    assert list(tmp_path.iterdir()) == []
    weights["worse"][2, 1] = 0
    save_state(tmp_path, {"parts": weights})


def test_nothing_is_pruned_unless_two_checkpoints_are_verified(tmp_path):
    for step in range(1, 5):
        state = {"step": step, "weights": torch.full((100,), float(step))}
        folder = tmp_path / f"step-{step:07d}"
        checkpoint.write_folder(folder, lambda path, state=state: save_state(path, state))
    damaged = tmp_path / "step-0000003" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # keeps its size
    damaged.write_bytes(content)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step-000000{n}" for n in (2, 3, 4)]
    damaged.parent.joinpath("manifest.json").unlink()
    checkpoint.prune(tmp_path, 2)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
