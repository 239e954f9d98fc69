"""What kind of source a path or URI is: by its first bytes, by its suffix only where bytes do not tell."""

from __future__ import annotations

import os
import stat
from pathlib import PurePath

from eagleray.core import storage
from eagleray.core.errors import DataError
from eagleray.vision.sources import locations
from eagleray.vision.sources.compression import compression_of_bytes

LISTING_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
CORPUS_FILES = ("manifest.json", "listing.parquet", "quarantine.parquet", "shards")
HEAD_BYTES = 512
KINDS = "a folder, zip, tar (plain, .gz, .bz2, .xz, .zst), WebDataset shards, Parquet, or a CSV or JSONL listing"


def kind_of(source: str) -> str:
    """The kind of a source.

    Raises:
        DataError: It is missing or none of the kinds.
        StorageError: The store does not answer.
    """
    if _is_folder(source):
        _refuse_corpus(source)
        return "folder"
    places = locations.expand(source)
    container = locations.container_of(places[0])
    if not locations.is_remote(source) and not stat.S_ISREG(_mode(container)):
        raise DataError(f"{source} is neither a file nor a folder", expected=KINDS, fix="check the path")
    with locations.open_container(container) as file:
        head = file.read(HEAD_BYTES)
    kind = _kind_of_file(container, head)
    if kind == "tar":
        from eagleray.vision.sources.webdataset import is_webdataset

        return "webdataset" if len(places) > 1 or is_webdataset(container) else "tar"
    if not kind:
        raise DataError(
            f"{source} is {'empty' if not head else 'no archive, table or folder of images'}",
            expected=KINDS,
            fix="check the path; for a few single images use `eagleray predict`",
        )
    return kind


def _is_folder(source: str) -> bool:
    if not locations.is_remote(source):
        return os.path.isdir(locations.local_path(source))
    try:
        fs, path = storage.filesystem(source)
        return bool(fs.isdir(path))
    except Exception as error:
        raise locations.store_error(error, source) from error


def _refuse_corpus(source: str) -> None:
    """Its shards would be taken for files that are no images."""
    home = locations.local_path(source)
    if not locations.is_remote(source) and all(os.path.exists(os.path.join(home, name)) for name in CORPUS_FILES):
        raise DataError(
            f"{source} is a corpus already",
            expected="sources that are no corpus",
            fix=f"score it as it is; to ingest its images again give '{source}/shards/*.parquet'",
        )


def _mode(container: str) -> int:
    try:
        return os.stat(locations.path_of(container)).st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise locations.missing(locations.shown_container(container), error) from None
        raise locations.store_error(error, locations.shown_container(container)) from error


def _kind_of_file(container: str, head: bytes) -> str:
    suffix = PurePath(container.lower()).suffix
    if head.startswith(b"PAR1"):
        from eagleray.vision.sources.parquet import has_images

        return "parquet" if has_images(container) else "listing"
    if head.startswith(ZIP_MAGICS) or suffix == ".zip":
        return "zip"
    if compression_of_bytes(head) or head[257:262] == b"ustar" or suffix == ".tar":
        return "tar"
    return "listing" if suffix in LISTING_SUFFIXES and head else ""
