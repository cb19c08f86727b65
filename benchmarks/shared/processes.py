"""Contenders that run in processes of their own: their output and their time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.shared.contest import ROOT


def run_script(*command: str) -> tuple[str, float, float]:
    """What a Python process prints (`-m module` or a file, and arguments), its seconds by the clock and of the CPU."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return process.stdout, wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def contend(module: str, *arguments: object) -> dict[str, Any]:
    """One contender of a benchmark in a process of its own, which prints JSON in its last line."""
    return json.loads(run_script("-m", f"benchmarks.{module}", *map(str, arguments))[0].splitlines()[-1])
