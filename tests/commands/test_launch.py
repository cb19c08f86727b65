"""Training in several processes: one error line, one exit code, signals that are passed on, no process left behind."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stipple.cli import process_group
from stipple.cli.accelerate_settings import AccelerateSettings
from stipple.commands import cache, signal_run
from stipple.training.run.run_folder import Holder, RunFolder, holder
from tests.helpers.training.tiny_runs import CACHE, ROOT, SETTINGS, STAGE_1, run_here

LAUNCHER = """
import os, sys
from stipple.cli import process_group
process_group.GRACE = 1
environments = [os.environ | {"RANK": str(rank)} for rank in range(2)]
sys.exit(process_group.run_processes([sys.executable, "-c", sys.argv[1]], environments))
"""
PROCESS = """
import os, signal, sys, time
from pathlib import Path
from stipple.cli.process_group import stop_with_launcher
stop_with_launcher()
rank, folder = int(os.environ["RANK"]), Path({folder!r})
def started():
    (folder / f"{{rank}}.tmp").write_text(str(os.getpid()))
    os.rename(folder / f"{{rank}}.tmp", folder / f"{{rank}}")
"""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def group(tmp_path):
    """Start two processes of a Python code under a launcher; returns the launcher and a function for their ids."""
    launchers = []

    def start(code: str) -> tuple[subprocess.Popen, callable]:
        command = [sys.executable, "-c", LAUNCHER, PROCESS.format(folder=str(tmp_path)) + code]
        launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        launchers.append(launcher)
        return launcher, lambda: [int((tmp_path / str(rank)).read_text()) for rank in range(2)]

    yield start
    for launcher in launchers:
        launcher.kill()


def listen() -> None:
    """Background jobs ignore Ctrl-C, and so would the processes that a test starts in them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(tmp_path):
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_exit_code_is_that_of_the_processes(group, code):
    launcher, _ = group(f"sys.exit({code})")
    assert (launcher.communicate(timeout=60)[1], launcher.returncode) == ("", code)


def test_a_mistake_that_all_processes_report_is_one_line(group):
    launcher, _ = group("print('error: steps 0 must be at least 1', file=sys.stderr); sys.exit(2)")
    assert launcher.communicate(timeout=60)[1] == "error: steps 0 must be at least 1\n" and launcher.returncode == 2


def test_a_failed_process_ends_the_others_and_their_complaints_are_not_shown(group, tmp_path):
    code = """
started()
while not (folder / f"{1 - rank}").exists(): time.sleep(0.01)
if rank == 1: sys.exit("error: disk full")
while Path(f"/proc/{(folder / '1').read_text()}/fd/2").exists(): time.sleep(0.01)
time.sleep(0.3)
sys.exit("Traceback: connection closed by peer")
"""
    launcher, processes = group(code)
    assert launcher.communicate(timeout=60)[1] == "error: disk full\n" and launcher.returncode == 1
    assert not any(alive(process) for process in processes())


def test_a_killed_process_is_reported_and_the_others_end(group, tmp_path, monkeypatch):
    launcher, processes = group("started(); time.sleep(100)")
    started(tmp_path)
    first, second = processes()
    os.kill(second, signal.SIGKILL)
    err = launcher.communicate(timeout=60)[1]
    assert (
        err.startswith("error: process 1 was ended by SIGKILL, often because memory ran out;") and err.count("\n") == 1
    )
    assert launcher.returncode == 128 + signal.SIGKILL and not alive(first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process(group, tmp_path, number):
    code = f"signal.signal({int(number)}, lambda *_: sys.exit({128 + number})); started(); time.sleep(100)"
    launcher, processes = group(code)
    started(tmp_path)
    launcher.send_signal(number)
    assert (launcher.communicate(timeout=60)[1], launcher.returncode) == ("", 128 + number)
    assert not any(alive(process) for process in processes())


def test_a_second_ctrl_c_ends_processes_that_do_not_answer(group, tmp_path):
    launcher, processes = group("signal.signal(signal.SIGINT, signal.SIG_IGN); started(); time.sleep(100)")
    started(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 130 and not any(alive(process) for process in processes())


def test_no_process_outlives_a_killed_launcher(group, tmp_path):
    """Also not those that a process has started, such as its workers."""
    code = """
import subprocess
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
(folder / f"worker{rank}").write_text(str(worker.pid))
started(); time.sleep(100)
"""
    launcher, processes = group(code)
    started(tmp_path)
    all_processes = [*processes(), *(int((tmp_path / f"worker{rank}").read_text()) for rank in range(2))]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(alive(process) for process in all_processes), seconds=10)


def test_a_training_in_two_processes_saves_and_stops_when_asked(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["trainer.steps=100000", "trainer.save_every=100000", "validation.every=0", "trainer.log_every=1"]
    command = [
        sys.executable,
        "-m",
        "stipple",
        "train-autoencoder",
        *STAGE_1[1:],
        "--processes",
        "2",
        f"run={run}",
        *flags,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": listen}
    process = subprocess.Popen([*command, "--processes", "2"], cwd=ROOT, env=os.environ | SETTINGS, **pipes)
    wait_for(lambda: (run / "metrics.jsonl").exists(), seconds=300)
    signal_run.main([str(run), "save"])
    wait_for(lambda: any((run / "state").glob("step-*/manifest.json")), seconds=60)
    with pytest.raises(SystemExit, match="2"):
        run_here(*STAGE_1, f"run={run}")
    assert f"in use by another run, {holder(run)}; wait for it" in capsys.readouterr().err
    assert holder(run).host == socket.gethostname() and alive(holder(run).pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command" in out
    assert err.count("finishing the step, about ") == 1 and "Ctrl-C again ends now" in err and "Traceback" not in err
    assert not alive(holder(run).pid)
    with pytest.raises(SystemExit, match="2"):
        signal_run.main([str(run), "stop"])
    assert f"no training uses {run}" in capsys.readouterr().err


def test_the_lock_names_the_process_and_a_lock_of_another_host_is_not_signalled(tmp_path):
    folder = RunFolder(tmp_path, 2)
    folder.take()
    assert holder(tmp_path) == Holder(os.getpid(), socket.gethostname())
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(ValueError, match="is used by process 1 on elsewhere, and this is .*; run the command there"):
        signal_run.send(str(tmp_path), "stop")
    (tmp_path / ".lock").write_text("")
    with pytest.raises(ValueError, match="used by a process that its lock file does not name"):
        signal_run.send(str(tmp_path), "stop")


def test_the_lock_of_an_earlier_version_has_no_accepts_signals_and_belongs_to_a_training(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": "here"}))
    assert holder(tmp_path) == Holder(7, "here", accepts_signals=True)


@pytest.mark.parametrize("action", ["save", "stop"])
def test_a_process_that_handles_no_requests_is_not_signalled(action, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, 2, accepts_signals=False)
    folder.take()
    assert holder(tmp_path) == Holder(os.getpid(), socket.gethostname(), accepts_signals=False)
    monkeypatch.setattr(os, "kill", lambda *arguments: pytest.fail(f"kill{arguments}"))
    with pytest.raises(ValueError, match=f"is used by process {os.getpid()} on .*, which is no training .*Ctrl-C"):
        signal_run.send(str(tmp_path), action)


@pytest.mark.usefixtures("settings_of_runs")
def test_stipple_cache_locks_its_folder_as_a_process_that_handles_no_requests(autoencoder, tmp_path, monkeypatch):
    locks = []

    class Stop(Exception):
        pass

    def open_writer(config, *_: object) -> None:
        locks.append(holder(config.cache))
        raise Stop

    monkeypatch.setattr(cache, "open_writer", open_writer)
    with pytest.raises(Stop):
        run_here(*CACHE, f"cache={tmp_path / 'cache'}", f"autoencoder={autoencoder}")
    assert locks == [Holder(os.getpid(), socket.gethostname(), accepts_signals=False)]


def test_processes_on_the_cpu_find_each_other_through_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = AccelerateSettings.read(None, 2)
    first, second = settings.environments()
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["MASTER_ADDR"] == "127.0.0.1" and first["MASTER_PORT"] == second["MASTER_PORT"] != "0"
    assert first["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "eight_gpus", "fsdp", "two_nodes"])
def test_config_files_of_accelerate_are_read(name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = AccelerateSettings.read(name)
    processes, machines = {"cpu": (1, 1), "one_gpu": (1, 1), "two_nodes": (8, 2)}.get(name, (8, 1))
    assert (settings.processes, settings.machines) == (processes, machines)
    assert (settings.environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp")
    assert (settings.address == "192.0.2.1") == (machines == 2)


def test_the_second_of_two_machines_has_the_later_ranks(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = AccelerateSettings.read("two_nodes", 4, machine_rank=1, main_process_ip="10.0.0.1")
    assert [environment["RANK"] for environment in settings.environments()] == ["2", "3"]
    assert {environment["WORLD_SIZE"] for environment in settings.environments()} == {"4"}
    assert {environment["MASTER_ADDR"] for environment in settings.environments()} == {"10.0.0.1"}


def test_a_config_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="is not one of accelerate"):
        AccelerateSettings.read(str(tmp_path / "list.yaml"))
    with pytest.raises(FileNotFoundError, match="did you mean eight_gpus?"):
        AccelerateSettings.read("eight_gpu")
    with pytest.raises(ValueError, match="--processes 0 must be at least 1"):
        AccelerateSettings.read(None, 0)


@pytest.mark.parametrize("status", [143, 130, 7])
def test_a_process_that_ends_alone_takes_the_others_with_it(status, monkeypatch):
    """Also if it ended as all do after SIGTERM, but no other process got the signal."""
    monkeypatch.setattr(process_group, "GRACE", 0.5)
    monkeypatch.setattr(process_group, "AGREED_GRACE", 0.5)
    code = f"import os, time; raise SystemExit({status}) if os.environ['RANK'] == '1' else time.sleep(60)"
    environments = [os.environ | {"RANK": str(rank)} for rank in range(2)]
    began = time.monotonic()
    assert process_group.run_processes([sys.executable, "-c", code], environments) == status
    assert time.monotonic() - began < 30


def test_processes_are_read_on_when_nobody_reads_their_errors():
    class Closed(io.RawIOBase):
        def write(self, data):
            raise BrokenPipeError

    source = io.BufferedReader(io.BytesIO(b"a line\n" * 1000))
    output = process_group.ErrorOutput(Closed())
    output.copy(source, rank=0)
    output.report("error: no reader")
    assert source.read() == b""


def test_a_traceback_about_the_end_of_another_process_is_not_shown():
    target = io.BytesIO()
    output = process_group.ErrorOutput(target)
    threading.Timer(0.1, lambda: setattr(output, "failed", 1)).start()
    output.copy(io.BufferedReader(io.BytesIO(b"Traceback (most recent call last):\nRead error\n")), rank=0)
    assert target.getvalue() == b""
