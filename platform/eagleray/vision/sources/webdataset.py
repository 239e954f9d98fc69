"""WebDataset shards: tars whose members of one key (name up to the first dot) are one sample.

An image of the key is an item; its neighbours say what is known about it: ``.cls`` the label, ``.json`` labels and
metadata, ``.txt`` a caption. Of a key that has an image, nothing else counts; a key without one counts as the files it
is.

Example: ``shards/train-{000000..000146}.tar``
Source: the WebDataset format, https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from eagleray.vision.sources import locations
from eagleray.vision.sources.annotation import Note, Tally, is_item, merge, parts_of
from eagleray.vision.sources.options import ListOptions, Source
from eagleray.vision.sources.rows import as_text
from eagleray.vision.sources.tar_archive import Members, is_random_access, members, scan_members

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "heic"}
)
SIDECARS = frozenset({"cls", "json", "txt"})
MAX_SIDECAR_BYTES = 1 << 20
MAX_GROUP = 256  # members of one key; more are taken as the next group
SNIFFED, SNIFFED_BYTES = 64, 256 << 20  # members and unpacked bytes that are looked at


def scan(source: str, options: ListOptions, tally: Tally) -> Iterator[pa.RecordBatch]:
    """Lists the images of WebDataset shards.

    Raises:
        DataError: A shard is no tar, is cut off, or is over a cap.
    """
    yield from scan_members(source, options, tally, _samples)


SOURCE = Source(scan, is_random_access)


def is_webdataset(container: str) -> bool:
    """Whether the first members of a tar hold a key with an image and a neighbour."""
    kinds: dict[str, set[bool]] = {}
    uncapped = ListOptions(max_ratio=math.inf, max_unpacked_gib=math.inf)  # the listing that follows has the caps
    for _, member in islice(members(container, uncapped), SNIFFED):
        if member.isreg() and is_item(parts_of(member.name)):
            key, extension = key_of(member.name)
            kinds.setdefault(key, set()).add(_is_image(extension))
        if member.offset_data + member.size > SNIFFED_BYTES:
            break
    return any(len(found) == 2 for found in kinds.values())


def key_of(name: str) -> tuple[str, str]:
    """Key and extension of a member: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_SUFFIXES


def _samples(found: Members) -> Members:
    """Groups consecutive members by key, keeps the images and gives them what their neighbours say."""
    group: list[tuple[Any, Any, bytes | None]] = []
    key = None
    for tar, member, _ in found:
        its_key, extension = key_of(member.name)
        if group and (its_key != key or len(group) >= MAX_GROUP):
            yield from _sample(group)
            group = []
        key = its_key
        is_read = extension in SIDECARS and member.size <= MAX_SIDECAR_BYTES
        data = tar.extractfile(member).read() if is_read else None  # now: a stream cannot come back to it
        group.append((tar, member, data))
    yield from _sample(group)


def _sample(group: list[tuple[Any, Any, bytes | None]]) -> Members:
    images = [(tar, member) for tar, member, _ in group if _is_image(key_of(member.name)[1])]
    if not images:
        yield from ((tar, member, Note()) for tar, member, _ in group)
        return
    note = Note()
    sidecars = {key_of(member.name)[1]: data for _, member, data in group if data is not None}
    for extension in ("txt", "json", "cls"):
        if extension in sidecars:
            note = _with_sidecar(note, extension, sidecars[extension])
    yield from ((tar, member, note) for tar, member in images)


def _with_sidecar(note: Note, extension: str, data: bytes) -> Note:
    text = as_text(data.strip()) or ""
    if extension == "json":
        try:
            row = json.loads(text)
        except ValueError:
            return note  # it is the neighbour that is broken, not the image
        return merge(note, row) if isinstance(row, dict) else note
    return merge(note, {"label": text} if extension == "cls" else {extension: text})


def container_is_webdataset(source: str) -> bool:
    """``is_webdataset`` of the first shard that a source stands for."""
    return is_webdataset(locations.container_of(locations.expand(source)[0]))
