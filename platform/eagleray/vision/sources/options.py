"""How a source is listed: what gives labels, and the caps that keep a hostile archive from filling memory or time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eagleray.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from eagleray.vision.sources.annotation import Tally

REMOTE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory", "hf", "file")


@dataclass(frozen=True)
class ListOptions:
    """How a source is listed.

    Attributes:
        labels: ``"folder"``: class folders are labels; ``"none"``: only metadata gives labels.
        kind: A key of SOURCES, or ``"auto"`` to look at the source.
        image_column: Column of a Parquet source or listing that holds images or paths; empty: found by type and name.
        max_members: Items of one archive at most.
        max_unpacked_gib: Unpacked size of one archive at most.
        max_ratio: Unpacked to packed size of a zip or compressed tar at most, once it has unpacked 1 GiB (deflate
            reaches 1,032 on zeros; photos have about 1, uncompressed masks up to about 100).
        threads: That list folders at the same time.
        schemes: URI schemes that a listing's rows may name. No http: a listing from elsewhere must not make us call
            hosts.
    """

    labels: str = "folder"
    kind: str = "auto"
    image_column: str = ""
    max_members: int = 50_000_000
    max_unpacked_gib: float = 16_384.0
    max_ratio: float = 500.0
    threads: int = 8
    schemes: tuple[str, ...] = REMOTE_SCHEMES


@dataclass(frozen=True)
class Source:
    """An entry of SOURCES.

    Attributes:
        scan: ``(source, options, tally)`` to record batches of LISTING_SCHEMA, streamed.
        is_random_access: Whether the items of this source can be read in any order and in place.
    """

    scan: Callable[[str, ListOptions, Tally], Iterator[pa.RecordBatch]]
    is_random_access: Callable[[str], bool]


RATIO_FROM_BYTES = 1 << 30  # a small archive of blank images may well have a high ratio


def check_caps(place: str, options: ListOptions, *, count: int, unpacked: int, packed: int) -> None:
    """Holds an archive to its caps while it is listed.

    Args:
        place: Its uri.
        options: The caps.
        count: Members so far.
        unpacked: Their unpacked bytes.
        packed: Bytes of the archive.

    Raises:
        DataError: It is over one of them.
    """
    if count > options.max_members:
        raise too_many(place, "members", options.max_members, "max_members")
    if unpacked > options.max_unpacked_gib * 2**30:
        raise too_many(place, "GiB unpacked", options.max_unpacked_gib, "max_unpacked_gib")
    if unpacked > max(RATIO_FROM_BYTES, options.max_ratio * packed):
        raise too_many(place, "times its packed size unpacked", options.max_ratio, "max_ratio")


def too_many(place: str, what: str, limit: float, option: str) -> DataError:
    """The error of an archive over a cap."""
    return DataError(
        f"{place} has more than {limit:,.0f} {what}",
        expected=f"at most {limit:,.0f} {what} in one archive",
        fix=f"raise {option} if the archive is trusted, or split it",
    )
