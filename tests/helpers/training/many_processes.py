"""Runs of the scripts in processes that are forked from one that has imported torch and the scripts.

That process is started once for a session of tests, so that a run does not spend seconds on imports. The processes of a
run communicate by gloo on this machine, as with `accelerate launch`; `tiny_runs.start` and `launch` test the launcher.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch` sets for fsdp.yaml
LOADED = ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.clip.modeling_clip", "accelerate")
LOADED += ("stipple.commands.train_autoencoder", "stipple.commands.cache", "stipple.commands.train", "txt2img")
SECONDS = 600  # the longest life of a process

Run = tuple[int, dict[str, str], Sequence[str]]


class Ended(NamedTuple):
    """The result of a run."""

    codes: list[int]  # by rank; negative: the signal
    out: str
    err: str


def run_all(runs: Sequence[Run]) -> None:
    """Do the runs [processes, environment, command] one after the other. Raises AssertionError if one fails."""
    for processes, environment, command in runs:
        succeed(*command, processes=processes, environment=environment)


def succeed(*command: str, processes: int = 1, environment: Mapping[str, str] | None = None) -> str:
    """Do a run in a number of processes; return its output. Raises AssertionError if it fails."""
    codes, out, err = run_forked(*command, processes=processes, environment=environment)
    assert not any(codes), f"{command}: exit codes {codes}\n{out[-2000:]}{err[-4000:]}"
    return out


def run_forked(*command: str, processes: int = 1, environment: Mapping[str, str] | None = None) -> Ended:
    """Do a run in a number of processes, which may fail; return its exit codes and output."""
    from tests.helpers.training.tiny_runs import SETTINGS

    parent = _parent()
    with tempfile.TemporaryDirectory() as folder:
        request = [processes, os.environ | SETTINGS | dict(environment or {}), list(command), folder]
        parent.stdin.write(json.dumps(request) + "\n")
        parent.stdin.flush()
        codes = json.loads(parent.stdout.readline())
        return Ended(codes, *(Path(folder, name).read_text() for name in ("out", "err")))


@functools.cache
def _parent() -> subprocess.Popen:
    from tests.helpers.training.tiny_runs import ROOT, SETTINGS

    paths = {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, env=os.environ | SETTINGS | paths, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(started.stdin.close)  # and it ends
    return started


def _fork(environment: dict[str, str], command: Sequence[str], folder: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(SECONDS)
        for descriptor, name in ((0, os.devnull), (1, f"{folder}/out"), (2, f"{folder}/err")):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(name, flags), descriptor)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command)
        importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # the child must not continue with the code of the parent
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _do(processes: int, environment: dict[str, str], command: Sequence[str], folder: str) -> list[int]:
    """Do one run; return the exit codes of its processes. If one fails, the others are killed."""
    for name in ("out", "err"):
        Path(folder, name).touch()
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    children = {}
    for rank in range(processes):
        address = {"RANK": rank, "LOCAL_RANK": rank, **group} if processes > 1 else {}
        children[_fork(environment | {name: str(value) for name, value in address.items()}, command, folder)] = None
    while None in children.values():
        child, status = os.wait()
        children[child] = os.waitstatus_to_exitcode(status)
        if children[child]:
            for other in [process for process, code in children.items() if code is None]:
                os.kill(other, signal.SIGKILL)
    return list(children.values())


def _main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_do(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _main()
