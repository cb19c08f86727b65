"""Whatever fails while a run writes, a whole checkpoint remains and the run goes on from it: at every event."""

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
from tests.helpers.injection import FAULTS, End, forked
from tests.helpers.tiny_runs import differing, metrics

pytestmark = pytest.mark.usefixtures("settings_of_runs")
BEGUN, STEPS = 2, 3  # steps of the run that is there before the fault, and of the whole one; each is saved, two kept


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What config.yaml holds of a run."""

    steps: int = STEPS


def live(folder: Path, **limits) -> None:
    """A life of a run that fits a line: the files of a real one, in the time of a hundredth."""
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
    """Which half of the events is struck, and how."""
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    return random.Random(seed)


def last_named(end: End) -> int:
    """The newest checkpoint that was given its name before a life ended."""
    named = [event for i, event in enumerate(end.events) if event.startswith("rename ") and i != end.at]
    return max([int(event[-7:]) for event in named if "/state/step-" in event], default=BEGUN)


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory):
    """All modules that a run loads while it runs, so that its forks need not; this process computes nothing."""
    folder = tmp_path_factory.mktemp("loaded")

    def tell() -> None:
        with contextlib.suppress(SystemExit):
            live(folder / "run", max_minutes=0)
        (folder / "modules").write_text(json.dumps([n for n, m in sys.modules.items() if getattr(m, "__spec__", None)]))

    assert forked(tell, folder / "run").code == 0
    for name in json.loads((folder / "modules").read_text()):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run that was stopped before its last step."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    for _ in range(BEGUN):
        assert forked(lambda: live(folder, max_minutes=0), folder).code == 0
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1}\n{"step": 3, "lo')  # killed while it wrote, before it saved
    return folder


@pytest.fixture(scope="module")
def whole(begun, tmp_path_factory) -> tuple[Path, list[str]]:
    """The run to its end without a fault, and the events of its second life."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(begun, folder)
    end = forked(lambda: live(folder), folder)
    assert end.code == 0, end.said
    return folder, end.events


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "tmp" in path.name or path.name.startswith(".model")]


def same(run: Path, whole: Path) -> bool:
    """Checkpoints, model and metrics; and nothing else is there."""
    parts = [differing(run / part, whole / part) for part in ("state", "model")]
    return metrics(run) == metrics(whole) and not any(parts) and not leftovers(run)


def assert_one_line(end: End, newest: Path) -> None:
    """A life that failed said so in one line, which names the checkpoint to go on from."""
    said = [line for line in end.said.splitlines() if line.startswith("error: ")]
    assert end.code == 1 and "Traceback" not in end.said and len(said) == 1, end.said
    assert f"; the last good checkpoint is {newest}; " in said[0]


def check(run: Path, end: End, fault: str, whole: Path) -> None:
    """What remains after a fault: the newest checkpoint that was named, and a run that goes on to the same end."""
    what = f"{fault} at event {end.at}, {end.events[end.at]}"
    newest = checkpoint.checkpoints(run / "state")[-1]
    assert checkpoint.newest_valid(run / "state") is not None, what
    if fault == "kill":
        assert end.code == -9, what
    elif end.code:  # a fault in removing what is of no more use may be passed over
        assert_one_line(end, newest)
        kind, path = end.events[end.at].split(" ", 1)
        unsure = kind == "fsync" and path == str(run)  # whether a crash now would leave the old name or the new one
        assert leftovers(run) in ([], [".tmp-old-model"] if unsure else []) or kind in ("unlink", "rmdir"), what
        assert checkpoint.problem(run / "model") is None, what
    again = forked(lambda: live(run), run)
    assert again.code == 0, (what, again.said)
    assert "is not used" not in again.said, what
    assert newest.name == f"step-{last_named(end):07d}" and f"resumed from {newest}" in again.said, (what, again.said)
    assert same(run, whole), what


def strike(faults: Iterator[tuple[str, int]], begun: Path, whole: Path, folder: Path) -> None:
    """Each fault at its event, in a copy of the run that has begun; and what is left of it."""
    for fault, at in faults:
        run = folder / f"{list(FAULTS).index(fault)}-{at}"
        shutil.copytree(begun, run)
        check(run, forked(lambda run=run: live(run), run, fault, at), fault, whole)
        shutil.rmtree(run)


def test_a_run_killed_at_any_event_goes_on_from_the_newest_checkpoint(begun, whole, tmp_path, draws):
    whole, events = whole
    kinds = {event.split()[0] for event in events}
    assert kinds >= {"write", "fsync", "rename", "safetensors", "mkdir", "unlink", "rmdir"}
    strike((("kill", at) for at in range(draws.randrange(2), len(events), 2)), begun, whole, tmp_path)


def test_a_disk_that_fails_at_any_event_is_one_line_and_leaves_the_newest_checkpoint(begun, whole, tmp_path, draws):
    whole, events = whole
    faults = [(draws.choice(["full disk", "input/output error"]), at) for at in range(len(events))]
    strike(iter(faults[draws.randrange(2) :: 2]), begun, whole, tmp_path)


@pytest.mark.slow
def test_every_fault_at_every_event_leaves_the_newest_checkpoint(begun, whole, tmp_path):
    whole, events = whole
    strike(((fault, at) for fault in FAULTS for at in range(len(events))), begun, whole, tmp_path)
    print(f"{len(FAULTS)} faults at each of {len(events)} events")


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own, which is given so many pages."""
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
def test_a_disk_with_any_too_few_pages_leaves_the_newest_checkpoint_and_the_run_goes_on(begun, whole, disk):
    """The disk is really full, at whichever write that is."""
    full, run = 0, disk(1 << 16) / "run"
    for pages in range(100):
        shutil.copytree(begun, run)
        used = os.statvfs(run)
        disk(used.f_blocks - used.f_bfree + pages)
        end = forked(lambda: live(run), run)
        disk(1 << 16)
        newest = checkpoint.checkpoints(run / "state")[-1]
        if end.code:
            full += 1
            assert "No space left on device" in end.said and not leftovers(run)
            assert_one_line(end, newest)
            assert forked(lambda: live(run), run).code == 0
        assert newest.name == f"step-{last_named(end):07d}" and same(run, whole[0])
        shutil.rmtree(run)
        if not end.code:
            break
    print(f"{full} sizes of disk were too small")
    assert full > 5 and not end.code


RECORDS = [Record(f"/pictures/{i}.png", f"{i}.png", ((f"picture {i}",),), 100 + i) for i in range(3)]


def fill(folder: Path) -> None:
    """A latent cache, in parts of two."""
    writer = LatentCacheWriter(str(folder), 0, {"image_size": 32}, RECORDS, part_size=2)
    for part in writer.missing("moments"):
        writer.add_moments(part, [torch.full((1, 8, 2, 2), float(i)) for i in part])
    for part in writer.missing("contexts"):
        writer.add_contexts(part, [torch.full((i + 1, 4), float(i)) for i in part])
    writer.close(torch.zeros(1, 4))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_latent_cache_is_finished_after_a_fault_at_any_event(every, draws, tmp_path):
    whole = tmp_path / "whole"
    events = forked(lambda: fill(whole), whole).events
    assert len(events) > 20
    for at in range(draws.randrange(every), len(events), every):
        cache, fault = tmp_path / str(at), draws.choice(list(FAULTS))
        end = forked(lambda cache=cache: fill(cache), cache, fault, at)
        assert end.code != 0 or fault != "kill", end.events[at]
        again = forked(lambda cache=cache: fill(cache), cache)
        assert again.code == 0 and not differing(cache, whole), (end.events[at], again.said)
        shutil.rmtree(cache)
