"""Bytes of listed items, in the order of the listing; each container is opened once and kept while it is in use.

What is wrong with one image is a value (ImageRefused); what is wrong with a whole container or store is an error, so
that a network fault never quarantines an archive.

Example:
    >>> for row, data in read_items(listing, limits): ...
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from eagleray.core.tables import Entry, resolve
from eagleray.vision.images import Limits
from eagleray.vision.sources.containers import Containers, Found, Row

READERS = {
    "file": Entry("eagleray.vision.sources.readers:read_files"),
    "zip": Entry("eagleray.vision.sources.readers:read_zip"),
    "tar": Entry("eagleray.vision.sources.readers:read_tar"),
    "tar_stream": Entry("eagleray.vision.sources.readers:read_tar_stream"),
    "parquet": Entry("eagleray.vision.sources.parquet:read_parquet"),
    "refused": Entry("eagleray.vision.sources.readers:read_refused"),
    "remote": Entry("eagleray.vision.sources.remote:read_remote"),
}
RUN_ROWS = 256  # rows handled at a time: Python objects of a run, not of the slice


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
    table = listing if isinstance(listing, pa.Table) else pa.Table.from_batches([listing])
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
