"""The bytes of some images of a run, by uri: for contact sheets, a few dozen out of millions.

Only the uri columns are read through; of the images, the row groups that hold one that is asked for.

Example:
    >>> read_images(Path("runs/a/input"), ["file:///photos/a.jpg"])
    {'file:///photos/a.jpg': b'...'}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.vision.images import Limits
from eagleray.vision.inputs import read_units
from eagleray.vision.sources import read_items


def read_images(home: Path, uris: Iterable[str], limits: Limits | None = None) -> dict[str, bytes]:
    """Reads images of a frozen input.

    Args:
        home: ``DIR/input`` of a run.
        uris: Which.
        limits: Caps on one image.

    Returns:
        Uri to bytes; a uri that is unknown or cannot be read any more is left out.
    """
    wanted = pa.array(sorted(set(uris)), pa.string())
    try:
        head = storage.read_json(home / "input.json")
    except (FileNotFoundError, ValueError):
        return {}
    if not len(wanted):
        return {}
    found = _of_corpus(head["source"], wanted) if head["kind"] == "corpus" else _of_listing(home, head, wanted, limits)
    return dict(found)


def _of_listing(
    home: Path, head: dict[str, object], wanted: pa.Array, limits: Limits | None
) -> Iterator[tuple[str, bytes]]:
    for path in sorted({unit["path"] for unit in read_units(home, head)}):
        if not Path(path).exists():
            continue
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                uris = file.read_row_group(group, columns=["uri"])["uri"]
                mask = pc.is_in(uris, value_set=wanted)
                if pc.any(mask).as_py():
                    rows = file.read_row_group(group).filter(mask)
                    names = rows["uri"].to_pylist()
                    for at, data in read_items(rows, limits):
                        if isinstance(data, bytes):
                            yield names[at], data


def _of_corpus(source: str, wanted: pa.Array) -> Iterator[tuple[str, bytes]]:
    corpus = Path(source)
    more = _further_uris(corpus / "duplicates.parquet", wanted)
    ids = pa.array(sorted(more), pa.string())
    for path in sorted((corpus / "shards").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                head = file.read_row_group(group, columns=["uri", "id"])
                mask = pc.or_(pc.is_in(head["uri"], value_set=wanted), pc.is_in(head["id"], value_set=ids))
                if pc.any(mask).as_py():
                    rows = file.read_row_group(group, columns=["uri", "id", "image"]).filter(mask)
                    for row in rows.to_pylist():
                        for uri in (row["uri"], *more.get(row["id"], ())):
                            yield uri, row["image"]


def _further_uris(path: Path, wanted: pa.Array) -> dict[str, list[str]]:
    """Image id to those wanted uris that a corpus remembers as duplicates."""
    more: dict[str, list[str]] = {}
    if path.exists():
        table = pq.read_table(path, columns=["id", "uri"])
        for row in table.filter(pc.is_in(table["uri"], value_set=wanted)).to_pylist():
            more.setdefault(row["id"], []).append(row["uri"])
    return more
