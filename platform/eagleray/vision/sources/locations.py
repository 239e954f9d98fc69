"""Where a source or a container is: a local path or an fsspec URI, opened and measured the same way.

A local container is kept as a percent-quoted ``file://`` URI, so that any file name survives a text column; for people
it is shown unquoted. Brace patterns (``x-{000..127}.tar``) and globs stand for several containers.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any
from urllib.parse import quote, unquote_to_bytes

from eagleray.core import storage
from eagleray.core.errors import DataError, EagleError, StorageError, storage_error
from eagleray.vision.sources.rows import text_of

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
REMOTE_BLOCK_BYTES = 8 << 20  # one range request of a remote archive; members are read in order of offset
MAX_PATTERN = 1_000_000  # containers that one brace pattern may stand for
EXHAUSTED = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)  # of this process, not of the file: never the image's fault


def is_remote(source: str) -> bool:
    """Whether a source is a URI of a store other than the local file system."""
    return bool(SCHEME.match(source)) and not source.startswith("file://")


def local_path(source: str) -> str:
    """The absolute path of a local source, given as a path or as an unquoted ``file://`` URI."""
    return os.path.abspath(os.path.expanduser(source.removeprefix("file://")))


def container_of(source: str) -> str:
    """The lossless name of a container for the listing's column."""
    return source if is_remote(source) else "file://" + quote(os.fsencode(local_path(source)))


def path_of(container: str) -> bytes:
    """The local path of a container of the listing, as bytes."""
    return unquote_to_bytes(container.removeprefix("file://"))


def shown(source: str | bytes) -> str:
    """A path or URI as people and scores see it."""
    if isinstance(source, str) and is_remote(source):
        return text_of(source)
    return "file://" + text_of(source if isinstance(source, bytes) else os.fsencode(local_path(source)))


def shown_container(container: str) -> str:
    """A container of the listing as people and scores see it."""
    return text_of(container) if is_remote(container) else "file://" + text_of(path_of(container))


def expand(source: str) -> list[str]:
    """The containers that a pattern stands for, in order; a source without a pattern stands for itself.

    Raises:
        DataError: A glob matches nothing, or a brace pattern is too large.
    """
    if not is_remote(source) and os.path.exists(local_path(source)):
        return [source]  # a real name may hold braces and brackets
    names = _braces(source)
    if is_remote(source) or not glob.has_magic(source.removeprefix("file://")):
        return names
    found = sorted(path for name in names for path in glob.glob(local_path(name)))
    if not found:
        raise DataError(f"nothing matches {source}", expected="at least one file", fix="check the pattern")
    return found


def _braces(source: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", source)
    if not match:
        return [source]
    if match[3] is not None:
        values = match[3].split(",")
    else:
        low, high = int(match[1]), int(match[2])
        if high - low >= MAX_PATTERN or high < low:
            raise DataError(
                f"{source} stands for {high - low + 1} names", expected=f"1 to {MAX_PATTERN}", fix="mend the pattern"
            )
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        values = [f"{value:0{width}d}" for value in range(low, high + 1)]
    return [name for value in values for name in _braces(source[: match.start()] + value + source[match.end() :])]


def open_container(container: str) -> IO[bytes]:
    """Opens a container of the listing for seeking reads.

    Raises:
        DataError: It is missing or a folder.
        StorageError: The store refuses or does not answer.
    """
    try:
        if not is_remote(container):
            return open(path_of(container), "rb", buffering=1 << 17)
        fs, path = storage.filesystem(container)
        return fs.open(path, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type="readahead")  # type: ignore[no-any-return]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise missing(shown_container(container), error) from None
    except Exception as error:
        raise store_error(error, shown_container(container)) from error


def stamp_of(container: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns (0 when the store has none) of a container.

    Raises:
        DataError: It is missing.
        StorageError: The store refuses or does not answer.
    """
    try:
        if not is_remote(container):
            stat = os.stat(path_of(container))
            return stat.st_size, stat.st_mtime_ns
        fs, path = storage.filesystem(container)
        info = fs.info(path)
        return int(info.get("size") or 0), mtime_of(info)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(shown_container(container), error) from None
    except Exception as error:
        raise store_error(error, shown_container(container)) from error


def mtime_of(info: dict[str, Any]) -> int:
    """Modification time in ns of an fsspec info, 0 when there is none."""
    value = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created")
    if isinstance(value, datetime):
        return int(value.timestamp() * 1e9)
    return int(value * 1e9) if isinstance(value, int | float) else 0


def missing(place: str, error: Exception) -> DataError:
    """The error of a source that is not there."""
    what = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
    return DataError(
        f"{place} {what}", expected="a folder, an archive, a Parquet file or a listing", fix="check the path"
    )


def store_error(error: Exception, place: str) -> EagleError:
    """Whatever a file system or a remote client raised, as an error of ours."""
    if isinstance(error, EagleError):
        return error
    if isinstance(error, OSError) and error.errno:
        return storage_error(error, f"reading {place}")
    first = str(error).strip().splitlines()
    return StorageError(
        f"reading {place} failed: {type(error).__name__}: {first[0] if first else ''}",
        expected="a store that answers, and credentials that may read",
        fix="check the URI, the network and the credentials, then run the same command again",
    )


def pieces(file: IO[bytes], size: int = 1 << 20) -> Iterator[bytes]:
    """A file in pieces until its end."""
    while piece := file.read(size):
        yield piece
