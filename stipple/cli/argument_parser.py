"""The argument parser of all commands."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from stipple_core.nearest import did_you_mean

FIRST = "most used"  # the group that --help shows first


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line and names the nearest flag.

    Args:
        command: the name of the command, such as `draw`.
        usage: what follows the name in the line of usage, such as `PROMPT ... [flags]`.
        about: the text that --help shows before the flags.

    Raises:
        ValueError: for a mistake, instead of exiting; the caller turns it into `error: ...` and exit code 2.
    """

    def __init__(self, command: str, usage: str, about: str | None):
        super().__init__(
            prog=f"stipple {command}",
            usage=f"stipple {command} {usage}",
            description=about,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.first = self.add_argument_group(FIRST)

    def add_help_flag(self, group: Any) -> None:
        """Add --help to a group, usually the last one."""
        group.add_argument("-h", "--help", action="help", help="show this and exit")

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message, and the nearest flag or value where one is unknown."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        word, valid = unknown.split(" ")[0].split("=")[0], list(self._option_string_actions)
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            word, valid = choice[1], choice[2].replace("'", "").split(", ")
        nearest = did_you_mean(word, valid, cutoff=0.75)
        raise ValueError(f"{message}; did you mean {nearest}?" if nearest else message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and leaves more room for names than argparse's 24 columns."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 30, **options})
