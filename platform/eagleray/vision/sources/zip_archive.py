"""A zip archive: the central directory is streamed, each member is read in place by its offset, nothing is extracted.

Python's zipfile keeps an object a member (about 0.7 GB a million); this reads the directory in pieces, twice: once for
the wrapping folder, metadata and repeated names, once for the rows. A member is read from its local header, unpacked to
at most one byte over the limit, and compared with the directory's CRC-32.

Refuses: what is no zip, a directory that is cut off, archives over the caps. Links are skipped and counted; an
encrypted member or an unknown method is an item that is unreadable.

Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14-16 (end records), 4.5.3
    (zip64).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from eagleray.core.errors import DataError
from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import (
    MAX_METADATA_BYTES,
    MetadataTable,
    Tally,
    Wrapper,
    is_item,
    is_metadata,
    merge,
    note_of_folders,
    parts_of,
    read_metadata,
)
from eagleray.vision.sources.options import ListOptions, Source, check_caps
from eagleray.vision.sources.rows import Item, Repeats, batches, text_of

END, END64, LOCATOR64, ENTRY = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02"
ENTRY_FORMAT = struct.Struct("<4s6H3L5H2L")  # 46 bytes
END_FORMAT, END64_FORMAT, LOCATOR64_FORMAT = (
    struct.Struct("<4s4H2LH"),
    struct.Struct("<4sQ2H2L4Q"),
    struct.Struct("<4sLQL"),
)
FLAG_UTF8 = 0x800
MODE_TYPE, MODE_REGULAR, MODE_UNKNOWN = 0o170000, 0o100000, 0
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """One entry of the central directory."""

    name: str
    raw_name: bytes
    offset: int
    size: int
    stored: int
    crc32: int
    mode: int

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")

    @property
    def is_regular(self) -> bool:
        return self.mode & MODE_TYPE in (MODE_REGULAR, MODE_UNKNOWN)


def is_random_access(source: str) -> bool:
    """A local zip is read in place."""
    return not locations.is_remote(source)


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists the regular members of a zip.

    Raises:
        DataError: It is no zip, is cut off, or is over a cap.
    """
    for place in locations.expand(source):
        yield from batches(_items(locations.container_of(place), options, tally))


SOURCE = Source(scan, is_random_access)


def _items(container: str, options: ListOptions, tally: Tally) -> Iterator[Item]:
    shown = locations.shown_container(container)
    _, mtime_ns = locations.stamp_of(container)
    with locations.open_container(container) as file:
        overview = _Overview(file, shown, options)
        for member in members(file, shown):
            parts = parts_of(member.name)
            if member.is_folder or not is_item(parts):
                continue
            if not member.is_regular:
                tally.skipped_special += 1
                continue
            note = note_of_folders(parts[:-1], overview.wrapper, options.labels)
            for folder, table in overview.tables:
                if parts[: len(folder)] == folder:
                    row = table.find("/".join(parts[len(folder) :]))
                    note = merge(note, row) if row else note
            yield Item(
                uri=f"zip://{text_of(member.name)}{overview.repeats.suffix(member.name)}::{shown}",
                kind="zip",
                container=container,
                member=member.raw_name,
                offset=member.offset,
                size=member.size,
                stored=member.stored,
                crc32=member.crc32,
                mtime_ns=mtime_ns,
                labels=note.labels,
                metadata=note.metadata,
            )
        tally.metadata_rows += sum(table.rows.num_rows for _, table in overview.tables)
        tally.metadata_matched += sum(table.matched for _, table in overview.tables)


class _Overview:
    """The first pass: what has to be known before the first row can be written."""

    def __init__(self, file: IO[bytes], shown: str, options: ListOptions) -> None:
        from eagleray.vision.sources.zip_member import read_member

        self.repeats = Repeats()
        wrapper, found, unpacked, count = Wrapper(), [], 0, 0
        packed = file.seek(0, io.SEEK_END)
        for member in members(file, shown):
            parts = parts_of(member.name)
            if member.is_folder or not member.is_regular:
                continue
            if is_metadata(parts):
                found.append((parts, member))
            elif is_item(parts):
                wrapper.see(parts)
                self.repeats.see(member.name)
                count, unpacked = count + 1, unpacked + member.size
                check_caps(shown, options, count=count, unpacked=unpacked, packed=packed)
        self.wrapper = wrapper.name
        self.tables: list[tuple[tuple[str, ...], MetadataTable]] = []
        for parts, member in sorted(found, key=lambda pair: (len(pair[0]), pair[0])):
            place = f"zip://{text_of(member.name)}::{shown}"
            data = read_member(file, member.offset, member.stored, member.crc32, min(member.size, MAX_METADATA_BYTES))
            if not isinstance(data, bytes):
                raise DataError(
                    f"{place}: {data.detail}", expected="a metadata file that unpacks", fix="make the zip again"
                )
            self.tables.append((parts[:-1], read_metadata(io.BytesIO(data), parts[-1], place)))


def members(file: IO[bytes], shown: str) -> Iterator[Member]:
    """The entries of the central directory, in its order.

    Args:
        file: The archive, seekable.
        shown: Its uri, for messages.

    Raises:
        DataError: It is no zip or its directory is cut off.
    """
    start, size, shift = _directory(file, shown)
    buffer, at, left = b"", start, size
    while True:
        if len(buffer) < ENTRY_FORMAT.size and left == 0:
            break
        need = ENTRY_FORMAT.size
        if len(buffer) >= need:
            fields = ENTRY_FORMAT.unpack_from(buffer)
            need += fields[10] + fields[11] + fields[12]
        if len(buffer) < need:
            file.seek(at)
            piece = file.read(min(left, max(READ_BYTES, need - len(buffer))))
            if not piece:
                raise _cut_off(shown)
            buffer, at, left = buffer + piece, at + len(piece), left - len(piece)
            continue
        if fields[0] != ENTRY:
            raise _cut_off(shown)
        yield _member(fields, buffer[ENTRY_FORMAT.size : need], shift)
        buffer = buffer[need:]
    if buffer:
        raise _cut_off(shown)


def _member(fields: tuple[bytes | int, ...], tail: bytes, shift: int) -> Member:
    _, _, _, flags, _, _, _, crc32, stored, size, len_name, len_extra, _, _, _, attributes, offset = (
        field if isinstance(field, int) else 0 for field in fields
    )
    raw, extra = tail[:len_name], tail[len_name : len_name + len_extra]
    size, stored, offset = _zip64(extra, size, stored, offset)
    made_by = fields[1] if isinstance(fields[1], int) else 0
    mode = (
        attributes >> 16 if made_by >> 8 in (3, 19) else MODE_UNKNOWN
    )  # 3 Unix, 19 macOS: the others keep no mode there
    return Member(_name(raw, flags), raw, offset + shift, size, stored, crc32, mode)


def _name(raw: bytes, flags: int) -> str:
    try:
        return raw.decode("utf-8")  # most tools write UTF-8, many without saying so
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if flags & FLAG_UTF8 else raw.decode("cp437")


def _zip64(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            body = extra[4 : 4 + length]
            values = list(struct.unpack_from(f"<{len(body) // 8}Q", body))
            size = values.pop(0) if size == 0xFFFFFFFF and values else size
            stored = values.pop(0) if stored == 0xFFFFFFFF and values else stored
            offset = values.pop(0) if offset == 0xFFFFFFFF and values else offset
            break
        extra = extra[4 + length :]
    return size, stored, offset


def _directory(file: IO[bytes], shown: str) -> tuple[int, int, int]:
    """Start and size of the central directory, and the bytes that were put before the archive."""
    total = file.seek(0, io.SEEK_END)
    tail_at = max(0, total - 65_535 - END_FORMAT.size)
    file.seek(tail_at)
    tail = file.read()
    at = _end_record(tail)
    if at < 0:
        raise DataError(
            f"{shown} is no zip archive, or is cut off",
            expected="a whole zip archive",
            fix="check the file, copy it again",
        )
    _, _, _, _, _, size, start, _ = END_FORMAT.unpack_from(tail, at)
    end_at = tail_at + at
    locator_at = at - LOCATOR64_FORMAT.size
    if locator_at >= 0 and tail.startswith(LOCATOR64, locator_at):
        size, start, end_at = _directory64(file, shown, end_at - LOCATOR64_FORMAT.size)
    shift = end_at - size - start
    if shift < 0:
        raise _cut_off(shown)
    return start + shift, size, shift


def _end_record(tail: bytes) -> int:
    """Where the end record starts: the last that reaches exactly to the end, else the last that fits; -1 for none."""
    last_that_fits, at = -1, tail.rfind(END)
    while at >= 0:
        if at + END_FORMAT.size <= len(tail):
            end = at + END_FORMAT.size + END_FORMAT.unpack_from(tail, at)[7]
            if end == len(tail):
                return at
            last_that_fits = at if last_that_fits < 0 else last_that_fits
        at = tail.rfind(END, 0, at)
    return last_that_fits


def _directory64(file: IO[bytes], shown: str, locator_at: int) -> tuple[int, int, int]:
    file.seek(locator_at)
    said_at = LOCATOR64_FORMAT.unpack(file.read(LOCATOR64_FORMAT.size))[2]
    for at in (said_at, locator_at - END64_FORMAT.size):
        if at < 0:
            continue
        file.seek(at)
        raw = file.read(END64_FORMAT.size)
        if len(raw) == END64_FORMAT.size and raw.startswith(END64):
            *_, size, start = END64_FORMAT.unpack(raw)
            return size, start, at
    raise _cut_off(shown)


def _cut_off(shown: str) -> DataError:
    return DataError(
        f"the directory of {shown} is damaged or cut off",
        expected="a whole zip archive",
        fix="check the file, copy it again",
    )
