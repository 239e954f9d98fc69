"""A Report as one HTML file that opens anywhere, offline, for years: no script, no font, no picture from elsewhere.

Everything in a report may come from a stranger's archive: Jinja escapes all of it, a content policy in the page forbids
the browser to run or fetch anything, and hidden characters are shown (``pages.wording``).

Example:
    >>> write_page("runs/archive", score_report("runs/archive"), read_image=read)
    PosixPath('runs/archive/report.html')
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray import __version__
from eagleray.assure.report import (
    Bars,
    Block,
    Curves,
    Heatmap,
    Histogram,
    Intervals,
    Line,
    Report,
    Scatter,
    Table,
)
from eagleray.core.storage import write_atomic
from eagleray.pages import interval_plots, plots, sheets, wording

if TYPE_CHECKING:
    from jinja2 import Environment

FILE_NAME = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
BAR_PX, PLOT_PX, HEAD_PX = 25, 300, 110  # heights in style.html.j2; a heading with its note and the gap below
LONGEST_TITLE = 4096  # of a uri's full text on hover; a name of a million characters would only make the page heavy

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(report: Report) -> str:
    """The page.

    Args:
        report: Any report; see ``sheets.with_pictures`` for its tiles.

    Returns:
        HTML, one document, self-contained.
    """
    template = _environment().get_template("page.html.j2")
    return template.render(report=report, groups=list(_groups(report.blocks)), policy=POLICY, version=__version__)


def write_page(folder: str | Path, report: Report, *, read_image: sheets.ReadImage | None = None) -> Path:
    """Writes ``report.html`` into a folder, whole or not at all.

    Args:
        folder: Where.
        report: What.
        read_image: Gives the bytes behind a tile's uri, or None; without it tiles stay as they are.

    Raises:
        StorageError: The folder cannot be written.
    """
    if read_image is not None:
        report = sheets.with_pictures(report, read_image)
    path = Path(folder) / FILE_NAME
    write_atomic(path, render(report).encode("utf-8"))
    return path


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    draw: dict[type, Callable[[Any], str]] = {
        Bars: plots.bars,
        Histogram: plots.histogram,
        Line: plots.line,
        Curves: plots.curves,
        Heatmap: plots.heatmap,
        Intervals: interval_plots.intervals,
        Scatter: interval_plots.scatter,
    }
    environment.filters.update(
        visible=wording.visible,
        lines=lambda text: wording.visible(text, keep="\n"),
        shorten=lambda text, limit: wording.shorten(wording.visible(text), limit),
        ends=wording.ends,
        hover=lambda text: wording.shorten(wording.visible(text), LONGEST_TITLE),
        number=wording.number,
        moment=wording.moment,
        kind=lambda block: type(block).__name__.lower(),
        plot=lambda block: Markup(draw[type(block)](block)),  # noqa: S704  plots escapes every text it is given
        stacks=_stacks,
        is_facts=lambda table: not any(table.columns),
        is_figure=lambda cell: isinstance(cell, int | float),
    )
    return environment


def _stacks(charts: Sequence[Block]) -> list[list[Block]]:
    """The two columns of charts: names on the left, curves on the right until it is the longer column; of one sort
    only, they alternate.
    """
    named = [chart for chart in charts if isinstance(chart, Bars)]
    drawn = [chart for chart in charts if not isinstance(chart, Bars)]
    if not (named and drawn):
        return [list(column) for column in (charts[::2], charts[1::2]) if column]
    columns: tuple[list[Block], list[Block]] = (list(named), [])
    heights = [sum(HEAD_PX + BAR_PX * len(block.bars) for block in named), 0]
    for chart in drawn:
        side = int(heights[1] <= heights[0])
        columns[side].append(chart)
        heights[side] += HEAD_PX + PLOT_PX
    return list(columns)


def _groups(blocks: Sequence[Block]) -> Iterator[tuple[str, list[Any]]]:
    """Blocks that are shown together: charts beside each other, folded tables one under the other."""

    def name(block: Block) -> str:
        if isinstance(block, Bars | Histogram | Line | Curves):
            return "charts"
        return "folded" if isinstance(block, Table) and block.is_folded else "plain"

    for kind, members in groupby(blocks, key=name):
        yield kind, list(members)
