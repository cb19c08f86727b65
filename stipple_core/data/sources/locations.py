"""Where shards lie: patterns to shards, and reading them at offsets: here, behind a URL, or out of a command.

Patterns hold {first..last} and {a,b} as in a shell, and * ? [] for files that are there. A shard's name is its path
from the folder before the first of these on, so that data keep their names when they move.

A local file is read by `pread`, a URL by range requests (fsspec; https reads the extra `remote`, s3 the package
s3fs). A pipe can't seek: what `pipe:COMMAND` writes is kept in a file under `data.index`, made once for all processes
of the machine and all later runs, and needs as much disk as the shard. It is kept if the command ends well, which
where there is bash each part of a pipeline has to, and wrote a tar with its end marker.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, TypeVar

from stipple_core.data.sources.tar import unfinished
from stipple_core.files.atomic import locked, writing

T = TypeVar("T")
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MAX_SHARDS = 1_000_000
ABSENT = (404, 410)  # what a server answers where there is no such file
TRIES = 5  # of a request; a training run must not read another picture because a network hiccupped
BLOCK = 4 << 20  # bytes read ahead of a URL while its index is made


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that holds many pictures: a `stipple_core.data.records.records.Source`."""

    path: str  # absolute, a URL, or pipe:COMMAND
    name: str  # within the data
    file: str | None = None  # the local file to read; None: `path` is a URL

    def open(self, place: int, size: int) -> IO[bytes]:
        """`size` bytes at an offset. Raises OSError if they can't be had, ValueError if there are fewer."""
        data = _read_url(self.path, place, size) if self.file is None else _read_local(self.file, place, size)
        if len(data) != size:
            mend = "start again" if self.file else "start again, or use pipe:curl -sf URL if its server ignores ranges"
            raise ValueError(
                f"{self.path} gave {len(data)} of {size} bytes at {place}: not what it was when indexed; {mend}"
            )
        return io.BytesIO(data)

    @property
    def mend(self) -> str:
        """What to add to a complaint about the whole shard: where the output of a command is kept."""
        kept = self.path.startswith("pipe:")
        return f"; it is kept in {self.file}: delete that, and the command is run again" if kept else ""

    def stream(self) -> IO[bytes]:
        """The whole shard, open to read and seek."""
        if self.file is not None:
            return open(self.file, "rb")
        system, path = _file_system(self.path)
        return system.open(path, "rb", block_size=BLOCK, cache_type="readahead")

    def state(self) -> dict[str, Any]:
        """What changes when the contents do: size, and time or etag. Raises FileNotFoundError, or OSError."""
        if self.file is not None:
            return file_state(self.file)
        system, path = _file_system(self.path)
        known = {str(key).lower(): value for key, value in with_retries(self.path, lambda: system.info(path)).items()}
        marks = ("etag", "lastmodified", "last_modified", "mtime", "updated", "created")
        return {"bytes": known.get("size"), **{mark: str(known[mark]) for mark in marks if known.get(mark)}}


def file_state(file: str) -> dict[str, Any]:
    """What changes when a local file does. Raises OSError."""
    stat = os.stat(file)
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}


def find_shards(patterns: str | Sequence[str], kept: str) -> list[Shard]:
    """The shards that patterns name, in order of names; those of pipes are in the folder `kept` when this returns.

    Raises ValueError for a pattern that matches nothing, two shards of one name, or a command that fails.
    """
    found: dict[str, str] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path, name in _expand(pattern):
            if found.setdefault(name, path) != path:
                raise ValueError(
                    f"data.shards has two shards called {name}: {found[name]} and {path}; name them in one pattern, "
                    "such as 'data/{a,b}/00000.tar', for the folder to be part of the name"
                )
    return [_shard(path, name, kept) for name, path in sorted(found.items())]


def _shard(path: str, name: str, kept: str) -> Shard:
    if path.startswith("pipe:"):
        return Shard(path, name, _keep_output(path, kept))
    return Shard(path, name, None if _is_url(path) else path)


def _is_url(path: str) -> bool:
    return "://" in path


def _expand(pattern: str) -> Iterator[tuple[str, str]]:
    """Path and name of each shard of a pattern."""
    pipe = pattern.startswith("pipe:")
    fixed = re.split(r"[{*]" if pipe or _is_url(pattern) else r"[{*?\[]", pattern, maxsplit=1)[0]
    prefix = fixed[: fixed.rfind("/") + 1]
    for each in expand_braces(pattern, ranges_only=pipe):
        if pipe:
            yield each, _command_name(each)
        elif _is_url(each):
            for path in _glob_url(each):
                name = path[len(prefix) :] if path.startswith(prefix) else path.rpartition("/")[2]
                yield path, re.split(r"[?#]", name)[0]
        else:
            for path in _glob(each):
                yield os.path.abspath(path), os.path.relpath(path, prefix or ".").replace(os.sep, "/")


def expand_braces(pattern: str, ranges_only: bool = False) -> list[str]:
    """The texts of a pattern with {0..9}, {000..099} (zeros are kept) and {a,b}; `ranges_only` leaves {a,b} alone."""
    texts = [""]
    rest = pattern
    while match := RANGE.search(rest) or (None if ranges_only else CHOICE.search(rest)):
        earlier = None if ranges_only else CHOICE.search(rest)
        match = earlier if earlier and earlier.start() < match.start() else match
        choices = _choices(match)
        if len(texts) * len(choices) > MAX_SHARDS:
            raise ValueError(f"data.shards {pattern} names more than {MAX_SHARDS} shards; give fewer")
        texts = [text + rest[: match.start()] + choice for text in texts for choice in choices]
        rest = rest[match.end() :]
    return [text + rest for text in texts]


def _choices(match: re.Match) -> Sequence[str]:
    if match.re is CHOICE:
        return match[1].split(",")
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise ValueError(f"data.shards {match[0]} names more than {MAX_SHARDS} shards; give fewer")
    padded = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1 for text in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    return [
        f"{number:0{width}d}"
        for number in range(first, last + (1 if first <= last else -1), 1 if first <= last else -1)
    ]


def _glob(path: str) -> list[str]:
    if os.path.isdir(path):
        raise ValueError(f"data.shards {path} is a folder; give its files, such as '{path.rstrip('/')}/*.tar'")
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]  # one that is not there is skipped by name
    if found := sorted(each for each in glob.glob(path, recursive=True) if not os.path.isdir(each)):
        return found
    raise ValueError(f"data.shards {path} matches no file; give .tar or .parquet files")


def _glob_url(url: str) -> list[str]:
    if "*" not in url:
        return [url]
    system, path = _file_system(url)
    if found := sorted(system.unstrip_protocol(each) for each in system.glob(path)):
        return found
    raise ValueError(f"data.shards {url} matches no file; give .tar or .parquet files")


def _command_name(command: str) -> str:
    """What a command calls its shard: the last word that ends in .tar, without folders; else the whole command."""
    words = re.findall(r"[^\s'\"/=?&|;<>]+\.tar\b", command)
    return words[-1] if words else command


@lru_cache(maxsize=32)
def _opened(file: str) -> IO[bytes]:
    return open(file, "rb", buffering=0)  # noqa: SIM115  (closed when it leaves the cache and nobody reads from it)


def _read_local(file: str, place: int, size: int) -> bytes:
    handle, data = _opened(file), b""
    while len(data) < size and (more := os.pread(handle.fileno(), size - len(data), place + len(data))):
        data += more
    return data


def _read_url(url: str, place: int, size: int) -> bytes:
    def read() -> bytes:
        system, path = _file_system(url)
        return system.cat_file(path, start=place, end=place + size)

    return with_retries(url, read)


def with_retries(url: str, action: Callable[[], T]) -> T:
    """What an action on a URL gives; a network that fails for some seconds is asked again.

    Raises FileNotFoundError if there is nothing, OSError if it can't be had, ValueError as the action does.
    """
    for tried in range(1, TRIES + 1):
        try:
            return action()
        except ValueError:
            raise
        except Exception as error:  # each file system has its own errors
            if isinstance(error, FileNotFoundError):
                if _is_gone(error):
                    raise
                error = error.__cause__
            if tried == TRIES:
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise OSError(f"{url} can't be read after {TRIES} tries: {said}") from None
            time.sleep(2.0**tried / 4)
    raise AssertionError


def _is_gone(error: FileNotFoundError) -> bool:
    """Whether there is nothing, and not a server that can't be asked, of which fsspec says the same over HTTP."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return _is_gone(cause)
    failed = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return not failed or getattr(cause, "status", None) in ABSENT


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; fsspec keeps one for each process."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        mend = "pip install 'stipple[remote]'" if url.startswith("http") else "install what it names, or use pipe:"
        raise ValueError(f"data.shards {url} can't be opened: {error}; {mend}") from None


def _keep_output(command: str, folder: str) -> str:
    """The file that holds what a command writes; it is run if that is not there yet."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.abspath(os.path.join(folder, f"{path_digest(command)}.tar"))
    with locked(path):
        if not os.path.exists(path):
            with writing(path) as file:
                result = subprocess.run([*_shell(), command.removeprefix("pipe:")], stdout=file, stderr=-1)
                said = (result.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
                if result.returncode:
                    raise ValueError(f"{command} ended with exit code {result.returncode}: {said[:200]}")
                with open(file.name, "rb") as written:
                    reason = unfinished(written, os.path.getsize(file.name))
                if reason:
                    raise ValueError(f"{command} wrote no whole tar, so that nothing is kept: {reason}; {said[:200]}")
    return path


def _shell() -> list[str]:
    """What runs a command; with bash, a pipeline fails if any part of it does. Braces are left to the command."""
    bash = shutil.which("bash")
    return [bash, "+B", "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-c"]


def path_digest(path: str) -> str:
    """The name under which a shard is remembered."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:24]
