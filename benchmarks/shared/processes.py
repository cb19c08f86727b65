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
    """Run a Python script or `-m module`; returns its output, wall-clock seconds and CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return process.stdout, wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def contend(module: str, *arguments: object) -> dict[str, Any]:
    """Run one contender in a new process; returns the JSON value in the last line of its output."""
    return json.loads(run_script("-m", f"benchmarks.{module}", *map(str, arguments))[0].splitlines()[-1])
