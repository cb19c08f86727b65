"""The benchmarks run: on tiny shapes, each prints a table with a ratio after comparing the contenders' results."""

import importlib
import io
import json
import runpy
import time
from contextlib import redirect_stdout

import pytest
import torch

from benchmarks.shared import contest, processes

RACES = {
    "unet_forward": ["--sizes", "8"],
    "decode": ["--sizes", "16", "--savings", "slicing", "tiling"],
    "text_to_picture": ["--sizes", "16", "--batches", "2", "--steps", "3"],
    "peak_memory": ["--cases", "unet:8", "decode:16", "pipeline:16"],
    "training_step": ["--steps", "1"],
    "cold_start": [],
    "profile_unet": ["--size", "8"],
}
FOLDER = ("text_to_picture", "peak_memory", "training_step")


@pytest.fixture
def same_process(monkeypatch):
    """Run the processes of benchmarks in this one, because imports take seconds each time."""

    def run_script(*command: str) -> tuple[str, float, float]:
        printed, began = io.StringIO(), time.perf_counter()
        with redirect_stdout(printed), monkeypatch.context() as patch:
            patch.setattr("sys.argv", list(command))
            if command[0] == "-m":
                importlib.import_module(command[1]).main(list(command[2:]))
            else:
                runpy.run_path(command[0], run_name="__main__")
        return printed.getvalue(), time.perf_counter() - began, 1.0

    monkeypatch.setattr(processes, "run_script", run_script)


@pytest.mark.parametrize("name", RACES)
def test_a_benchmark_prints_a_table_with_a_ratio(name, same_process, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    flags = ["--tiny", "--rounds", "1", "--threads", str(threads), *RACES[name]]
    if name in FOLDER:
        flags += ["--workdir", str(tmp_path_factory.getbasetemp() / "benchmarks")]
    importlib.import_module(f"benchmarks.speed.{name}").main(flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "ratio: ours / " in lines[0]
    assert any(row.startswith(("| ours", "| all", "| unet:8 | ours")) for row in lines[2:])


def test_contenders_alternate_and_the_fastest_other_is_the_reference():
    calls = []
    waits = {contest.OURS: 0.0, "slow": 0.02, "fast": 0.01}
    contenders = {
        name: lambda name=name, wait=wait: (calls.append(name), time.sleep(wait)) for name, wait in waits.items()
    }
    times = contest.alternate(contenders, rounds=2)
    assert calls == [*waits, *reversed(waits), *waits]  # the first round warms up
    assert all(len(each.wall) == len(each.cpu) == 2 for each in times.values())
    page = contest.table(times)
    assert "**fast**" in page and "**slow**" not in page


def test_ratios_are_those_of_neighbors_in_time():
    assert contest.ratios([1.0, 4.0, 3.0], [2.0, 4.0, 2.0]) == "1.00 (0.50 - 1.50)"


def test_a_benchmark_of_unequal_results_is_refused():
    with pytest.raises(RuntimeError, match="nothing to compare"):
        contest.require_equal(torch.ones(4), torch.full((4,), 1.001), "ones")
    contest.require_equal(torch.ones(4), torch.full((4,), 1.00001), "ones")


def test_a_contender_in_its_own_process_returns_its_last_printed_line(monkeypatch):
    monkeypatch.setattr(
        processes, "run_script", lambda *command: (f"noise\n{json.dumps({'batch': command[-1]})}\n", 0, 0)
    )
    assert processes.contend("peak_memory", "--batch", 3) == {"batch": "3"}


def test_the_benchmark_of_loaders_prints_images_per_second(tmp_path, capsys):
    loading = importlib.import_module("benchmarks.speed.loading")
    threads = torch.get_num_threads()
    loading.main(["--tiny", "--rounds", "1", "--threads", "1", "--workers", "0", "--workdir", str(tmp_path)])
    torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == [
        "ours, folder", "datasets, folder", "ours, tar", "webdataset, tar", "ours, cache",
    ]  # fmt: skip
    assert all(int(row.split("|")[2].replace(",", "")) > 0 for row in rows[1:])


def test_the_needs_of_many_gpus_are_computed_from_the_configs(capsys):
    importlib.import_module("benchmarks.speed.scaling").main(["--gigabytes", "0.001", "--images", "1e6"])
    output = capsys.readouterr().out
    assert "1,000,000 pictures: 100 shards" in output
    assert "| txt2img-1p4b | 872.3 M | 0.55 | 7.0 GB |" in output  # the parameters of the paper, 8 bytes each
    assert "| txt2img-small | 0.0 TB | 0.0 TB | 4.0 GB |" in output


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_large_images_in_tiles_are_compared_with_the_whole(way, same_process, capsys):
    flags = ["--tiny", "--sizes", "64", "--memory", "0", "0.0005", "--way", way, "--threads", "1"]
    threads = torch.get_num_threads()
    importlib.import_module("benchmarks.speed.large_pictures").main(flags)
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 0")]
    assert [row[0] for row in rows] == ["| 0", "| 0.0005"]
    assert float(rows[0][-1].strip(" |")) == 0 and 0 < float(rows[1][-1].strip(" |")) < 0.1
