"""Sources: folders, archives and listings of images, listed as a stream of rows and read by row.

A listing says where each image's bytes lie and what is known about it; it is Arrow all the way, so a source of any size
is listed in flat memory and cut into slices that any worker can read on its own. Nothing is ever extracted.

Refuses: a source that is missing, empty, or none of the kinds in SOURCES.

Example:
    >>> for batch in list_items("photos.zip"):
    ...     for row, data in read_items(batch): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import DataError
from eagleray.core.tables import Entry, resolve
from eagleray.vision.sources.annotation import Tally
from eagleray.vision.sources.options import ListOptions
from eagleray.vision.sources.rows import LISTING_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

    from eagleray.vision.images import ImageRefused, Limits
    from eagleray.vision.sources.containers import Containers

__all__ = [
    "LISTING_SCHEMA",
    "SOURCES",
    "ListOptions",
    "Tally",
    "detect",
    "is_random_access",
    "list_items",
    "read_items",
]

SOURCES = {
    "folder": Entry("eagleray.vision.sources.folder:SOURCE"),
    "zip": Entry("eagleray.vision.sources.zip_archive:SOURCE"),
    "tar": Entry("eagleray.vision.sources.tar_archive:SOURCE"),
    "webdataset": Entry("eagleray.vision.sources.webdataset:SOURCE"),
    "parquet": Entry("eagleray.vision.sources.parquet:SOURCE"),
    "listing": Entry("eagleray.vision.sources.listing:SOURCE"),
}


def detect(source: str) -> str:
    """The kind of a source, a key of SOURCES, by what it is and not by what it is called.

    Raises:
        DataError: It is missing, or is no folder, archive or listing.
    """
    from eagleray.vision.sources.detection import kind_of

    return kind_of(source)


def list_items(
    source: str, options: ListOptions | None = None, *, tally: Tally | None = None
) -> Iterator[pa.RecordBatch]:
    """Lists a source.

    Args:
        source: Path or URI of a folder, archive, Parquet file or listing; a brace pattern or glob of archives.
        options: How.
        tally: Filled with what the listing met besides items.

    Yields:
        Non-empty record batches of LISTING_SCHEMA, streamed, in no fixed order.

    Raises:
        DataError: The source is missing, empty, damaged, over a cap, or its metadata names none of its images.
        StorageError: The storage does not answer.
    """
    options = options or ListOptions()
    own, is_empty = Tally(), True
    entry: Any = resolve(SOURCES, detect(source) if options.kind == "auto" else options.kind, what="kind of source")
    for batch in entry.scan(source, options, own):
        is_empty = False
        yield batch
    if is_empty:
        raise DataError(
            f"{source} holds no files" + (f" ({own.skipped_special} links or devices)" if own.skipped_special else ""),
            expected="at least one regular file whose name does not start with a dot",
            fix="check the path; links to folders are not followed: give their targets as sources",
        )
    if own.metadata_rows and not own.metadata_matched:
        raise DataError(
            f"none of the {own.metadata_rows} rows of the metadata of {source} names one of its files",
            expected="file_name relative to the metadata file's own folder",
            fix="mend file_name, or give the file another name than metadata.*",
        )
    if tally is not None:
        tally.add(own)


def read_items(
    listing: pa.Table | pa.RecordBatch, limits: Limits | None = None, *, containers: Containers | None = None
) -> Iterator[tuple[int, bytes | ImageRefused]]:
    """Reads the items of a listing: see ``reading.read_items``."""
    from eagleray.vision.sources.reading import read_items as read

    return read(listing, limits, containers=containers)


def is_random_access(source: str) -> bool:
    """Whether a source can be scored in place: its items can be read in any order, many times, by any worker here."""
    return bool(resolve(SOURCES, detect(source), what="kind of source").is_random_access(source))


def absolute(source: str) -> str:
    """A source as it is called from any working directory."""
    from eagleray.vision.sources import locations

    return source if locations.is_remote(source) else os.fspath(locations.local_path(source))
