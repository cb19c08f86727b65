"""Runs of the real scripts in several processes, forked from one that has torch and the scripts loaded.

`python many_processes.py < RUNS`, where RUNS is JSON: a list of [processes, environment, command], done one after the
other. The processes find each other through gloo on this machine. What they print goes to the folder of their run.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch` sets for fsdp.yaml
LOADED = (  # modules
    *("torch.distributed.fsdp", "transformers", "accelerate"),
    *("stipple.commands.train", "stipple.commands.train_autoencoder"),
)

Run = tuple[int, dict[str, str], Sequence[str]]


def run_all(runs: Sequence[Run]) -> list[float]:
    """Do the runs, each with a `run=FOLDER` in its command; their seconds. AssertionError with what one said."""
    from tests.helpers.tiny_runs import ROOT, SETTINGS

    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(runs), capture_output=True, text=True, cwd=ROOT,
        env=os.environ | SETTINGS | paths,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [float(line) for line in done.stdout.splitlines()]


def _fork(rank: int, world: int, port: int, environment: dict[str, str], command: Sequence[str], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in address.items()} if world > 1 else {})
        os.environ.update(environment)
        importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # the child must not go on as the parent would
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    for world, environment, command in json.load(sys.stdin):
        folder = Path(next(word for word in command if word.startswith("run=")).removeprefix("run="))
        log, port, began = folder.with_suffix(".log"), _free_port(), time.monotonic()
        children = [_fork(rank, world, port, environment, command, log) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{' '.join(command)}: exit codes {codes}\n{log.read_text()[-3000:]}")
        print(time.monotonic() - began)


if __name__ == "__main__":
    _main()
