"""Signals that ask a run to save, or to save and stop; several processes agree on what was asked."""

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
    """What is to be done after the optimizer step under way."""

    save: bool  # write a checkpoint now
    exit_code: int | None  # stop with it: 128 + the signal's number, 0 where the time is over; None: go on


class Signals:
    """From its making until `close`, SIGUSR1 asks for a checkpoint after the step under way, or after the first one.

    Within the `with` block SIGTERM and SIGINT ask for a stop after the step; a second one ends the process at once,
    with nothing saved. So does the first one outside of the block, where there is nothing to save.
    """

    def __init__(self):
        self._stop: int | None = None
        self._step_began = 0.0  # when the optimizer step under way began
        self._step_seconds: float | None = None  # how long the one before it took; None before the first one has ended
        self._save = self._stepping = False
        self._before = {number: _of_others(number) for number in (*STOPPING, SAVING)}
        self._install()

    def __enter__(self) -> Signals:
        self._install()  # another run may have been made meanwhile
        self._stepping, self._step_began = True, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._stepping = False
        self.close()

    def close(self) -> None:
        """Signals mean again what they did before, unless somebody else has taken them since."""
        if threading.current_thread() is threading.main_thread():  # which alone may
            for number, handler in self._before.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handler)

    def request(self, out_of_time: bool, device: torch.device, world: int) -> SignalRequest:
        """What any of `world` processes was asked for since the last call; every process calls it at the same step."""
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
                _say("interrupted before the first step; nothing was saved")
            os._exit(128 + number)
        else:
            self._stop = number
            _say(f"finishing the step{self._duration()}; {AGAIN[number]} again ends now")

    def _duration(self) -> str:
        """How long a step takes, such as `, about 40 s`; nothing before the first one has ended."""
        return "" if self._step_seconds is None else f", about {max(self._step_seconds, 1):.0f} s"


def _say(text: str) -> None:
    """Write a line from a signal handler, where `print` may raise; one of several processes does."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def _of_others(number: int) -> Any:
    """The handler of a signal; where that is another run's, the one before it."""
    handler = signal.getsignal(number)
    owner = getattr(handler, "__self__", None)
    return owner._before[number] if isinstance(owner, Signals) else handler
