"""Signals that ask a run to save, or to save and stop; several processes agree on what was asked."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAVING = signal.SIGUSR1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be done after the optimizer step under way."""

    save: bool  # write a checkpoint now
    exit_code: int | None  # stop with it: 128 + the signal's number, 0 where the time is over; None: go on


class Signals:
    """Within its `with` block SIGTERM and SIGINT ask for a stop, SIGUSR1 for a checkpoint; the step is finished first.

    A second SIGTERM or SIGINT ends the process at once, with nothing saved.
    """

    def __init__(self):
        self._stop: int | None = None
        self._save = False
        self._handlers: dict[int, Any] = {}  # those of before

    def __enter__(self) -> Signals:
        self._handlers = {number: signal.signal(number, self._note) for number in (*STOPPING, SAVING)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def request(self, out_of_time: bool, device: torch.device, world: int) -> Request:
        """What any of `world` processes was asked for since the last call; every process calls it at the same step."""
        save, self._save = self._save, False
        code = 128 + self._stop if self._stop is not None else 0 if out_of_time else -1
        if world > 1:
            answer = torch.tensor([int(save), code], device=device)
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
            save, code = bool(answer[0]), int(answer[1])
        return Request(save=save, exit_code=code if code >= 0 else None)

    def _note(self, number: int, frame: Any) -> None:
        if number == SAVING:
            self._save = True
        elif self._stop is not None:
            os._exit(128 + number)
        else:
            self._stop = number
