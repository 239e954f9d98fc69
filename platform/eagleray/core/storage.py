"""Bytes that are either wholly there or not there: write aside, fsync, then rename or link; and their digests.

Two ways to publish, and nothing else writes a file that a reader may open:

- ``write_atomic`` replaces: the newest writer wins (a manifest with one writer, a page).
- ``publish_new`` never replaces: the first writer wins (a commit that several attempts may race for).

Both write under an attempt-unique name in the same folder first. Remote URIs are read through fsspec; outputs are
written to local or shared (POSIX) folders.

Example:
    >>> write_atomic("runs/a/run.json", b"{}")
    >>> publish_new("runs/a/_ledger/0001.json", b"{}")
    True
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagleray.core.errors import ConfigError, StorageError, storage_error

ASIDE = ".aside-"  # every unfinished file of ours carries this prefix; gc and listings skip it
CHUNK_BYTES = 1 << 20


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes a whole file, replacing an older one, or leaves the older one as it was.

    Raises:
        StorageError: The storage refused (no space, no permission); nothing is published.
    """
    path = Path(path)
    with _aside(path, data) as aside:
        os.replace(aside, path)
    fsync_dir(path.parent)


def write_private(path: str | Path, data: bytes, *, is_like_before: bool = False) -> None:
    """``write_atomic`` for what only its owner may read (mode 0600), from the first byte on, whatever the umask.

    Args:
        path: Where.
        data: What.
        is_like_before: Whether a file that is replaced gives the new one its owner, group and mode.

    Raises:
        StorageError: The storage refused, or the owner or group cannot be kept; nothing is published.
    """
    path = Path(path)
    with _aside(path, data, mode=0o600) as aside:
        if is_like_before and path.exists():
            before, made = path.stat(), aside.stat()
            if (before.st_uid, before.st_gid) != (made.st_uid, made.st_gid):
                os.chown(aside, before.st_uid, before.st_gid)
            os.chmod(aside, stat.S_IMODE(before.st_mode))
        os.replace(aside, path)
    fsync_dir(path.parent)


def publish_new(path: str | Path, data: bytes) -> bool:
    """Writes a whole file unless one of that name exists.

    Returns:
        True when this call published it; False when another writer had been first, whose bytes stay untouched.

    Raises:
        StorageError: The storage refused, or has no hard links.
    """
    path = Path(path)
    with _aside(path, data) as aside:
        if not _link_new(aside, path):
            return False
    fsync_dir(path.parent)
    return True


def _link_new(aside: Path, path: Path) -> bool:
    try:
        os.link(aside, path)  # atomic, and refuses to replace: the commit point of every ledger
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV):
            raise StorageError(
                f"{path.parent} is on a file system without hard links",
                expected="a POSIX file system (ext4, xfs, NFS, Lustre, ...)",
                fix="give an --out folder on another file system",
            ) from error
        raise
    return True


def write_new(path: str | Path, data: bytes) -> None:
    """Writes a file under a name that is the writer's own; durable on return, removed when it fails.

    Raises:
        StorageError: The storage refused, or the name exists.
    """
    path = Path(path)
    try:
        with open(path, "xb") as file:
            file.write(data)
            flush(file.fileno(), file)
    except OSError as error:
        if not isinstance(error, FileExistsError):
            path.unlink(missing_ok=True)
        raise storage_error(error, f"writing {path}") from error


def publish_file(aside: str | Path, path: str | Path) -> None:
    """Gives a file that was written aside its name, once its bytes are durable.

    Raises:
        StorageError: The storage refused.
    """
    try:
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_dir(Path(path).parent)
    except OSError as error:
        raise storage_error(error, f"publishing {path}") from error


def write_table(table: Any, path: str | Path, **options: Any) -> None:
    """Writes a pyarrow Table as Parquet (zstd), atomically.

    Args:
        table: The table.
        path: Where.
        options: Of ``pyarrow.parquet.write_table``.

    Raises:
        StorageError: The storage refused; nothing is published.
    """
    import io

    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd", **options})
    write_atomic(path, buffer.getvalue())


@contextmanager
def _aside(path: Path, data: bytes, mode: int = 0o666) -> Iterator[Path]:
    """A fully written and fsynced neighbour of ``path``, removed afterwards if it is still there."""
    aside = aside_path(path)
    try:
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            flush(file.fileno(), file)
        yield aside
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
    finally:
        aside.unlink(missing_ok=True)


def aside_path(path: Path) -> Path:
    """An attempt-unique name beside ``path`` that no reader takes for a result."""
    return path.with_name(f"{ASIDE}{os.getpid()}-{uuid.uuid4().hex[:12]}-{path.name[:80]}")


def flush(fd: int, file: Any = None) -> None:
    """Flushes a file object's buffer and the kernel's, so that what follows cannot be seen before the bytes."""
    if file is not None:
        file.flush()
    os.fsync(fd)


def fsync_dir(path: str | Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise storage_error(error, f"syncing {path}") from error
    finally:
        os.close(fd)


def make_folder(path: str | Path) -> Path:
    """Makes a folder and its parents, and proves that it can be written to.

    Raises:
        StorageError: It cannot be made or written.
        ConfigError: A file stands in the way, or the path is a remote URI.
    """
    if "://" in str(path) and not str(path).startswith("file://"):
        raise ConfigError(f"the output {path} is a remote URI", expected="a local or shared folder", fix="mount it")
    path = Path(str(path).removeprefix("file://"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = aside_path(path / "probe")
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{path} is a file", expected="a folder", fix="give another --out") from None
    except OSError as error:
        raise storage_error(error, f"opening {path} for writing") from error
    return path


@contextmanager
def only_writer(path: str | Path, *, what: str) -> Iterator[None]:
    """Holds a folder for one writing command; the hold ends with the process, however it ends.

    Args:
        path: The lock file.
        what: What is held, for the message.

    Raises:
        ConfigError: Another command holds it.
    """
    import fcntl

    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another command is writing {what}", expected="one writer at a time", fix="wait for it or stop it"
            ) from None
        yield


def sha256_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 in hex of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as indented UTF-8 JSON with a last newline; NaN is refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError, ValueError: As they say; the caller knows what the file means and answers.
    """
    return json.loads(Path(path).read_bytes())


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path inside it.

    Raises:
        ConfigError: The protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{uri}: {error}", expected="a path or an fsspec URI", fix='pip install "eagleray[s3]"'
        ) from None
    return fs, str(path)
