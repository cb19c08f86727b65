"""Several processes of one command, as one program: one error line, one exit code, and none left behind.

Each process is the leader of a process group of its own, so that Ctrl-C in a terminal reaches this process alone,
which passes signals on. A pipe ends with this process, however it ends, and the others end with the pipe.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

PIPE = "STIPPLE_LAUNCHER_PIPE"  # environment variable: file descriptor of the pipe that ends with the launcher
GRACE = 10  # seconds in which the others may end by themselves after one has failed, before they are killed
AGREED_GRACE = 60  # the same after one has ended as all do after Ctrl-C or SIGTERM: another may still be saving
STOPPING = (signal.SIGINT, signal.SIGTERM)
AGREED = (0, *(128 + number for number in STOPPING))  # exit codes with which all processes end together
LAST_WORDS = 2  # seconds that processes have to end after a second Ctrl-C
TRACES = (b"Traceback", b"[rank")  # beginnings of tracebacks: often of a process that reports the end of another
ONCE = (b"error: ", b"interrupted")  # beginnings of lines that several processes write, and that are shown once


class ErrorOutput:
    """Passes on what processes write to standard error; an error line that several write is shown once.

    After a process has failed, nothing else of the others is shown: they report only that it is gone. A traceback is
    held back for a second, in which the end of the process that caused it is noted. If the target can't be written to,
    because its reader has ended, the processes are read on, so that they do not block.
    """

    def __init__(self, target: BinaryIO):
        self.target, self.failed = target, None  # rank of the process that failed first
        self._lock, self._shown, self._within_line = threading.Lock(), set(), False

    def copy(self, source: BinaryIO, rank: int) -> None:
        """Copy until the end of a stream; unfinished lines at once, for progress bars."""
        rest = b""
        while data := source.read1(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._write(line + b"\n", rank)
            if not any(rest.startswith(word) or word.startswith(rest) for word in ONCE):
                self._write(rest, rank)
                rest = b""
        self._write(rest, rank)

    def report(self, text: str) -> None:
        """Write a line of this process."""
        with self._lock, suppress(OSError):
            self.target.write(b"\n" * self._within_line + text.encode() + b"\n")
            self.target.flush()

    def _write(self, line: bytes, rank: int) -> None:
        if line.startswith(TRACES) and self.failed is None:
            time.sleep(1)
        with self._lock:
            once = line.startswith(ONCE)
            if line in self._shown or (not once and self.failed not in (None, rank)):
                return
            if once:
                self._shown.add(line)
            if line:
                with suppress(OSError):
                    self.target.write(line)
                    self.target.flush()
                self._within_line = not line.endswith(b"\n")


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run a command once in each environment; return the exit code of the first process that failed, or 0."""
    group = ProcessGroup()
    with group.passing_on_signals():
        try:
            group.start(command, environments)
            return group.wait()
        finally:
            group.kill()


class ProcessGroup:
    """Processes that work together: they are started together, and end together."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self._stops = 0  # how often Ctrl-C or SIGTERM came
        self._deadline = float("inf")  # when what still runs is killed
        self._pipe: int | None = None  # the end that closes with this process: it is never passed on

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Start the command once in each environment, each process in a process group of its own."""
        reading, self._pipe = os.pipe()
        size = os.get_terminal_size(2) if os.isatty(2) else None  # for the progress bar, which writes to a pipe
        shared = {PIPE: str(reading)} | ({"COLUMNS": str(size.columns), "LINES": str(size.lines)} if size else {})
        for environment in environments:
            process = subprocess.Popen(
                command, env={**environment, **shared}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=[reading], start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
        os.close(reading)

    def wait(self) -> int:
        """Wait for all processes; return the exit code of the first one that failed, or 0.

        When one has failed, the others have GRACE seconds to end; AGREED_GRACE after an end by Ctrl-C or SIGTERM.
        """
        output, ended = ErrorOutput(sys.stderr.buffer), queue.Queue()
        copies = []
        for rank, process in enumerate(self.processes):
            copies.append(threading.Thread(target=output.copy, args=(process.stderr, rank), daemon=True))
            copies[-1].start()
            threading.Thread(target=_note_end, args=(rank, process, output, ended), daemon=True).start()
        code, left = 0, len(self.processes)
        while left and time.monotonic() < self._deadline:
            with suppress(queue.Empty):
                rank, status = ended.get(timeout=0.2)
                left -= 1
                if status < 0:
                    _report_signal(rank, status, output)
                code = code or (status if status >= 0 else 128 - status)
                if status:
                    grace = AGREED_GRACE if status in AGREED else GRACE
                    self._deadline = min(self._deadline, time.monotonic() + grace)
        self.kill()
        for copy in copies:
            copy.join(timeout=1)
        return code or (128 + signal.SIGINT if left else 0)

    def kill(self) -> None:
        """Kill the processes, and those that they started, if they are still there."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        """Within the block, Ctrl-C, SIGTERM and SIGUSR1 are passed on; after a second Ctrl-C nothing runs for long."""

        def pass_on(number: int, frame: object) -> None:
            self._stops += number in STOPPING
            if self._stops > 1:
                self._deadline = min(self._deadline, time.monotonic() + LAST_WORDS)
            for process in self.processes:
                process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (*STOPPING, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _note_end(rank: int, process: subprocess.Popen, output: ErrorOutput, ended: queue.Queue) -> None:
    """Put the rank and the exit status of a process into a queue as soon as it has ended."""
    status = process.wait()
    if status not in AGREED and output.failed is None:
        output.failed = rank
    ended.put((rank, status))


def _report_signal(rank: int, status: int, output: ErrorOutput) -> None:
    """Report a process that a signal ended, if it was the first to fail."""
    if output.failed == rank:
        cause = ", often because memory ran out" if -status == signal.SIGKILL else ""
        name = signal.Signals(-status).name
        hint = "the same command continues from the last checkpoint"
        output.report(f"error: process {rank} was ended by {name}{cause}; {hint}")


def stop_with_launcher() -> None:
    """End this process and those that it started when the launcher ends; does nothing without a launcher."""
    handle = os.environ.pop(PIPE, None)
    if handle is not None:
        threading.Thread(target=_stop_at_end_of, args=(int(handle),), daemon=True).start()


def _stop_at_end_of(handle: int) -> None:
    os.read(handle, 1)  # returns at the end of the pipe: nothing is ever written to it
    os.killpg(os.getpgid(0), signal.SIGKILL)
