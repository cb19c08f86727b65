"""Files behind URLs, read by fsspec with retries. https needs the extra `remote`, s3 the package s3fs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
MISSING = (404, 410)  # HTTP status codes of a file that does not exist
TRIES = 5  # per request: a network failure of a few seconds must not change which images a run sees


def read_url(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a URL from an offset. Raises as `with_retries`."""

    def read() -> bytes:
        system, path = file_system(url)
        return system.cat_file(path, start=start, end=start + size)

    return with_retries(url, read)


def with_retries(url: str, action: Callable[[], T]) -> T:
    """Return the result of an action on a URL, which is repeated if the network fails.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the action failed in each of 5 tries.
        ValueError: as the action raises it.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except ValueError:
            raise
        except Exception as error:  # each file system has its own errors
            if isinstance(error, FileNotFoundError):
                if _does_not_exist(error):
                    raise
                error = error.__cause__
            if attempt == TRIES:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise OSError(f"{url} can't be read after {TRIES} tries: {reason}") from None
            time.sleep(2.0**attempt / 4)
    raise AssertionError


def _does_not_exist(error: FileNotFoundError) -> bool:
    """Whether the file does not exist. Over HTTP, fsspec raises the same error if the server can't be reached."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return _does_not_exist(cause)
    failed = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return not failed or getattr(cause, "status", None) in MISSING


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. fsspec caches one for each process."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        fix = "pip install 'stipple[remote]'" if url.startswith("http") else "install the package, or use pipe:"
        raise ValueError(f"data.shards {url} can't be opened: {error}; {fix}") from None
