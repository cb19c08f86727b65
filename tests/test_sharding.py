"""Sharded runs (FSDP2) of two processes: what synchronised ones make, resumed by any number, sharded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_processes import FSDP, run_all
from safetensors.torch import load_file
from tiny_runs import STAGE_1, STAGE_2, differing, losses, metrics, start
from torch import nn

from storage.checkpoint import checkpoints, load_state, problem
from training.sharding import blank, blocks, requested

SHORT = ["trainer.steps=3", "trainer.save_every=2", "validation.every=3", "validation.images=3", "samples.every=0"]
SMALL = ["unet.block_out_channels=[32]", "unet.attention_levels=[true]", "unet.sample_size=8"]
LIMITS = {  # the largest difference, and the least cosine of updates, where numbers are halves, of 8 bits
    "trainer.precision=bf16": (3e-3, 0.995),  # norms' weights are gathered in them, too; measured 1.4e-3 and 0.998
    "optimizer.kind=muon": (1e-5, 0.9999),  # measured 6e-7 and 1; each half of the rows alone: 1.3e-3 and 0.83
}
ONE_STEP = "trainer.max_minutes=0"  # and stop


def floats(node, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state by its path."""
    if isinstance(node, torch.Tensor):
        return {name: node.double()}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return {path: tensor for key, value in items for path, tensor in floats(value, f"{name}/{key}").items()}


def state(run: Path, step: int = -1) -> dict[str, torch.Tensor]:
    return floats(load_state(checkpoints(run / "state")[step]))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors of the same names and shapes."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].numel())


def last_update(run: Path) -> torch.Tensor:
    """By what the last step changed the trained weights."""
    before, after = state(run, -2), state(run)
    networks = [name for name in after if name.startswith(("/parts/unet/", "/parts/conditioner/"))]
    return torch.cat([(after[name] - before[name]).flatten() for name in networks])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def mixed(command: list[str], run: Path) -> list[tuple[int, dict[str, str], list[str]]]:
    """A run of three steps: two processes, sharded; one process alone; two processes, sharded."""
    command = [*command, f"run={run}"]
    alone = [*command, ONE_STEP, "trainer.micro_batch_size=2"]
    return [(2, FSDP, [*command, ONE_STEP]), (1, {}, alone), (2, FSDP, command)]


@pytest.fixture(scope="module")
def runs(autoencoder, tmp_path_factory) -> Path:
    """Runs of two processes: synchronised, and sharded but for the first step, which one process does alone."""
    folder = tmp_path_factory.mktemp("runs")
    command = [*STAGE_2, *SHORT, *SMALL, f"autoencoder={autoencoder}"]
    run_all([(2, {}, [*command, f"run={folder}/synchronised"]), *mixed(command, folder / "sharded")[1:]])
    return folder


def test_one_process_alone_and_then_sharded_ones_learn_what_synchronised_ones_do_to_rounding(runs):
    sharded, synchronised = runs / "sharded", runs / "synchronised"
    assert [step for step, _ in losses(sharded)] == [1, 2, 3]
    for (_, a), (_, b) in zip(losses(sharded), losses(synchronised), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert distance(state(sharded), state(synchronised)) < 1e-6
    a, b = ((metrics(run)[-2]["validation_loss"]) for run in (sharded, synchronised))
    assert a == pytest.approx(b, rel=1e-6)


def test_each_process_saves_its_half_and_nothing_twice(runs):
    folder, whole = (checkpoints(runs / name / "state")[-1] for name in ("sharded", "synchronised"))
    assert problem(folder) is None
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 0.55 * sum(sizes)
    assert sum(sizes) < 1.1 * (whole / "state.safetensors").stat().st_size


def test_model_folders_of_sharded_and_synchronised_runs_have_the_same_files_and_nearly_the_same_weights(runs):
    folders = runs / "sharded" / "model", runs / "synchronised" / "model"
    assert set(differing(*folders)) <= {
        "manifest.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    }  # fmt: skip
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert distance(*(load_file(folder / name) for folder in folders)) < 1e-6


class Tower(nn.Module):
    """A network with a list in a list, and a container without a forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.levels = nn.ModuleList([nn.Module(), nn.Linear(64, 64)])
        self.levels[0].layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(1, 1), nn.Sequential(nn.Linear(64, 64))])


def test_what_is_gathered_together_are_the_outermost_callable_members_of_lists_that_are_not_small():
    tower = Tower()
    layers = tower.levels[0].layers
    assert blocks(tower) == [layers[0], layers[2], tower.levels[1]]


def test_a_blank_of_a_model_has_its_shape_and_buffers_but_no_memory_for_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    copied = blank(model)
    assert all(p.is_meta for p in copied.parameters()) and not any(p.is_meta for p in model.parameters())
    assert not copied[0].bias.requires_grad and copied[0].weight.requires_grad
    assert (
        torch.equal(copied[1].running_var, model[1].running_var) and copied[1].running_var is not model[1].running_var
    )


@pytest.mark.parametrize("wrong", [{"FSDP_VERSION": "1"}, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}])
def test_ways_to_shard_that_are_not_implemented_are_refused(wrong, monkeypatch):
    assert not requested()
    for name, value in {"ACCELERATE_USE_FSDP": "true", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="fsdp_config.fsdp_(version must be 2|offload_params can't be true)"):
        requested()


@pytest.mark.slow
def test_a_run_goes_on_sharded_whole_and_sharded_again_as_if_nothing_had_happened_bit_for_bit(autoencoder, tmp_path):
    command = [*STAGE_2, *SHORT, f"autoencoder={autoencoder}"]
    run_all([(2, FSDP, [*command, f"run={tmp_path}/whole"]), *mixed(command, tmp_path / "mixed")])
    assert metrics(tmp_path / "mixed") == metrics(tmp_path / "whole")
    for part in ("state/step-0000003", "model"):
        assert differing(tmp_path / "mixed" / part, tmp_path / "whole" / part) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.micro_batch_size=1"],
        ["ema.device=cpu"],
        ["checkpointing=true"],
        ["trainer.precision=bf16"],
        ["optimizer.kind=muon"],
    ],
    ids=lambda settings: settings[0],
)
def test_options_do_sharded_what_they_do_synchronised(settings, autoencoder, tmp_path):
    command = [*STAGE_2, *SHORT, f"autoencoder={autoencoder}", *settings]
    run_all([(2, {}, [*command, f"run={tmp_path}/a"]), (2, FSDP, [*command, f"run={tmp_path}/b"])])
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert {tensor.dtype for tensor in a.values()} == {tensor.dtype for tensor in b.values()}
    far, alike = distance(a, b), cosine(last_update(tmp_path / "a"), last_update(tmp_path / "b"))
    print(f"{settings[0]}: weights and moments differ by {far:.2g}, updates have a cosine of {alike:.6f}")
    farthest, least_alike = LIMITS.get(settings[0], (1e-6, 1 - 1e-6))
    assert far < farthest and alike > least_alike


@pytest.mark.slow
def test_stage_1_is_synchronised_whoever_asks_for_sharding(tmp_path):
    command = [*STAGE_1, "trainer.steps=4", "trainer.save_every=2", "discriminator_start=2"]
    run_all([(2, {}, [*command, f"run={tmp_path}/a"]), (2, FSDP, [*command, f"run={tmp_path}/b"])])
    for part in ("state", "model"):
        assert differing(tmp_path / "a" / part, tmp_path / "b" / part) == []


@pytest.mark.slow
def test_accelerate_launch_shards_where_the_file_says_so(autoencoder, tmp_path):
    command = [*STAGE_2, *SHORT, f"autoencoder={autoencoder}", f"run={tmp_path}/run"]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/fsdp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    assert start(*launch, *command).wait(600) == 0
    assert len(list(checkpoints(tmp_path / "run" / "state")[-1].glob("*.safetensors"))) == 2
