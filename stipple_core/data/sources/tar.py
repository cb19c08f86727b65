"""Webdataset tars, read by header and never extracted: KEY.jpg with KEY.txt, KEY.json or KEY.cls beside it.

A member's key ends at the first dot of its file name, as webdataset has it. Captions and columns are those of a
folder: KEY.json holds a row, KEY.txt captions for a row without "text", KEY.cls the column "cls". Only regular
members are used. Others, and whatever is damaged, are told by name: the standard library's `tarfile` reads headers
here, but its own loop ends without a word where a header is cut short or damaged.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from stipple_core.data.records.records import Skip
from stipple_core.data.sources.folder import EXTENSIONS
from stipple_core.data.sources.metadata import MAX_LINE, parse_captions, parse_row

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 1 << 20  # bytes of a long name or of pax fields
COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
UNFINISHED = ("cut short", "no end marker", "damaged header", "not a tar", "compressed", "empty file")
TEXTS = ("txt", "json", "cls")  # fields that describe a picture


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of its bytes in the tar
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """A picture in a tar with its columns; None: nothing describes it."""

    name: str  # KEY.EXT
    offset: int
    size: int
    row: dict[str, Any] | None


def read_samples(file: IO[bytes], size: int) -> tuple[list[TarSample], list[Skip]]:
    """The pictures of a tar of `size` bytes in order of names, and what can't be used; "" names the tar itself."""
    pictures: dict[str, Member] = {}
    rows: dict[str, dict[str, Any]] = {}
    describing: dict[str, str] = {}  # by key: the first member that does
    seen: set[str] = set()
    skipped: list[Skip] = []
    for member in read_members(file, size):
        if isinstance(member, Skip):
            skipped.append(member)
            continue
        key, field = _split(member.name)
        reason = f"duplicate member {member.name}; its first is used" if member.name in seen else None
        seen.add(member.name)
        if reason is None and f".{field}" in EXTENSIONS:
            if pictures.setdefault(key, member) is not member:
                reason = f"a second picture of the key {key}; {pictures[key].name} is used"
        elif reason is None and field in TEXTS:
            describing.setdefault(key, member.name)
            reason = _describe(rows.setdefault(key, {}), field, file, member)
        elif reason is None and field.endswith(EXTENSIONS):
            reason = f"a field {field}, not a picture: the key ends at the first dot"
        if reason:
            skipped.append(Skip(member.name, reason))
    skipped += [Skip(name, "a caption without a picture") for key, name in describing.items() if key not in pictures]
    samples = [TarSample(m.name, m.offset, m.size, rows.get(key) or None) for key, m in pictures.items()]
    return sorted(samples, key=lambda sample: sample.name), skipped


def unfinished(file: IO[bytes], size: int) -> str | None:
    """Why a file of `size` bytes is no tar or not all of one, by its headers; None: it has its end marker."""
    reasons = (member.reason for member in read_members(file, size) if isinstance(member, Skip))
    return next((reason for reason in reasons if reason.startswith(UNFINISHED)), None)


def _split(name: str) -> tuple[str, str]:
    """Key and field: the field is what follows the first dot of the file name, in small letters."""
    folder, base = posixpath.split(name)
    stem, _, field = base.partition(".")
    return (posixpath.join(folder, stem), field.lower()) if stem else ("", "")  # a hidden file has no key


def _describe(row: dict[str, Any], field: str, file: IO[bytes], member: Member) -> str | None:
    """Put the columns of a member into the row of its key; or say why there are none."""
    if member.size > MAX_LINE:
        return f"{member.size} bytes, more than {MAX_LINE}"
    file.seek(member.offset)
    data = file.read(member.size)
    found = parse_row(data) if field == "json" else parse_captions(data)
    if isinstance(found, str):
        return found
    if field == "json":
        text = row.get("text")
        row |= found
        if text and not row.get("text"):
            row["text"] = text
    elif field == "cls":
        row["cls"] = found[0]
    elif not row.get("text"):
        row["text"] = found
    return None


class _Archive(tarfile.TarFile):
    """A tar whose headers are asked for one by one."""

    def next(self) -> None:
        """Nothing: the constructor would read the first header with it."""


class _Headers:
    """What `tarfile` reads headers from; one that claims to be huge is refused before it is read."""

    def __init__(self, file: IO[bytes]):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self.file.read(size)


def read_members(file: IO[bytes], size: int) -> Iterator[Member | Skip]:
    """The regular members of a tar of `size` bytes, by one walk over its headers; and a Skip for all else."""
    archive = _Archive(fileobj=_Headers(file), mode="r", encoding="utf-8", errors="surrogateescape")
    place = 0
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        if not block.strip(b"\0") or len(block) < BLOCK:
            yield from _ending(file, block, place, size)
            return
        file.seek(place)
        archive.offset = place
        try:
            info = tarfile.TarInfo.fromtarfile(archive)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            yield Skip("", _damage(block, place, error))
            return
        after = archive.offset
        if after <= place or info.size < 0:
            yield Skip("", f"damaged header at byte {place}: a size of {info.size} bytes")
            return
        if info.isreg() and after > size and (cut := size - info.offset_data) < info.size:
            yield Skip(info.name, f"cut short: {max(cut, 0)} of {info.size} bytes are there; nothing follows")
            return
        yield _member(info)
        place = after


def _member(info: tarfile.TarInfo) -> Member | Skip:
    name = posixpath.normpath(info.name)
    if name.startswith("/"):
        return Skip(info.name, "an absolute name")
    if name == ".." or name.startswith("../"):
        return Skip(info.name, "a name that leads out of the tar")
    if info.issparse():
        return Skip(info.name, "a sparse member, not a plain file")
    kinds = {
        "a directory": info.isdir(),
        "a symbolic link": info.issym(),
        "a hard link": info.islnk(),
        "a device": info.isdev(),
    }
    for kind, is_it in kinds.items():
        if is_it:
            return Skip(info.name, f"{kind}, not a plain file")
    if not info.isreg():
        return Skip(info.name, f"a member of type {info.type!r}, not a plain file")
    return Member(name, info.offset_data, info.size)


def _ending(file: IO[bytes], block: bytes, place: int, size: int) -> Iterator[Skip]:
    """What is wrong with the end of a tar, whose last block is `block`."""
    if size == 0:
        yield Skip("", "empty file")
    elif not block:
        yield Skip("", f"no end marker at byte {place}: members that followed may be missing")
    elif len(block) < BLOCK:
        yield Skip("", _damage(block, place, None))
    elif place == 0:
        yield Skip("", "a tar without members")
    else:
        while rest := file.read(MAX_HEADER):
            if rest.strip(b"\0"):
                yield Skip("", f"what follows the end marker at byte {place} is not read")
                return


def _damage(block: bytes, place: int, error: Exception | None) -> str:
    for magic, command in COMPRESSED.items():
        if place == 0 and block.startswith(magic):
            return f"compressed, so that members can't be read at offsets; give 'pipe:{command} < SHARD', or unpack it"
    if place == 0:
        return "not a tar"
    return f"damaged header at byte {place}: {error}" if error else f"cut short in a header at byte {place}"
