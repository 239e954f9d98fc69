"""Bytes of listed items, in the order of the listing; each container is opened once and kept while it is in use.

What is wrong with one image is a value (ImageRefused); what is wrong with a whole container or store is an error, so that a
network fault never quarantines an archive.

Example:
    >>> for row, data in read_items(listing, limits): ...
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from eagleray.core.tables import Entry, resolve
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.sources import locations
from eagleray.vision.sources.zip_member import read_member

READERS = {
    "file": Entry("eagleray.vision.sources.reading:read_files"),
    "zip": Entry("eagleray.vision.sources.reading:read_zip"),
    "tar": Entry("eagleray.vision.sources.reading:read_tar"),
    "tar_stream": Entry("eagleray.vision.sources.reading:read_tar_stream"),
    "parquet": Entry("eagleray.vision.sources.parquet:read_parquet"),
    "refused": Entry("eagleray.vision.sources.reading:read_refused"),
    "remote": Entry("eagleray.vision.sources.remote:read_remote"),
}
MAX_OPEN = 8  # containers kept open; a slice seldom touches more than two
RUN_ROWS = 256  # rows handled at a time: Python objects of a run, not of the slice

Row = dict[str, Any]
Found = bytes | ImageRefused


class Containers:
    """Open containers by name, the least recently used closed first; keep one over several slices to read on in a stream."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, kind: str, container: str, opener: Any) -> Any:
        """The open container, opened by ``opener(container)`` when it is not."""
        key = (kind, container)
        if key not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[key] = opener(container)
        self._open.move_to_end(key)
        return self._open[key]

    def close(self) -> None:
        """Closes all."""
        while self._open:
            self._open.popitem()[1].close()


def read_items(
    listing: pa.Table | pa.RecordBatch, limits: Limits | None = None, *, containers: Containers | None = None
) -> Iterator[tuple[int, Found]]:
    """Reads the items of a listing.

    Args:
        listing: Rows of LISTING_SCHEMA.
        limits: ``max_bytes`` of one image.
        containers: Kept open by the caller; otherwise opened and closed here.

    Yields:
        Row index, from 0 and in order, and the bytes or why there are none: ``too_large`` (by the listed size, before
        reading, or by what came), ``unreadable``, ``corrupt``.

    Raises:
        DataError: A container is gone or is not what was listed.
        StorageError: The storage does not answer.
    """
    limit = (limits or Limits()).max_bytes
    columns = ["kind", "container", "member", "offset", "size", "stored", "crc32"]
    table = pa.table(listing) if isinstance(listing, pa.Table) else pa.Table.from_batches([listing])
    narrow = table.select(columns)
    own = containers or Containers()
    try:
        at = 0
        for start in range(0, narrow.num_rows, RUN_ROWS):
            rows = narrow.slice(start, RUN_ROWS).to_pylist()
            for kind, container, run in _runs(rows):
                read = resolve(READERS, kind, what="kind of item")
                for found in read(container, run, limit, own):
                    yield at, found
                    at += 1
    finally:
        if containers is None:
            own.close()


def _runs(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Cuts rows where the kind or the container changes."""
    start = 0
    for at in range(1, len(rows) + 1):
        first = rows[start]
        if at == len(rows) or (rows[at]["kind"], rows[at]["container"]) != (first["kind"], first["container"]):
            yield first["kind"], first["container"], rows[start:at]
            start = at


def too_large(size: int, limit: int) -> ImageRefused:
    """The refusal of an image over the limit."""
    return ImageRefused(Reason.TOO_LARGE, f"{size} bytes, at most {limit}")


def read_files(_: str, rows: list[Row], limit: int, __: Containers) -> Iterator[Found]:
    """Plain files."""
    for row in rows:
        yield too_large(row["size"], limit) if row["size"] > limit else read_file(row["member"], limit)


def read_file(path: bytes, limit: int) -> Found:
    """The bytes of one local file.

    Raises:
        OSError: This process has no descriptors or memory left.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                return too_large(size, limit)
            data = file.read(size + 1)
            while len(data) < size and (more := file.read(size + 1 - len(data))):
                data += more  # a read may be cut short by a signal
    except OSError as error:
        if error.errno in locations.EXHAUSTED:
            raise
        return ImageRefused(Reason.UNREADABLE, error.strerror or type(error).__name__)
    except ValueError as error:
        return ImageRefused(Reason.UNREADABLE, str(error))
    return data if len(data) <= limit else too_large(len(data), limit)


def read_zip(container: str, rows: list[Row], limit: int, containers: Containers) -> Iterator[Found]:
    """Members of a zip, by the offsets of their local headers."""
    file: IO[bytes] = containers.get("zip", container, locations.open_container)
    for row in rows:
        if row["size"] > limit:
            yield too_large(row["size"], limit)
        else:
            yield _guarded(container, read_member, file, row["offset"], row["stored"], row["crc32"], limit)


def read_tar(container: str, rows: list[Row], limit: int, containers: Containers) -> Iterator[Found]:
    """Members of a plain tar, by the offsets of their data."""
    file: IO[bytes] = containers.get("tar", container, locations.open_container)
    for row in rows:
        yield too_large(row["size"], limit) if row["size"] > limit else _guarded(container, _read_at, file, row)


def _read_at(file: IO[bytes], row: Row) -> Found:
    file.seek(row["offset"])
    data = file.read(row["size"])
    return data if len(data) == row["size"] else ImageRefused(Reason.UNREADABLE, "the archive ends inside the member")


def _guarded(container: str, read: Any, *args: Any) -> Found:
    """Runs a read; a failing disk is that image's fault, a failing store or process is not."""
    try:
        found: Found = read(*args)
    except OSError as error:
        if locations.is_remote(container) or error.errno in locations.EXHAUSTED or not error.errno:
            raise locations.store_error(error, locations.shown_container(container)) from error
        return ImageRefused(Reason.UNREADABLE, error.strerror or type(error).__name__)
    return found


def read_tar_stream(container: str, rows: list[Row], limit: int, containers: Containers) -> Iterator[Found]:
    """Members of a compressed tar; goes forward through the stream and starts anew only when asked to go back."""
    from eagleray.vision.sources.stream import Forward

    stream: Forward = containers.get("tar_stream", container, Forward)
    for row in rows:
        if row["size"] > limit:
            yield too_large(row["size"], limit)
            continue
        yield stream.read_at(row["offset"], row["size"])


def read_refused(_: str, rows: list[Row], __: int, ___: Containers) -> Iterator[Found]:
    """Rows of a listing that name nothing that may be read; the member says why."""
    for row in rows:
        yield ImageRefused(Reason.UNREADABLE, row["member"].decode())
