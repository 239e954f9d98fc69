"""A tar archive: headers are scanned once with the offset of each member's data, nothing is extracted.

A plain local tar can then be read at any place. A compressed one (.gz .bz2 .xz .zst) is a stream: its offsets count in
the unpacked bytes and readers go forward through it. Members that are no regular files (links, devices, sparse
files) are skipped and counted.

Refuses: what is no tar, one that is cut off or damaged (tarfile would take the damage for the end), archives over
the caps.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from eagleray.core.errors import DataError
from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import (
    MAX_METADATA_BYTES,
    MetadataTable,
    Note,
    Tally,
    Wrapper,
    is_item,
    is_metadata,
    merge,
    note_of_folders,
    parts_of,
    read_metadata,
)
from eagleray.vision.sources.compression import compression_of, open_unpacked
from eagleray.vision.sources.options import ListOptions, Source, check_caps, too_many
from eagleray.vision.sources.rows import LISTING_SCHEMA, Item, Repeats, batches, text_of

MAX_HEADER_BYTES = 1 << 20  # an extended header (long name, pax records); tarfile would read any size into memory
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

Members = Iterator[tuple[Any, tarfile.TarInfo, Note]]


def is_random_access(source: str) -> bool:
    """A plain local tar is read in place; a compressed one is a stream."""
    return not locations.is_remote(source) and all(
        not compression_of(locations.container_of(place)) for place in locations.expand(source)
    )


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists the regular members of a tar.

    Raises:
        DataError: It is no tar, is cut off, or is over a cap.
    """
    yield from scan_members(source, options, tally, lambda found: found)


def scan_members(
    source: str, options: ListOptions, tally: Tally, choose: Callable[[Members], Members]
) -> Iterator[pa.RecordBatch]:
    """Lists the members that ``choose`` lets through, with the note that it gives them."""
    for place in locations.expand(source):
        yield from _Listing(locations.container_of(place), options, tally).run(choose)


SOURCE = Source(scan, is_random_access)


class _Listing:
    """One tar: one pass over the headers into a temporary file, then the rows with labels; memory stays flat."""

    def __init__(self, container: str, options: ListOptions, tally: Tally) -> None:
        self._container, self._options, self._tally = container, options, tally
        self._shown = locations.shown_container(container)
        self._tables: list[tuple[tuple[str, ...], MetadataTable]] = []
        self._wrapper, self._repeats = Wrapper(), Repeats()

    def run(self, choose: Callable[[Members], Members]) -> Iterator[pa.RecordBatch]:
        with tempfile.TemporaryFile() as spool:
            with pa.ipc.new_stream(spool, LISTING_SCHEMA) as writer:
                for batch in batches(self._raw_items(choose)):
                    writer.write_batch(batch)
            spool.seek(0)
            self._tables.sort(key=lambda pair: (len(pair[0]), pair[0]))
            with pa.ipc.open_stream(spool) as reader:
                yield from batches(self._labelled(row) for batch in reader for row in batch.to_pylist())
        self._tally.metadata_rows += sum(table.rows.num_rows for _, table in self._tables)
        self._tally.metadata_matched += sum(table.matched for _, table in self._tables)

    def _raw_items(self, choose: Callable[[Members], Members]) -> Iterator[Item]:
        _, mtime_ns = locations.stamp_of(self._container)
        kind = "tar_stream" if compression_of(self._container) else "tar"
        found = (
            (tar, member, Note())
            for tar, member in members(self._container, self._options)
            if self._counts(tar, member)
        )
        for _, member, note in choose(found):
            self._wrapper.see(parts_of(member.name))
            self._repeats.see(member.name)
            yield Item(
                uri="",
                kind=kind,
                container=self._container,
                member=_raw_name(member.name),
                offset=member.offset_data,
                size=member.size,
                stored=member.size,
                mtime_ns=mtime_ns,
                labels=note.labels,
                metadata=note.metadata,
            )

    def _counts(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        """Whether a member is an item; a metadata file is read here, while a stream stands on it."""
        parts = parts_of(member.name)
        if member.isdir() or not (is_item(parts) or is_metadata(parts)):
            return False
        if not member.isreg() or member.issparse():
            self._tally.skipped_special += 1
            return False
        if not is_metadata(parts):
            return True
        place = f"tar://{text_of(member.name)}::{self._shown}"
        if member.size > MAX_METADATA_BYTES:
            raise too_many(place, "bytes", MAX_METADATA_BYTES, "the limit of a metadata file")
        file: Any = tar.extractfile(member)
        data = io.BytesIO(file.read())  # a member of a stream cannot seek, and Parquet has to
        self._tables.append((parts[:-1], read_metadata(data, parts[-1], place)))
        return False

    def _labelled(self, row: dict[str, Any]) -> Item:
        name = row["member"].decode("utf-8", "surrogateescape")
        parts = parts_of(name)
        note = note_of_folders(parts[:-1], self._wrapper.name, self._options.labels)
        if row["labels"] or row["metadata"]:
            note = merge(note, {**dict(row["metadata"]), **({"labels": row["labels"]} if row["labels"] else {})})
        for folder, table in self._tables:
            if parts[: len(folder)] == folder:
                found = table.find("/".join(parts[len(folder) :]))
                note = merge(note, found) if found else note
        uri = f"tar://{text_of(name)}{self._repeats.suffix(name)}::{self._shown}"
        return Item(**{**row, "uri": uri, "labels": note.labels, "metadata": note.metadata})


def members(container: str, options: ListOptions) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member of a tar, in order; the archive keeps no list of them.

    Raises:
        DataError: It is no tar, is cut off, or is over a cap.
    """
    shown = locations.shown_container(container)
    packed, _ = locations.stamp_of(container)
    mode: Any = "r|" if compression_of(container) else "r:"
    count = unpacked = 0
    try:
        with (
            open_unpacked(container) as file,
            tarfile.open(fileobj=file, mode=mode, bufsize=1 << 20, tarinfo=_StrictInfo) as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                count, unpacked = count + 1, unpacked + member.size
                check_caps(shown, options, count=count, unpacked=unpacked, packed=packed)
                yield tar, member
    except (tarfile.TarError, EOFError, ValueError, lzma.LZMAError, zlib.error, _Damaged, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise locations.store_error(error, shown) from error
        what = f"is damaged or cut off after {count} members" if count else "is no tar archive"
        raise DataError(
            f"{shown} {what}: {error}", expected="a whole tar, plain or compressed", fix="check the file, copy it again"
        ) from None


class _Damaged(Exception):
    """A header that is none, where tarfile would see the archive's end."""


class _StrictInfo(tarfile.TarInfo):
    """A header that says when it is damaged, and refuses to read an extended header of any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _StrictInfo:  # type: ignore[override]
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise _Damaged(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in EXTENDED and self.size > MAX_HEADER_BYTES:
            raise _Damaged(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def _raw_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
