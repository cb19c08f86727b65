"""Kills training runs at random moments. Runs are forked from a process that has imported torch, to start quickly.

`python kill_harness.py FOLDER KILLS SEED < CASES`, where CASES is JSON: commands by name, without `run=`. Each case is
first run without interruption in FOLDER/NAME/whole. Then it is started in FOLDER/NAME/0, 1, ..., killed by SIGKILL at a
moment drawn over the duration of a run, and restarted in the same folder until it ends before its moment. This is
repeated until KILLS kills are spent over all cases. The caller checks the folders. For each kill, a line of JSON with
its moment and the folders that were half written goes to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))


def child(command: Sequence[str], run: Path, modules: Path | None = None) -> int:
    """Start the script in a forked process, with its output in RUN.log; return the process number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        importlib.import_module(command[0].removesuffix(".py")).main([*command[1:], f"run={run}"])
        if modules is not None:
            names = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]
            modules.write_text(json.dumps(names))
        code = 0
    except BaseException as error:  # the child must not continue with the code of the parent
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def ended(process: int, seconds: float | None = None) -> bool:
    """Wait for a process at most `seconds`; return whether it has ended."""
    handle = os.pidfd_open(process)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def finish(process: int, run: Path) -> None:
    """Wait for a process. Raises RuntimeError if it failed."""
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise RuntimeError(f"{run} ended with {code}: {Path(f'{run}.log').read_text()[-3000:]}")


def load(command: Sequence[str], folder: Path) -> None:
    """Import all modules that one step of the script imports, so that its children need not."""
    names = folder / "modules.json"
    finish(child([*command, "trainer.steps=1"], folder / "loading", names), folder / "loading")
    for name in json.loads(names.read_text()):
        importlib.import_module(name)


def half_written(run: Path) -> list[str]:
    """Names of the files and folders that a run was writing when it was killed."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if ".tmp" in path.name)


def kill(name: str, command: Sequence[str], folder: Path, kills: int, draws: random.Random) -> None:
    """Run one case without interruption, then kill runs of it until its kills are spent."""
    started = time.monotonic()
    finish(child(command, folder / "whole"), folder / "whole")
    length, run, restarts = time.monotonic() - started, 0, 0
    while kills > 0 or restarts:  # the last run must also end
        moment = draws.uniform(0, length) if kills > 0 else None
        started, process = time.monotonic(), child(command, folder / str(run))
        if ended(process, moment):
            finish(process, folder / str(run))
            if restarts == 0:  # an uninterrupted run: the machine has become faster
                length = time.monotonic() - started
            run, restarts = run + 1, 0
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills, restarts = kills - 1, restarts + 1
        line = {"case": name, "run": run, "after": round(moment, 3), "half": half_written(folder / str(run))}
        print(json.dumps(line), flush=True)


def main(folder: str, kills: str, seed: str) -> None:
    """Read the cases from standard input and kill their runs."""
    cases, draws = json.load(sys.stdin), random.Random(int(seed))
    load(list(cases.values())[-1], Path(folder))  # stage 2, which imports all modules of stage 1
    for number, (name, command) in enumerate(cases.items()):
        place = Path(folder) / name
        place.mkdir()
        importlib.import_module(command[0].removesuffix(".py"))
        share = int(kills) * (number + 1) // len(cases) - int(kills) * number // len(cases)
        kill(name, command, place, share, draws)


if __name__ == "__main__":
    main(*sys.argv[1:])
