"""The rows of a listing: what one image of a source is called, where its bytes lie, and what is known about it.

Bytes are found by ``container``, ``member`` and ``offset``, which are lossless; ``uri`` is for people and for the
scores, unquoted, undecodable bytes escaped by a backslash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

LISTING_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("kind", pa.string()),  # how it is read: a key of reading.READERS
        ("container", pa.string()),  # the archive, percent-quoted when local; empty for a plain file
        ("member", pa.binary()),  # name inside the container, or the file's path or URI
        ("offset", pa.int64()),  # tar: of the data; zip: of the local header; parquet: the row; else -1
        ("size", pa.int64()),  # bytes of the image; -1 when not known before reading
        ("stored", pa.int64()),  # bytes it takes in the container (zip: compressed; parquet: estimate)
        ("crc32", pa.int64()),  # zip's check value; -1 when there is none
        ("mtime_ns", pa.int64()),  # of the file or of the container; 0 when not known
        ("labels", pa.list_(pa.string())),
        ("metadata", pa.map_(pa.string(), pa.string())),
    ]
)
BATCH_ROWS = 4096  # about 1 MiB of rows: large enough for Arrow, small enough for a queue of them


class Item(NamedTuple):
    """One row of a listing; the fields are those of LISTING_SCHEMA."""

    uri: str
    kind: str
    container: str
    member: bytes
    offset: int = -1
    size: int = -1
    stored: int = -1
    crc32: int = -1
    mtime_ns: int = 0
    labels: tuple[str, ...] | list[str] = ()
    metadata: tuple[tuple[str, str], ...] = ()


class Rows:
    """Collects items and gives them as record batches of at most BATCH_ROWS.

    Example:
        >>> rows = Rows()
        >>> batch = rows.add(item)   # a RecordBatch when one is full, else None
        >>> last = rows.take()       # what is left, or None
    """

    def __init__(self) -> None:
        self._items: list[Item] = []

    def add(self, item: Item) -> pa.RecordBatch | None:
        """Adds one item; returns a batch when it is full."""
        self._items.append(item)
        return self.take() if len(self._items) >= BATCH_ROWS else None

    def take(self) -> pa.RecordBatch | None:
        """The rows collected so far, or None when there are none."""
        if not self._items:
            return None
        columns = zip(*self._items, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTING_SCHEMA, strict=True)]
        self._items = []
        return pa.RecordBatch.from_arrays(arrays, schema=LISTING_SCHEMA)


def batches(items: Iterator[Item]) -> Iterator[pa.RecordBatch]:
    """Cuts a stream of items into record batches."""
    rows = Rows()
    for item in items:
        batch = rows.add(item)
        if batch is not None:
            yield batch
    last = rows.take()
    if last is not None:
        yield last


class Repeats:
    """Numbers names that occur more than once, at 8 bytes a name: see all, then ask in the same order."""

    def __init__(self) -> None:
        self._full: list[Any] = []
        self._open: list[int] = []
        self._repeated: frozenset[int] | None = None
        self._counts: Counter[str] = Counter()

    def see(self, name: str) -> None:
        """Takes one name into account."""
        self._open.append(hash(name))
        if len(self._open) >= 65_536:
            self._full.append(np.array(self._open, dtype=np.int64))
            self._open = []

    def suffix(self, name: str) -> str:
        """``#n`` for the n-th repetition of a name, from 2; empty for the first."""
        if self._repeated is None:
            hashes = np.concatenate([*self._full, np.array(self._open, dtype=np.int64)])
            values, counts = np.unique(hashes, return_counts=True)
            self._repeated, self._full = frozenset(values[counts > 1].tolist()), []
        if hash(name) not in self._repeated:
            return ""
        self._counts[name] += 1
        return f"#{self._counts[name]}" if self._counts[name] > 1 else ""


def text_of(name: bytes | str) -> str:
    """A name as text that any UTF-8 column takes: undecodable bytes become ``\\xNN``.

    Args:
        name: Raw bytes, or a string whose undecodable bytes are surrogates (PEP 383).
    """
    raw = (
        name.encode("utf-8", "surrogateescape" if _is_escaped(name) else "surrogatepass")
        if isinstance(name, str)
        else name
    )
    return raw.decode("utf-8", "backslashreplace")


def _is_escaped(name: str) -> bool:
    return all(not "\ud800" <= char <= "\udfff" or "\udc80" <= char <= "\udcff" for char in name)


def as_text(value: Any) -> str | None:
    """A metadata value as a string; None and empty become None, so that absent is absent in every format."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bytes):
        return text_of(value)
    if isinstance(value, dict | list | tuple):
        import json

        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return text_of(str(value))
