"""A folder tree, local or remote, walked in parallel: every regular file is an item.

Each folder is listed once, by one of a few threads, into a bounded queue; no list of the whole tree exists. Links to
regular files are followed (the uri is the link's path); links to folders are not, nor are devices and pipes: they are
counted as skipped. Refuses a folder that cannot be listed, because images in it would be lost in silence.

Example:
    >>> for batch in scan("photos/", ListOptions(), Tally()): ...
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from eagleray.core import storage
from eagleray.core.errors import DataError, EagleError
from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import (
    METADATA_NAMES,
    SPLITS,
    MetadataTable,
    Note,
    Tally,
    is_item,
    merge,
    note_of_folders,
    read_metadata,
)
from eagleray.vision.sources.options import ListOptions, Source
from eagleray.vision.sources.rows import Item, Rows, text_of

QUEUE_BATCHES = 16  # of BATCH_ROWS rows: what the walkers may be ahead of the reader


@dataclass(frozen=True)
class Found:
    """One entry of a folder: its name (undecodable bytes as surrogates) and what it is."""

    name: str
    kind: str  # "file" "folder" "special"
    size: int = -1
    mtime_ns: int = 0


@dataclass(frozen=True)
class Folder:
    """A folder still to be listed.

    Attributes:
        path: Its path in the tree's file system.
        parts: Folders from the source's root down to it.
        tables: Metadata files that apply to it, each with the depth of its own folder, shallow ones first.
    """

    path: str
    parts: tuple[str, ...] = ()
    tables: tuple[tuple[int, MetadataTable], ...] = ()


class LocalTree:
    """The local file system."""

    kind = "file"

    def entries(self, path: str) -> Iterator[Found]:
        """The entries of one folder, streamed."""
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    yield self._found(entry)
        except FileNotFoundError:
            return  # it vanished since its parent was listed
        except OSError as error:
            raise DataError(
                f"{self.shown(path)} cannot be listed: {error.strerror}",
                expected="folders that you may read, so that no image is lost",
                fix="change its permissions, or move it out of the source",
            ) from error

    def _found(self, entry: os.DirEntry[str]) -> Found:
        try:
            if entry.is_dir(follow_symlinks=False):
                return Found(entry.name, "folder")
            if not entry.is_file():
                return Found(entry.name, "special")
            stat = entry.stat()
        except OSError:
            return Found(entry.name, "file")  # it counts; reading it says why it cannot be read
        return Found(entry.name, "file", stat.st_size, stat.st_mtime_ns)

    def enter(self, path: str) -> tuple[list[str], Iterator[Found]]:
        """The names of the metadata files of a folder, and its entries."""
        return [name for name in METADATA_NAMES if os.path.isfile(self.join(path, name))], self.entries(path)

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def open(self, path: str) -> Any:
        return open(path, "rb")

    def member(self, path: str) -> bytes:
        return os.fsencode(path)

    def shown(self, path: str) -> str:
        return "file://" + text_of(os.fsencode(path))


class RemoteTree:
    """A tree of an fsspec store; one listing a folder, of which nothing is kept."""

    kind = "remote"

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def entries(self, path: str) -> Iterator[Found]:
        """The entries of one prefix."""
        try:
            entries = self._fs.ls(path, detail=True, refresh=True)
            self._fs.invalidate_cache(path)  # else the client keeps every listing of the walk
        except FileNotFoundError:
            return
        except Exception as error:
            raise locations.store_error(error, text_of(path)) from error
        for entry in entries:
            name, is_itself = entry["name"].rstrip("/"), entry["name"].rstrip("/") == path.rstrip("/")
            if entry["type"] == "directory" and not is_itself:
                yield Found(name.rsplit("/", 1)[-1], "folder")
            elif entry["type"] != "directory" and not is_itself and not entry["name"].endswith("/"):
                size = int(entry.get("size") or 0)
                yield Found(name.rsplit("/", 1)[-1], "file", size, locations.mtime_of(entry))

    def enter(self, path: str) -> tuple[list[str], Iterator[Found]]:
        """The names of the metadata files of a folder, and its entries."""
        entries = list(self.entries(path))
        return [entry.name for entry in entries if entry.name in METADATA_NAMES], iter(entries)

    def join(self, folder: str, name: str) -> str:
        return f"{folder.rstrip('/')}/{name}"

    def open(self, path: str) -> Any:
        return self._fs.open(path, "rb")

    def member(self, path: str) -> bytes:
        return str(self._fs.unstrip_protocol(path)).encode("utf-8", "surrogateescape")

    def shown(self, path: str) -> str:
        return text_of(str(self._fs.unstrip_protocol(path)))


def is_random_access(source: str) -> bool:
    """Local files can be read in any order and in place."""
    return not locations.is_remote(source)


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists the tree below ``source``.

    Args:
        source: A folder's path or URI.
        options: How to list.
        tally: Filled with what is no item.

    Yields:
        Record batches of LISTING_SCHEMA, in no fixed order.

    Raises:
        DataError: A folder cannot be listed, or a metadata file cannot be read.
        StorageError: The remote store does not answer.
    """
    if locations.is_remote(source):
        fs, root = storage.filesystem(source)
        tree: Any = RemoteTree(fs)
    else:
        tree, root = LocalTree(), locations.local_path(source)
    yield from _Walk(tree, root, options, tally).run()


SOURCE = Source(scan, is_random_access)


class _Walk:
    """One parallel walk: a stack of folders to list, threads that list them, a bounded queue of rows."""

    def __init__(self, tree: Any, root: str, options: ListOptions, tally: Tally) -> None:
        self._tree, self._root, self._options, self._tally = tree, root, options, tally
        self._stack: list[Folder] = [Folder(root)]
        self._busy = 0
        self._changed = threading.Condition()
        self._is_stopped = False
        self._out: queue.Queue[pa.RecordBatch | BaseException | None] = queue.Queue(QUEUE_BATCHES)
        self._tables: list[MetadataTable] = []
        self._wrapper = ""

    def run(self) -> Iterator[pa.RecordBatch]:
        self._wrapper = self._find_wrapper()
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._options.threads)]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                value = self._out.get()
                if value is None:
                    left -= 1
                elif isinstance(value, BaseException):
                    raise value
                else:
                    yield value
        finally:
            self._stop(threads)
        self._tally.metadata_rows += sum(table.rows.num_rows for table in self._tables)
        self._tally.metadata_matched += sum(table.matched for table in self._tables)

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        while any(thread.is_alive() for thread in threads):
            try:
                self._out.get(timeout=0.05)
            except queue.Empty:
                continue

    def _find_wrapper(self) -> str:
        folders = self._sole_folder(self._root)
        if not folders or folders.lower() in SPLITS:
            return ""
        inner = self._tree.entries(self._tree.join(self._root, folders))
        return folders if any(e.kind == "folder" and not e.name.startswith(".") for e in inner) else ""

    def _sole_folder(self, path: str) -> str:
        sole = ""
        for entry in self._tree.entries(path):
            if entry.kind == "special" or (not is_item((entry.name,)) and entry.kind == "file"):
                continue
            if entry.kind == "file" or (sole and not entry.name.startswith(".")):
                return ""
            sole = sole if entry.name.startswith(".") else entry.name
        return sole

    def _work(self) -> None:
        rows = Rows()
        try:
            while (folder := self._next()) is not None:
                try:
                    for batch in self._list(folder, rows):
                        self._put(batch)
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()
            last = rows.take()
            if last is not None:
                self._put(last)
            self._put(None)
        except BaseException as error:  # noqa: BLE001  handed to the reader's thread, which raises it
            self._put(error)

    def _next(self) -> Folder | None:
        with self._changed:
            while not self._stack and self._busy and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped or not self._stack:
                return None
            self._busy += 1
            return self._stack.pop()

    def _put(self, value: pa.RecordBatch | BaseException | None) -> None:
        while not self._is_stopped:
            try:
                return self._out.put(value, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _list(self, folder: Folder, rows: Rows) -> Iterator[pa.RecordBatch]:
        names, entries = self._tree.enter(folder.path)
        tables = folder.tables + tuple((len(folder.parts), table) for table in self._read_tables(folder, names))
        for entry in entries:
            parts = (*folder.parts, entry.name)
            path = self._tree.join(folder.path, entry.name)
            if entry.kind == "folder":
                if not entry.name.startswith("."):
                    with self._changed:
                        self._stack.append(Folder(path, parts, tables))
                        self._changed.notify()
            elif is_item(parts) and entry.kind == "special":
                with self._changed:
                    self._tally.skipped_special += 1
            elif is_item(parts):
                batch = rows.add(self._item(entry, path, parts, tables))
                if batch is not None:
                    yield batch

    def _read_tables(self, folder: Folder, names: list[str]) -> list[MetadataTable]:
        tables = []
        for name in sorted(names):
            path = self._tree.join(folder.path, name)
            try:
                with self._tree.open(path) as file:
                    tables.append(read_metadata(file, name, self._tree.shown(path)))
            except EagleError:
                raise
            except OSError as error:
                raise locations.store_error(error, self._tree.shown(path)) from error
        with self._changed:
            self._tables += tables
        return tables

    def _item(
        self, entry: Found, path: str, parts: tuple[str, ...], tables: tuple[tuple[int, MetadataTable], ...]
    ) -> Item:
        note: Note = note_of_folders(parts[:-1], self._wrapper, self._options.labels)
        for depth, table in tables:
            row = table.find("/".join(parts[depth:]))
            note = merge(note, row) if row else note
        return Item(
            uri=self._tree.shown(path),
            kind=self._tree.kind,
            container="",
            member=self._tree.member(path),
            size=entry.size,
            mtime_ns=entry.mtime_ns,
            labels=note.labels,
            metadata=note.metadata,
        )
