"""Counts, shares, times and names as a report says them: the same words in every report.

Example:
    >>> share(2012, 2013)
    '> 99.9 %'
"""

from __future__ import annotations

from typing import Any

from eagleray.core import progress


def count(number: int, one: str, many: str = "") -> str:
    """A count with its noun: ``1 image``, ``2,013 images``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def figure(number: float) -> str:
    """Three digits of a measured number, or all of its whole ones: ``9.87``, ``98.7``, ``1,234``."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def share(part: float, whole: float) -> str:
    """A percentage that says 0 or 100 only when it is."""
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    if part == whole:
        return "100 %"
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %" if percent <= 99.9 else "> 99.9 %"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``850 ms``, ``42.3 s``, ``2 min 5 s``, ``3 h 7 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 59.95 else progress.duration(seconds)


def clock(iso: Any) -> str:
    """An ISO 8601 time without its signs: ``2026-01-31 12:00:00 UTC``."""
    text = plain(iso)
    return text[:19].replace("T", " ") + " UTC" if text.endswith(("Z", "+00:00")) else text


def plain(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return "" if value is None else str(value)


def last_name(path: str) -> str:
    """The last part of a path or URI."""
    return path.rstrip("/").rpartition("/")[2] or path


def file_name(uri: str) -> str:
    """The short name of an image: ``zip://folder/a.jpg::file:///x.zip`` is ``a.jpg``; a Parquet row names its file."""
    inner, _, container = uri.partition("::")
    if inner.startswith("parquet://"):
        return f"row {inner.removeprefix('parquet://')} of {last_name(container)}"
    return last_name(inner)
