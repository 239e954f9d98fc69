"""Text and numbers as a page shows them. Names come from strangers' archives, so nothing in them may act or mislead.

Control characters, line breaks and marks that turn the direction of reading are shown as escapes (a file named
``cat<U+202E>gpj.exe`` does not pass for a picture). Escaping for HTML is the template's, not done here.

Example:
    >>> visible("a\\nb")
    'a\\\\nb'
"""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime

HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
JOINERS = "\u200c\u200d"  # part of the spelling of Persian and Hindi words, and of emoji
MINUTE_S, HOUR_S = 60, 3600


def visible(text: str, *, keep: str = "") -> str:
    """The text with each character that cannot be seen, or that moves others, written as an escape.

    Args:
        text: Any text, lone surrogates too.
        keep: Characters to leave as they are, e.g. a line break in code.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _is_hidden(c) and c not in keep else c for c in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in HIDDEN_CATEGORIES and char not in JOINERS


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def shorten(text: str, limit: int = 64) -> str:
    """Cuts the middle out of a long text: its two ends tell more than its beginning.

    Args:
        text: Visible text.
        limit: Longest result, in characters; >= 3.
    """
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def ends(text: str, tail: int = 9) -> tuple[str, str]:
    """A visible name as its beginning, which a page may cut, and its end (the number, the suffix), which it may not.

    Args:
        text: Any text.
        tail: Characters of the end.
    """
    text = shorten(visible(text), 80)
    return (text, "") if len(text) <= 2 * tail else (text[:-tail], text[-tail:])


def number(value: str | int | float | None, decimals: int | None = None) -> str:
    """A number with thousands separators; text as it stands; nothing as a dash.

    Args:
        value: What.
        decimals: Digits after the point of what is no int; None: as many as it needs.
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def axis_number(value: float, step: float) -> str:
    """A tick's text: as many decimals as the step needs; large ones in thousands or millions."""
    for size, suffix in ((1e9, " bn"), (1e6, " M"), (1e3, "k")):
        if step >= size / 10 and step >= 1000:
            return f"{value / size:.10g}{suffix}" if value else "0"
    if step < 1e-4:
        return f"{value:.3g}"
    decimals = 0
    while decimals < 6 and abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1
    return f"{value:,.{decimals}f}"


def moment(iso: str) -> str:
    """An ISO 8601 time as a person reads it, in UTC; what is no time stays as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return visible(iso)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    when = when.astimezone(UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"
