"""Patterns that name shards: {first..last} and {a,b} as in a shell, and * ? [] for existing files.

The name of a shard is its path relative to the folder before the pattern, so that names stay the same when the data
move.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence

from stipple_core.data.sources.remote_files import file_system

RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MAX_SHARDS = 1_000_000


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def expand_pattern(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield path and name of each shard of a pattern. Raises ValueError if no file matches it."""
    pipe = pattern.startswith("pipe:")
    fixed = re.split(r"[{*]" if pipe or is_url(pattern) else r"[{*?\[]", pattern, maxsplit=1)[0]
    prefix = fixed[: fixed.rfind("/") + 1]
    for each in expand_braces(pattern, ranges_only=pipe):
        if pipe:
            yield each, _command_name(each)
        elif is_url(each):
            for path in _glob_url(each):
                name = path[len(prefix) :] if path.startswith(prefix) else path.rpartition("/")[2]
                yield path, re.split(r"[?#]", name)[0]
        else:
            for path in _glob(each):
                yield os.path.abspath(path), os.path.relpath(path, prefix or ".").replace(os.sep, "/")


def expand_braces(pattern: str, ranges_only: bool = False) -> list[str]:
    """Expand {0..9}, {000..099} (with leading zeros) and {a,b} in a pattern; with `ranges_only`, not {a,b}."""
    texts = [""]
    rest = pattern
    while match := RANGE.search(rest) or (None if ranges_only else CHOICE.search(rest)):
        earlier = None if ranges_only else CHOICE.search(rest)
        match = earlier if earlier and earlier.start() < match.start() else match
        choices = _choices(match)
        if len(texts) * len(choices) > MAX_SHARDS:
            raise ValueError(f"data.shards {pattern} names more than {MAX_SHARDS} shards; use fewer")
        texts = [text + rest[: match.start()] + choice for text in texts for choice in choices]
        rest = rest[match.end() :]
    return [text + rest for text in texts]


def _choices(match: re.Match) -> Sequence[str]:
    if match.re is CHOICE:
        return match[1].split(",")
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise ValueError(f"data.shards {match[0]} names more than {MAX_SHARDS} shards; use fewer")
    padded = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1 for text in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    return [
        f"{number:0{width}d}"
        for number in range(first, last + (1 if first <= last else -1), 1 if first <= last else -1)
    ]


def _glob(path: str) -> list[str]:
    if os.path.isdir(path):
        raise ValueError(
            f"data.shards {path} is a folder; use a pattern of its files, such as '{path.rstrip('/')}/*.tar'"
        )
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]  # a missing file is reported as skipped
    if paths := sorted(each for each in glob.glob(path, recursive=True) if not os.path.isdir(each)):
        return paths
    raise ValueError(f"data.shards {path} matches no file; use .tar or .parquet files")


def _glob_url(url: str) -> list[str]:
    if "*" not in url:
        return [url]
    system, path = file_system(url)
    if paths := sorted(system.unstrip_protocol(each) for each in system.glob(path)):
        return paths
    raise ValueError(f"data.shards {url} matches no file; use .tar or .parquet files")


def _command_name(command: str) -> str:
    """The shard name of a command: the last word that ends in .tar, without folders; otherwise the whole command."""
    words = re.findall(r"[^\s'\"/=?&|;<>]+\.tar\b", command)
    return words[-1] if words else command
