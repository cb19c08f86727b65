"""Shards, files that contain many images: local files, URLs, or the output of commands, read at offsets.

A local file is read by `pread`, a URL by range requests. The output of `pipe:COMMAND` can't be read at offsets, so it
is stored in a file under `data.index`, once for all processes of the machine and all later runs. It needs as much disk
space as the shard, and is stored only if the command succeeds (with bash, each part of a pipeline must) and writes a
complete tar.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

from stipple_core.data.sources.remote_files import file_system, read_url, with_retries
from stipple_core.data.sources.shard_patterns import expand_pattern, is_url
from stipple_core.data.sources.tar import unfinished
from stipple_core.files.atomic import locked, writing

READ_AHEAD = 4 << 20  # bytes of a URL that are read ahead while its index is made


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that contains many images: a `stipple_core.data.records.records.Source`."""

    path: str  # absolute, a URL, or pipe:COMMAND
    name: str  # within the data
    file: str | None = None  # the local file to read. None: `path` is a URL

    def open(self, place: int, size: int) -> IO[bytes]:
        """Read `size` bytes at the offset `place`. Raises OSError, or ValueError if the file is shorter."""
        data = read_url(self.path, place, size) if self.file is None else _read_local(self.file, place, size)
        if len(data) != size:
            fix = "start again" if self.file else "start again, or use pipe:curl -sf URL if its server ignores ranges"
            raise ValueError(
                f"{self.path} has {len(data)} of {size} bytes at {place}: it changed after it was indexed; {fix}"
            )
        return io.BytesIO(data)

    @property
    def fix(self) -> str:
        """Added to errors of a shard that is the output of a command: which file to delete."""
        if not self.path.startswith("pipe:"):
            return ""
        return f"; its output is stored in {self.file}: delete that file to run the command again"

    def stream(self) -> IO[bytes]:
        """Open the whole shard for reading and seeking."""
        if self.file is not None:
            return open(self.file, "rb")
        system, path = file_system(self.path)
        return system.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead")

    def state(self) -> dict[str, Any]:
        """Values that change with the contents: size, and time or etag. Raises FileNotFoundError or OSError."""
        if self.file is not None:
            return file_state(self.file)
        system, path = file_system(self.path)
        info = {str(key).lower(): value for key, value in with_retries(self.path, lambda: system.info(path)).items()}
        marks = ("etag", "lastmodified", "last_modified", "mtime", "updated", "created")
        return {"bytes": info.get("size"), **{mark: str(info[mark]) for mark in marks if info.get(mark)}}


def file_state(file: str) -> dict[str, Any]:
    """Values that change with the contents of a local file: size and modification time. Raises OSError."""
    stat = os.stat(file)
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}


def find_shards(patterns: str | Sequence[str], folder: str) -> list[Shard]:
    """Return the shards that patterns name, ordered by name. Commands are run; their output is stored in `folder`.

    Raises:
        ValueError: a pattern matches no file, two shards have the same name, or a command fails.
    """
    paths: dict[str, str] = {}  # by name
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path, name in expand_pattern(pattern):
            if paths.setdefault(name, path) != path:
                raise ValueError(
                    f"data.shards has two shards called {name}: {paths[name]} and {path}; name them in one pattern, "
                    "such as 'data/{a,b}/00000.tar', so that the folder is part of the name"
                )
    return [_shard(path, name, folder) for name, path in sorted(paths.items())]


def path_digest(path: str) -> str:
    """A hash of a path: the name of files about it in the index folder."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:24]


def _shard(path: str, name: str, folder: str) -> Shard:
    if path.startswith("pipe:"):
        return Shard(path, name, _store_output(path, folder))
    return Shard(path, name, None if is_url(path) else path)


@lru_cache(maxsize=32)
def _opened(file: str) -> IO[bytes]:
    return open(file, "rb", buffering=0)  # noqa: SIM115  (closed when it leaves the cache and is no longer read)


def _read_local(file: str, place: int, size: int) -> bytes:
    handle, data = _opened(file), b""
    while len(data) < size and (more := os.pread(handle.fileno(), size - len(data), place + len(data))):
        data += more
    return data


def _store_output(command: str, folder: str) -> str:
    """Return the file that contains the output of a command, which is run if the file does not exist."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.abspath(os.path.join(folder, f"{path_digest(command)}.tar"))
    with locked(path):
        if not os.path.exists(path):
            with writing(path) as file:
                result = subprocess.run([*_shell(), command.removeprefix("pipe:")], stdout=file, stderr=-1)
                lines = result.stderr.decode(errors="replace").strip().splitlines()
                message = (lines or ["no error message"])[-1][:200]
                if result.returncode:
                    raise ValueError(f"{command} ended with exit code {result.returncode}: {message}")
                with open(file.name, "rb") as written:
                    reason = unfinished(written, os.path.getsize(file.name))
                if reason:
                    raise ValueError(
                        f"{command} did not write a complete tar, so its output is not stored: {reason}; {message}"
                    )
    return path


def _shell() -> list[str]:
    """The shell that runs commands. With bash, a pipeline fails if any part fails; braces are not expanded."""
    bash = shutil.which("bash")
    return [bash, "+B", "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-c"]
