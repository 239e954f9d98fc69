"""Single images out of shards, in any order, without reading their neighbours.

Training visits a corpus at random, and each of several workers only a part of each batch: read by row group, all of
them would read everything. Image bytes lie in a shard as they are (shards.py: no compression, no dictionary), so each
image is one span of its file. Where the spans lie is found out, not assumed: the length before each value must lead to
the next and the last to the end of the column chunk, and the first image must have the digest that its row says. A
shard written otherwise is read by row group through Arrow, a few groups kept.

Example:
    >>> with ShardImages(corpus.path) as images:
    ...     data = images.read("shards/part-0000.parquet", row=17)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eagleray.core.errors import ArtifactError, storage_error
from eagleray.core.storage import sha256_bytes

OPEN_SHARDS = 32
KEPT_GROUPS = 4  # row groups kept where spans cannot be found: 32 MiB each (shards.ROW_GROUP_BYTES)
# What Parquet puts before the values of a plain page: its header (Thrift compact, 21 bytes or so) and one run of
# definition levels; 31 to 33 bytes seen in what Arrow 26 writes.
_PREFACES = range(8, 128)
_LENGTH_BYTES = 4


class ShardImages:
    """Reads single images of a corpus; for one thread at a time.

    Args:
        root: The corpus folder, which the shards' paths are relative to.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self._open: OrderedDict[str, _Shard] = OrderedDict()

    def __enter__(self) -> ShardImages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        while self._open:
            self._open.popitem()[1].close()

    def read(self, shard: str, row: int) -> bytes:
        """The bytes of one image.

        Args:
            shard: Path of the shard, relative to the corpus.
            row: Of the shard, from 0.

        Raises:
            ArtifactError: The shard is missing or no longer whole.
            StorageError: The storage does not answer.
        """
        found = self._open.get(shard)
        if found is None:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            found = self._open[shard] = _Shard(self._root / shard)
        self._open.move_to_end(shard)
        return found.read(row)


class _Shard:
    """One open shard."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False)
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise _broken(path, "is missing") from None
        except pa.ArrowInvalid as error:
            raise _broken(path, f"is no Parquet file: {str(error)[:200]}") from error
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error
        metadata = self._file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._column = metadata.schema.to_arrow_schema().names.index("image")
        self._spans: dict[int, NDArray[np.int64] | None] = {}
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def close(self) -> None:
        self._file.close()
        os.close(self._fd)

    def read(self, row: int) -> bytes:
        if not 0 <= row < self._starts[-1]:
            raise _broken(self._path, f"has {self._starts[-1]} rows, row {row} was asked for")
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        at = row - int(self._starts[group])
        if group not in self._spans:
            self._spans[group] = self._find_spans(group)
        spans = self._spans[group]
        if spans is None:
            return self._read_by_arrow(group, at)
        start, length = int(spans[at, 0]), int(spans[at, 1])
        data = self._pread(length, start)
        if len(data) != length:
            raise _broken(self._path, "is shorter than it was")
        return data

    def _pread(self, length: int, start: int) -> bytes:
        try:
            return os.pread(self._fd, length, start)
        except OSError as error:
            raise storage_error(error, f"reading {self._path}") from error

    def _read_by_arrow(self, group: int, at: int) -> bytes:
        if group not in self._groups:
            while len(self._groups) >= KEPT_GROUPS:
                self._groups.popitem(last=False)
            self._groups[group] = self._file.read_row_group(group, columns=["image"], use_threads=False).column(0)
        self._groups.move_to_end(group)
        return bytes(self._groups[group][at].as_buffer())

    def _find_spans(self, group: int) -> NDArray[np.int64] | None:
        """Start and length of every image of a row group, int64 (rows, 2); None where they cannot be proven."""
        chunk = self._file.metadata.row_group(group).column(self._column)
        if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or chunk.path_in_schema != "image":
            return None
        start, rows = chunk.data_page_offset, int(self._starts[group + 1] - self._starts[group])
        end = start + chunk.total_compressed_size
        for preface in _PREFACES:
            spans = self._walk(start + preface, end, rows)
            if spans is not None and self._is_first(group, spans):
                return spans
        return None

    def _walk(self, start: int, end: int, rows: int) -> NDArray[np.int64] | None:
        """The spans when the lengths lead from ``start`` to exactly ``end`` in so many rows."""
        spans = np.empty((rows, 2), np.int64)
        for row in range(rows):
            length = int.from_bytes(self._pread(_LENGTH_BYTES, start), "little")
            start += _LENGTH_BYTES
            if start + length > end:
                return None
            spans[row] = start, length
            start += length
        return spans if start == end else None

    def _is_first(self, group: int, spans: NDArray[np.int64]) -> bool:
        ids = self._file.read_row_group(group, columns=["id"], use_threads=False).column(0)
        first: str = ids[0].as_py()
        return sha256_bytes(self._pread(int(spans[0, 1]), int(spans[0, 0]))) == first


def _broken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {what}", expected="a shard as the corpus lists it", fix="get the corpus again")
