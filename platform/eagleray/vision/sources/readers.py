"""Readers of files and archives: rows of one container in, bytes or why not out, in the same order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Any

from eagleray.vision.images import ImageRefused, Reason
from eagleray.vision.sources import locations
from eagleray.vision.sources.containers import Containers, Found, Row, too_large
from eagleray.vision.sources.stream import Forward
from eagleray.vision.sources.zip_member import read_member


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
