"""Kills training runs: a parent that has torch and the scripts loaded forks children, which so begin in milliseconds.

`python kill_harness.py FOLDER KILLS SEED < CASES`, where CASES is JSON: commands by name, without their `run=`. Each
case is first run whole in FOLDER/NAME/whole; then in FOLDER/NAME/0, 1, ... lives of it are begun, and ended by SIGKILL
at a moment drawn over the length of a whole life, again in the same folder until one ends by itself before its moment;
so often that KILLS are spent over all cases. What is left in each folder is for the caller to judge. One line of JSON
for each kill goes to standard output: when it was, and which folders were then half written.
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

sys.path.insert(0, str(Path(__file__).parents[2]))


def child(command: Sequence[str], run: Path, modules: Path | None = None) -> int:
    """Begin a life of the script in a process of its own; what it says goes to RUN.log."""
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
            found = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]
            modules.write_text(json.dumps(found))
        code = 0
    except BaseException as error:  # the child must not go on as the parent would
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def ended(process: int, seconds: float | None = None) -> bool:
    """Wait for a process, at most so long; whether it is at its end."""
    handle = os.pidfd_open(process)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def finish(process: int, run: Path) -> None:
    """Wait for a life that is not to be killed.

    Raises:
        RuntimeError: it failed.
    """
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise RuntimeError(f"a life of {run} ended with {code}: {Path(f'{run}.log').read_text()[-3000:]}")


def load(command: Sequence[str], folder: Path) -> None:
    """Import all that one step of the script imports, so that its children need not; the parent computes nothing."""
    names = folder / "modules.json"
    finish(child([*command, "trainer.steps=1"], folder / "loading", names), folder / "loading")
    for name in json.loads(names.read_text()):
        importlib.import_module(name)


def half_written(run: Path) -> list[str]:
    """Names of what a run was writing when it died."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if ".tmp" in path.name)


def kill(name: str, command: Sequence[str], folder: Path, kills: int, draws: random.Random) -> None:
    """Run one case whole, then spend its kills, in as many runs as that takes."""
    started = time.monotonic()
    finish(child(command, folder / "whole"), folder / "whole")
    length, run, lives = time.monotonic() - started, 0, 0
    while kills > 0 or lives:  # the last run, too, is left to its end
        moment = draws.uniform(0, length) if kills > 0 else None
        started, process = time.monotonic(), child(command, folder / str(run))
        if ended(process, moment):
            finish(process, folder / str(run))
            if lives == 0:  # a whole life: other programs leave this machine more time than before
                length = time.monotonic() - started
            run, lives = run + 1, 0
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills, lives = kills - 1, lives + 1
        line = {"case": name, "run": run, "after": round(moment, 3), "half": half_written(folder / str(run))}
        print(json.dumps(line), flush=True)


def main(folder: str, kills: str, seed: str) -> None:
    """Read the cases from standard input, and kill."""
    cases, draws = json.load(sys.stdin), random.Random(int(seed))
    load(list(cases.values())[-1], Path(folder))  # of stage 2, which imports all that stage 1 does
    for number, (name, command) in enumerate(cases.items()):
        place = Path(folder) / name
        place.mkdir()
        importlib.import_module(command[0].removesuffix(".py"))
        share = int(kills) * (number + 1) // len(cases) - int(kills) * number // len(cases)
        kill(name, command, place, share, draws)


if __name__ == "__main__":
    main(*sys.argv[1:])
