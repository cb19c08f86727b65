"""After a failure at any write, a complete checkpoint remains, and the run resumes from it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from stipple.training.optimization.ema import Ema, EmaConfig
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig
from stipple_core.config import save_config
from stipple_core.data.records.records import Record
from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.json_file import write_json
from stipple_core.files.weights import write_weights
from stipple_core.latent_cache.writer import LatentCacheWriter
from tests.helpers.training.injection import FAULTS, End, forked
from tests.helpers.training.tiny_runs import differing, metrics

pytestmark = pytest.mark.usefixtures("settings_of_runs")
BEGUN, STEPS = 2, 3  # steps before the fault, and of the whole run; each step is saved, two are kept


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The contents of config.yaml."""

    steps: int = STEPS


def train(folder: Path, **limits) -> None:
    """A run that fits a line and writes the same files as a real run, in a hundredth of the time."""
    trainer = Trainer(TrainerConfig(steps=STEPS, batch_size=4, save_every=1, log_every=1, **limits), folder, {})
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    network = trainer.network("model", model)
    ema = Ema(model, EmaConfig())
    optimizer = trainer.optimizer("optimizer", [model], OptimizerConfig(learning_rate=0.1), [ema])
    trainer.resume()
    save_config(Settings(), str(folder / "config.yaml"))

    def save_model(path: Path) -> None:
        (path / "unet").mkdir()
        write_weights(ema.averages, path / "unet" / "weights.safetensors")
        write_json({"step": trainer.step}, path / "model_index.json")

    batches = (torch.randn(4, 2, generator=torch.Generator().manual_seed(i)) for i in range(trainer.step, STEPS))
    for x in trainer.steps(batches, save_model):
        loss = (network(x)[:, 0] - x.sum(1)).square().mean()
        trainer.update(loss, optimizer)
        trainer.log(loss=loss)


@pytest.fixture
def draws() -> random.Random:
    """Draws the events that fail, and how they fail."""
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    return random.Random(seed)


def last_renamed(end: End) -> int:
    """The step of the newest checkpoint that was renamed to its final name before the process ended."""
    renamed = [event for i, event in enumerate(end.events) if event.startswith("rename ") and i != end.at]
    return max([int(event[-7:]) for event in renamed if "/state/step-" in event], default=BEGUN)


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory):
    """Import all modules that a run imports, so that forked processes need not; this process computes nothing."""
    folder = tmp_path_factory.mktemp("loaded")

    def write_modules() -> None:
        with contextlib.suppress(SystemExit):
            train(folder / "run", max_minutes=0)
        (folder / "modules").write_text(json.dumps([n for n, m in sys.modules.items() if getattr(m, "__spec__", None)]))

    assert forked(write_modules, folder / "run").code == 0
    for name in json.loads((folder / "modules").read_text()):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run that was stopped before its last step."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    for _ in range(BEGUN):
        assert forked(lambda: train(folder, max_minutes=0), folder).code == 0
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1}\n{"step": 3, "lo')  # killed while it wrote, before it saved
    return folder


@pytest.fixture(scope="module")
def whole(begun, tmp_path_factory) -> tuple[Path, list[str]]:
    """The completed run without a fault, and the events of the process that resumed it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(begun, folder)
    end = forked(lambda: train(folder), folder)
    assert end.code == 0, end.output
    return folder, end.events


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "tmp" in path.name or path.name.startswith(".model")]


def same(run: Path, whole: Path) -> bool:
    """Whether checkpoints, model and metrics are equal, and there are no leftovers."""
    parts = [differing(run / part, whole / part) for part in ("state", "model")]
    return metrics(run) == metrics(whole) and not any(parts) and not leftovers(run)


def assert_one_line(end: End, newest: Path) -> None:
    """Assert that a failed process printed one line, which names the checkpoint to resume from."""
    errors = [line for line in end.output.splitlines() if line.startswith("error: ")]
    assert end.code == 1 and "Traceback" not in end.output and len(errors) == 1, end.output
    assert f"; the last good checkpoint is {newest}; " in errors[0]


def check(run: Path, end: End, fault: str, whole: Path) -> None:
    """Assert that after a fault the newest checkpoint remains, and that the run resumes to the same end."""
    what = f"{fault} at event {end.at}, {end.events[end.at]}"
    newest = checkpoint.checkpoints(run / "state")[-1]
    assert checkpoint.newest_valid(run / "state") is not None, what
    if fault == "kill":
        assert end.code == -9, what
    elif end.code:  # a fault while removing old files may be ignored
        assert_one_line(end, newest)
        kind, path = end.events[end.at].split(" ", 1)
        unsure = kind == "fsync" and path == str(run)  # it is not known which name is on the disk
        assert leftovers(run) in ([], [".tmp-old-model"] if unsure else []) or kind in ("unlink", "rmdir"), what
        assert checkpoint.problem(run / "model") is None, what
    again = forked(lambda: train(run), run)
    assert again.code == 0, (what, again.output)
    assert "is not used" not in again.output, what
    assert newest.name == f"step-{last_renamed(end):07d}" and f"resumed from {newest}" in again.output, (
        what,
        again.output,
    )
    assert same(run, whole), what


def inject(faults: Iterator[tuple[str, int]], begun: Path, whole: Path, folder: Path) -> None:
    """Inject each fault at its event into a copy of the run, and check the result."""
    for fault, at in faults:
        run = folder / f"{list(FAULTS).index(fault)}-{at}"
        shutil.copytree(begun, run)
        check(run, forked(lambda run=run: train(run), run, fault, at), fault, whole)
        shutil.rmtree(run)


def test_a_run_killed_at_any_event_resumes_from_the_newest_checkpoint(begun, whole, tmp_path, draws):
    whole, events = whole
    kinds = {event.split()[0] for event in events}
    assert kinds >= {"write", "fsync", "rename", "safetensors", "mkdir", "unlink", "rmdir"}
    inject((("kill", at) for at in range(draws.randrange(2), len(events), 2)), begun, whole, tmp_path)


def test_a_disk_error_at_any_event_is_one_line_and_keeps_the_newest_checkpoint(begun, whole, tmp_path, draws):
    whole, events = whole
    faults = [(draws.choice(["full disk", "input/output error"]), at) for at in range(len(events))]
    inject(iter(faults[draws.randrange(2) :: 2]), begun, whole, tmp_path)


@pytest.mark.slow
def test_every_fault_at_every_event_keeps_the_newest_checkpoint(begun, whole, tmp_path):
    whole, events = whole
    inject(((fault, at) for fault in FAULTS for at in range(len(events))), begun, whole, tmp_path)
    print(f"{len(FAULTS)} faults at each of {len(events)} events")


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A separate file system, whose size in pages can be set."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")

    def resize(pages: int) -> Path:
        size = f"remount,size={pages * os.sysconf('SC_PAGE_SIZE')}"
        subprocess.run(["mount", "-o", size, folder], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_a_disk_that_becomes_full_at_any_write_keeps_the_newest_checkpoint(begun, whole, disk):
    """The disk is really full: each size below the required one is tried."""
    full, run = 0, disk(1 << 16) / "run"
    for pages in range(100):
        shutil.copytree(begun, run)
        used = os.statvfs(run)
        disk(used.f_blocks - used.f_bfree + pages)
        end = forked(lambda: train(run), run)
        disk(1 << 16)
        newest = checkpoint.checkpoints(run / "state")[-1]
        if end.code:
            full += 1
            assert "No space left on device" in end.output and not leftovers(run)
            assert_one_line(end, newest)
            assert forked(lambda: train(run), run).code == 0
        assert newest.name == f"step-{last_renamed(end):07d}" and same(run, whole[0])
        shutil.rmtree(run)
        if not end.code:
            break
    print(f"{full} sizes of disk were too small")
    assert full > 5 and not end.code


RECORDS = [Record(f"/pictures/{i}.png", f"{i}.png", ((f"picture {i}",),), 100 + i) for i in range(3)]


def fill(folder: Path) -> None:
    """Write a latent cache with parts of two records."""
    writer = LatentCacheWriter(str(folder), 0, {"image_size": 32}, RECORDS, part_size=2)
    for part in writer.missing("moments"):
        writer.add_moments(part, [torch.full((1, 8, 2, 2), float(i)) for i in part])
    for part in writer.missing("contexts"):
        writer.add_contexts(part, [torch.full((i + 1, 4), float(i)) for i in part])
    writer.close(torch.zeros(1, 4))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_latent_cache_is_completed_after_a_fault_at_any_event(every, draws, tmp_path):
    whole = tmp_path / "whole"
    events = forked(lambda: fill(whole), whole).events
    assert len(events) > 20
    for at in range(draws.randrange(every), len(events), every):
        cache, fault = tmp_path / str(at), draws.choice(list(FAULTS))
        end = forked(lambda cache=cache: fill(cache), cache, fault, at)
        assert end.code != 0 or fault != "kill", end.events[at]
        again = forked(lambda cache=cache: fill(cache), cache)
        assert again.code == 0 and not differing(cache, whole), (end.events[at], again.output)
        shutil.rmtree(cache)
