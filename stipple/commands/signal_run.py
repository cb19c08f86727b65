"""Ask a running training to save a checkpoint, or to save one and stop.

stipple signal runs/emoji save
stipple signal runs/emoji stop

The training finishes its current step first. Run this command on the machine that trains.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from stipple.cli.argument_parser import Parser
from stipple_core.config import one_line_errors

SIGNALS = {"save": signal.SIGUSR1, "stop": signal.SIGTERM}


def send(run: str, request: str) -> int:
    """Send a request to the process that uses a run folder; return the process.

    Raises:
        ValueError: no run uses the folder, or one on another machine does, or its process handles no requests.
    """
    from stipple.training.run.run_folder import LOCK, holder, in_use

    if not (Path(run) / LOCK).is_file():
        raise ValueError(f"{run} is not a run folder; give the folder that `run=` names, such as runs/emoji")
    if not in_use(run):
        raise ValueError(f"no training uses {run}; it has ended, or it has not started")
    process = holder(run)
    if process.pid is None:
        raise ValueError(f"{run} is used by a process that its lock file does not name; send that process a signal")
    if process.host != socket.gethostname():
        raise ValueError(f"{run} is used by {process}, and this is {socket.gethostname()}; run the command there")
    if not process.accepts_signals:
        stop = "to stop it, press Ctrl-C there; it continues when you start it again"
        raise ValueError(
            f"{run} is used by {process}, which is no training and saves each part that is complete; {stop}"
        )
    try:
        os.kill(process.pid, SIGNALS[request])
    except ProcessLookupError:
        raise ValueError(f"{run} is used by {process}, which is not visible here, perhaps in a container") from None
    return process.pid


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("signal", "RUN save|stop", __doc__)
    parser.first.add_argument("run", metavar="RUN", help="run folder, such as runs/emoji")
    parser.first.add_argument("request", choices=SIGNALS, help="save: write a checkpoint; stop: write one and stop")
    parser.add_help_flag(parser.first)
    with one_line_errors():
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        process = send(arguments.run, arguments.request)
    print(f"asked process {process} to {arguments.request} after its current step")


if __name__ == "__main__":
    main()
