"""Signals that request a checkpoint, or a checkpoint and a stop; all processes agree on the request."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAVING = signal.SIGUSR1
AGAIN = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@dataclass(frozen=True, kw_only=True)
class SignalRequest:
    """The actions that signals request after the current optimizer step."""

    save: bool  # write a checkpoint
    exit_code: int | None  # stop with 128 + the signal number, or with 0 if the time is over; None: continue


class Signals:
    """Handles signals from its construction until `close`. SIGUSR1 requests a checkpoint after the current step.

    Within the `with` block, SIGTERM and SIGINT request a stop after the current step; a second one ends the process at
    once without saving. Outside the block, where there is nothing to save, the first one does.
    """

    def __init__(self):
        self._stop: int | None = None
        self._step_began = 0.0  # start of the current optimizer step
        self._step_seconds: float | None = None  # duration of the step before; None before the first one has ended
        self._save = self._stepping = False
        self._before = {number: _previous_handler(number) for number in (*STOPPING, SAVING)}
        self._install()

    def __enter__(self) -> Signals:
        self._install()  # another run may have been constructed in the meantime
        self._stepping, self._step_began = True, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._stepping = False
        self.close()

    def close(self) -> None:
        """Restore the handlers from before, unless others were installed since."""
        if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
            for number, handler in self._before.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handler)

    def request(self, out_of_time: bool, device: torch.device, world: int) -> SignalRequest:
        """The request to any of `world` processes since the last call; each has to call it at the same step."""
        now = time.monotonic()
        self._step_began, self._step_seconds = now, now - self._step_began
        save, self._save = self._save, False
        code = 128 + self._stop if self._stop is not None else 0 if out_of_time else -1
        if world > 1:
            answer = torch.tensor([int(save), code], device=device)
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
            save, code = answer.tolist()
        return SignalRequest(save=bool(save), exit_code=code if code >= 0 else None)

    def _install(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number == SAVING:
            self._save = True
        elif self._stop is not None or not self._stepping:
            if self._stop is None:
                _print_line("interrupted before the first step; nothing was saved")
            os._exit(128 + number)
        else:
            self._stop = number
            _print_line(f"finishing the step{self._duration()}; {AGAIN[number]} again ends now")

    def _duration(self) -> str:
        """The duration of a step, such as `, about 40 s`; empty before the first one has ended."""
        return "" if self._step_seconds is None else f", about {max(self._step_seconds, 1):.0f} s"


def _print_line(text: str) -> None:
    """Print a line from a signal handler, where `print` may raise, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def _previous_handler(number: int) -> Any:
    """The handler of a signal; if it belongs to another run, the one before that run."""
    handler = signal.getsignal(number)
    owner = getattr(handler, "__self__", None)
    return owner._before[number] if isinstance(owner, Signals) else handler
