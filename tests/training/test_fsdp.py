"""Runs of two processes with FSDP2: equal to runs with DDP, and resumed by any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stipple.training.distributed.fsdp import blank, blocks, requested
from stipple_core.files.checkpoint_folder import checkpoints
from stipple_core.files.manifest import problem
from stipple_core.files.training_state import load_state
from tests.helpers.training.many_processes import FSDP, run_all
from tests.helpers.training.tiny_runs import STAGE_1, STAGE_2, differing, losses, metrics, start

SHORT = ["trainer.steps=3", "trainer.save_every=2", "validation.every=3", "validation.images=3", "samples.every=0"]
SMALL = ["unet.block_out_channels=[32]", "unet.attention_levels=[true]", "unet.sample_size=8"]
LIMITS = {  # override -> largest difference of weights, and smallest cosine of updates
    "trainer.precision=bf16": (3e-3, 0.995),  # weights of norms are gathered in bf16 too; measured 1.4e-3 and 0.998
    "optimizer.kind=muon": (1e-5, 0.9999),  # measured 6e-7 and 1; half of the rows alone would give 1.3e-3 and 0.83
}
ONE_STEP = "trainer.max_minutes=0"  # and stop


def floats(node, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested state by path."""
    if isinstance(node, torch.Tensor):
        return {name: node.double()}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return {path: tensor for key, value in items for path, tensor in floats(value, f"{name}/{key}").items()}


def state(run: Path, step: int = -1) -> dict[str, torch.Tensor]:
    return floats(load_state(checkpoints(run / "state")[step]))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of tensors with the same names and shapes."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].numel())


def last_update(run: Path) -> torch.Tensor:
    """The change of the trained weights in the last step."""
    before, after = state(run, -2), state(run)
    networks = [name for name in after if name.startswith(("/parts/unet/", "/parts/conditioner/"))]
    return torch.cat([(after[name] - before[name]).flatten() for name in networks])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def mixed(command: list[str], run: Path) -> list[tuple[int, dict[str, str], list[str]]]:
    """A run of three steps: by two processes with FSDP, by one process, and by two with FSDP."""
    command = [*command, f"run={run}"]
    alone = [*command, ONE_STEP, "trainer.micro_batch_size=2"]
    return [(2, FSDP, [*command, ONE_STEP]), (1, {}, alone), (2, FSDP, command)]


@pytest.fixture(scope="module")
def runs(autoencoder, tmp_path_factory) -> Path:
    """Two runs of two processes: with DDP, and with FSDP after a first step by one process."""
    folder = tmp_path_factory.mktemp("runs")
    command = [*STAGE_2, *SHORT, *SMALL, f"autoencoder={autoencoder}"]
    run_all([(2, {}, [*command, f"run={folder}/ddp"]), *mixed(command, folder / "fsdp")[1:]])
    return folder


def test_one_process_and_then_two_with_fsdp_train_the_same_as_two_with_ddp_up_to_rounding(runs):
    partitioned, replicated = runs / "fsdp", runs / "ddp"
    assert [step for step, _ in losses(partitioned)] == [1, 2, 3]
    for (_, a), (_, b) in zip(losses(partitioned), losses(replicated), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert distance(state(partitioned), state(replicated)) < 1e-6
    a, b = ((metrics(run)[-2]["validation_loss"]) for run in (partitioned, replicated))
    assert a == pytest.approx(b, rel=1e-6)


def test_each_process_saves_half_of_the_rows_and_nothing_twice(runs):
    folder, whole = (checkpoints(runs / name / "state")[-1] for name in ("fsdp", "ddp"))
    assert problem(folder) is None
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 0.55 * sum(sizes)
    assert sum(sizes) < 1.1 * (whole / "state.safetensors").stat().st_size


def test_model_folders_of_fsdp_and_ddp_have_the_same_files_and_nearly_the_same_weights(runs):
    folders = runs / "fsdp" / "model", runs / "ddp" / "model"
    assert set(differing(*folders)) <= {
        "manifest.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    }  # fmt: skip
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert distance(*(load_file(folder / name) for folder in folders)) < 1e-6


class Tower(nn.Module):
    """A network with nested module lists, and a container without a forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.levels = nn.ModuleList([nn.Module(), nn.Linear(64, 64)])
        self.levels[0].layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(1, 1), nn.Sequential(nn.Linear(64, 64))])


def test_blocks_are_the_outermost_callable_members_of_lists_that_are_not_small():
    tower = Tower()
    layers = tower.levels[0].layers
    assert blocks(tower) == [layers[0], layers[2], tower.levels[1]]


def test_a_blank_has_the_shapes_and_buffers_of_its_model_but_no_memory_for_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    copied = blank(model)
    assert all(p.is_meta for p in copied.parameters()) and not any(p.is_meta for p in model.parameters())
    assert not copied[0].bias.requires_grad and copied[0].weight.requires_grad
    assert (
        torch.equal(copied[1].running_var, model[1].running_var) and copied[1].running_var is not model[1].running_var
    )


@pytest.mark.parametrize("wrong", [{"FSDP_VERSION": "1"}, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}])
def test_unsupported_fsdp_settings_are_refused(wrong, monkeypatch):
    assert not requested()
    for name, value in {"ACCELERATE_USE_FSDP": "true", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="fsdp_config.fsdp_(version must be 2|offload_params is not supported)"):
        requested()


@pytest.mark.slow
def test_a_run_that_is_resumed_with_and_without_fsdp_is_exact(autoencoder, tmp_path):
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
def test_options_have_the_same_effect_with_fsdp_as_with_ddp(settings, autoencoder, tmp_path):
    command = [*STAGE_2, *SHORT, f"autoencoder={autoencoder}", *settings]
    run_all([(2, {}, [*command, f"run={tmp_path}/a"]), (2, FSDP, [*command, f"run={tmp_path}/b"])])
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert {tensor.dtype for tensor in a.values()} == {tensor.dtype for tensor in b.values()}
    far, alike = distance(a, b), cosine(last_update(tmp_path / "a"), last_update(tmp_path / "b"))
    print(f"{settings[0]}: weights and moments differ by {far:.2g}, updates have a cosine of {alike:.6f}")
    farthest, least_alike = LIMITS.get(settings[0], (1e-6, 1 - 1e-6))
    assert far < farthest and alike > least_alike


@pytest.mark.slow
def test_stage_1_uses_ddp_even_if_fsdp_is_requested(tmp_path):
    command = [*STAGE_1, "trainer.steps=4", "trainer.save_every=2", "discriminator_start=2"]
    run_all([(2, {}, [*command, f"run={tmp_path}/a"]), (2, FSDP, [*command, f"run={tmp_path}/b"])])
    for part in ("state", "model"):
        assert differing(tmp_path / "a" / part, tmp_path / "b" / part) == []


@pytest.mark.slow
def test_accelerate_launch_uses_fsdp_with_its_config_file(autoencoder, tmp_path):
    command = [*STAGE_2, *SHORT, f"autoencoder={autoencoder}", f"run={tmp_path}/run"]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/fsdp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    assert start(*launch, *command).wait(600) == 0
    assert len(list(checkpoints(tmp_path / "run" / "state")[-1].glob("*.safetensors"))) == 2
