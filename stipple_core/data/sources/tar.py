"""Webdataset tars: KEY.jpg with the fields KEY.txt, KEY.json or KEY.cls. Headers are indexed, nothing is extracted.

As in webdataset, the key of a member ends at the first dot of its file name; the rest is its field. KEY.json contains
the columns of a row, KEY.txt captions for a row without "text", KEY.cls the column "cls". To support a further field,
add it to TEXT_FIELDS and `_add_field`.

Only regular members are used. All others, and damaged headers, are reported as skipped. The loop over headers is
implemented here, because that of the standard library's `tarfile` ends silently at a damaged or truncated header.
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
INCOMPLETE = ("cut short", "no end marker", "damaged header", "not a tar", "compressed", "empty file")
TEXT_FIELDS = ("txt", "json", "cls")  # fields that describe an image


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of its bytes in the tar
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image in a tar, and its columns."""

    name: str  # KEY.EXT
    offset: int
    size: int
    row: dict[str, Any] | None  # None: no field describes the image


def read_samples(file: IO[bytes], size: int) -> tuple[list[TarSample], list[Skip]]:
    """Return the images of a tar of `size` bytes ordered by name, and a Skip for each unusable member.

    A Skip with the path "" is about the tar itself.
    """
    images: dict[str, Member] = {}
    rows: dict[str, dict[str, Any]] = {}
    described: dict[str, str] = {}  # by key: the first member with a text field
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
            if images.setdefault(key, member) is not member:
                reason = f"a second image of the key {key}; {images[key].name} is used"
        elif reason is None and field in TEXT_FIELDS:
            described.setdefault(key, member.name)
            reason = _add_field(rows.setdefault(key, {}), field, file, member)
        elif reason is None and field.endswith(EXTENSIONS):
            reason = f"the field {field} is not an image: the key ends at the first dot"
        if reason:
            skipped.append(Skip(member.name, reason))
    skipped += [Skip(name, "a caption without an image") for key, name in described.items() if key not in images]
    samples = [TarSample(m.name, m.offset, m.size, rows.get(key) or None) for key, m in images.items()]
    return sorted(samples, key=lambda sample: sample.name), skipped


def unfinished(file: IO[bytes], size: int) -> str | None:
    """Return why a file of `size` bytes is not a complete tar, or None if it ends with the end marker."""
    reasons = (member.reason for member in read_members(file, size) if isinstance(member, Skip))
    return next((reason for reason in reasons if reason.startswith(INCOMPLETE)), None)


def _split(name: str) -> tuple[str, str]:
    """Key and field of a member: the field is what follows the first dot of the file name, in lower case."""
    folder, base = posixpath.split(name)
    stem, _, field = base.partition(".")
    return (posixpath.join(folder, stem), field.lower()) if stem else ("", "")  # hidden files have no key


def _add_field(row: dict[str, Any], field: str, file: IO[bytes], member: Member) -> str | None:
    """Add the columns of a member to the row of its key. Returns the reason if it has none, otherwise None."""
    if member.size > MAX_LINE:
        return f"{member.size} bytes, more than {MAX_LINE}"
    file.seek(member.offset)
    data = file.read(member.size)
    parsed = parse_row(data) if field == "json" else parse_captions(data)
    if isinstance(parsed, str):
        return parsed
    if field == "json":
        text = row.get("text")
        row |= parsed
        if text and not row.get("text"):
            row["text"] = text
    elif field == "cls":
        row["cls"] = parsed[0]
    elif not row.get("text"):
        row["text"] = parsed
    return None


class _Archive(tarfile.TarFile):
    """A tar whose headers are read one by one by `read_members`."""

    def next(self) -> None:
        """Do nothing: the constructor would read the first header by this."""


class _Headers:
    """The file that `tarfile` reads headers from. It refuses a header that claims to be huge."""

    def __init__(self, file: IO[bytes]):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self.file.read(size)


def read_members(file: IO[bytes], size: int) -> Iterator[Member | Skip]:
    """Yield the regular members of a tar of `size` bytes, in one pass over headers, and a Skip for all others."""
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
            yield Skip(info.name, f"cut short: the file has {max(cut, 0)} of its {info.size} bytes")
            return
        yield _member(info)
        place = after


def _member(info: tarfile.TarInfo) -> Member | Skip:
    name = posixpath.normpath(info.name)
    if name.startswith("/"):
        return Skip(info.name, "an absolute name")
    if name == ".." or name.startswith("../"):
        return Skip(info.name, "a name outside the tar")
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
    """Report problems with the end of a tar, whose last block is `block`."""
    if size == 0:
        yield Skip("", "empty file")
    elif not block:
        yield Skip("", f"no end marker at byte {place}: further members may be missing")
    elif len(block) < BLOCK:
        yield Skip("", _damage(block, place, None))
    elif place == 0:
        yield Skip("", "a tar without members")
    else:
        while rest := file.read(MAX_HEADER):
            if rest.strip(b"\0"):
                yield Skip("", f"data after the end marker at byte {place} are not read")
                return


def _damage(block: bytes, place: int, error: Exception | None) -> str:
    for magic, command in COMPRESSED.items():
        if place == 0 and block.startswith(magic):
            return f"compressed, so members can't be read at offsets; use 'pipe:{command} < SHARD', or unpack it"
    if place == 0:
        return "not a tar"
    return f"damaged header at byte {place}: {error}" if error else f"cut short in a header at byte {place}"
