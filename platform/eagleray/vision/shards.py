"""Shard files of a corpus: written once, in row groups small enough to score a part, hashed while they are written.

Image bytes are stored as they are (JPEG does not compress further); every other column by zstd. No statistics are kept
of
image bytes: Parquet would repeat whole images in the footer.

Example:
    >>> with ShardWriter(path, columns=("site", "split")) as writer:
    ...     writer.add(row)
    >>> writer.part   # rows, bytes, sha256
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.errors import storage_error

FIXED = (
    ("id", pa.string()),  # sha256 of the bytes, hex
    ("uri", pa.string()),
    ("image", pa.binary()),
    ("width", pa.int32()),  # upright, px
    ("height", pa.int32()),
    ("format", pa.string()),
    ("labels", pa.list_(pa.string())),
)
ROW_GROUP_IMAGES = 128
ROW_GROUP_BYTES = 32 << 20  # what a writer and a reader hold at a time


def shard_schema(columns: tuple[str, ...]) -> pa.Schema:
    """The schema of every shard of a corpus: the fixed columns, then its metadata columns as nullable strings."""
    return pa.schema([*FIXED, *((name, pa.string()) for name in columns)])


class HashingFile:
    """A new file that counts and hashes what is written to it; closing makes it durable, discarding removes it.

    Args:
        path: Must not exist.

    Raises:
        StorageError: The storage refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._hash = path, hashlib.sha256()
        self.bytes = 0
        self.closed = False
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115  unbuffered: no close can fail
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error

    def write(self, data: Any) -> int:
        """Writes bytes or any buffer, all of it."""
        view = memoryview(data).cast("B")
        if self.closed:
            return view.nbytes  # Arrow's writer closes itself once more when it is collected
        try:
            done = 0
            while done < view.nbytes:
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            raise storage_error(error, f"writing {self._path}") from error
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Nothing: it is unbuffered, and closing syncs."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Flushes to the disk."""
        if self.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(error, f"writing {self._path}") from error
        finally:
            self.closed = True
            self._file.close()

    def discard(self) -> None:
        """Closes without durability and removes the file."""
        self.closed = True
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of what was written, hex."""
        return self._hash.hexdigest()


class ShardWriter:
    """Writes one shard; when it is left by an error the file is removed.

    Args:
        path: The file, which must not exist.
        columns: Names of the metadata columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._schema = shard_schema(columns)
        self._file = HashingFile(path)
        names = [name for name in self._schema.names if name != "image"]
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression={name: "none" if name == "image" else "zstd" for name in self._schema.names},
            use_dictionary=[name for name in names if name not in ("id", "uri")],
            write_statistics=names,
        )
        self._rows: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self.num_rows = 0
        self.num_flushed = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._writer.close()
                self._file.close()
        finally:
            if not self._file.closed:
                self._file.discard()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds one image; ``row`` has every column of the schema, missing metadata is null."""
        self._rows.append(row)
        self.num_rows += 1
        self._pending_bytes += len(row["image"])
        if len(self._rows) >= ROW_GROUP_IMAGES or self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def is_full_with(self, num_bytes: int) -> bool:
        """Whether one more image of so many bytes makes ``add`` write to the disk."""
        return len(self._rows) + 1 >= ROW_GROUP_IMAGES or self._pending_bytes + num_bytes >= ROW_GROUP_BYTES

    def write(self, table: pa.Table) -> None:
        """Adds a row group that is already Arrow."""
        self._flush()
        if table.num_rows:
            self._writer.write_table(table.cast(self._schema), row_group_size=ROW_GROUP_IMAGES)
            self.num_rows += table.num_rows

    def _flush(self) -> None:
        if not self._rows:
            return
        arrays = [pa.array([row.get(field.name) for row in self._rows], field.type) for field in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self.num_flushed += len(self._rows)
        self._rows, self._pending_bytes = [], 0

    @property
    def part(self) -> dict[str, Any]:
        """``rows``, ``bytes`` and ``sha256`` of the closed file."""
        return {"rows": self.num_rows, "bytes": self._file.bytes, "sha256": self._file.sha256}


def rewrite(
    source: Path, target: Path, columns: tuple[str, ...], change: Callable[[pa.Table], pa.Table]
) -> dict[str, Any]:
    """Copies a shard row group by row group, changed; no image is decoded.

    Args:
        source: The shard.
        target: Must not exist.
        columns: Metadata columns of both.
        change: Takes a row group's rows, gives those to write.

    Returns:
        ``rows``, ``bytes`` and ``sha256`` of the new file.
    """
    with pq.ParquetFile(source, pre_buffer=False) as file, ShardWriter(target, columns) as writer:
        for group in range(file.metadata.num_row_groups):
            writer.write(change(file.read_row_group(group, use_threads=False)))
    return writer.part


def write_table(path: Path, table: pa.Table) -> dict[str, Any]:
    """Writes a small table atomically: aside, durable, then renamed.

    Returns:
        ``rows``, ``bytes`` and ``sha256``.

    Raises:
        StorageError: The storage refuses; nothing is published.
    """
    aside = storage.aside_path(path)
    file = HashingFile(aside)
    try:
        pq.write_table(table, file, compression="zstd", row_group_size=65_536)
        file.close()
        os.replace(aside, path)
        storage.fsync_dir(path.parent)
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
    finally:
        if not file.closed:
            file.discard()
        aside.unlink(missing_ok=True)
    return {"rows": table.num_rows, "bytes": file.bytes, "sha256": file.sha256}
