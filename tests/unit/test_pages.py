"""Laws of the page: one file that fetches nothing and runs nothing, whatever the names in it say."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eagleray.assure.report import (
    Bar,
    Bars,
    Block,
    Code,
    Curve,
    Curves,
    Heatmap,
    Histogram,
    Line,
    Report,
    Sheet,
    Table,
    Text,
    Tile,
    Total,
    Totals,
    Verdict,
)
from eagleray.core.errors import StorageError
from eagleray.pages import page, plots, wording
from eagleray.pages.page import render, write_page

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "cat\u202egpj.exe",
    "two\nlines\r\x00\x1b[31m",
    "javascript:alert(1)",
    "&lt;script&gt;&amp;",
    "lone \ud800 surrogate",
    "x" * 255,
    "/a/very/long/" + "path/" * 2000 + "end.jpg",
    "صورة.jpg",
    "猫 🐈‍⬛.png",
    "\u2066isolate\u2069\u200b\ufeff",
]


class Tags(HTMLParser):
    """Collects every element with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        """Elements and the names of their attributes; a name is in one or two ``bdi``, as its length has it."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements if tag != "bdi"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def all_kinds(text: str) -> tuple[Block, ...]:
    """Every kind of block with ``text`` in every place for text."""
    return (
        Totals((Total(text, 3, text, "good"), Total(text, text)), ("=",), text, text),
        Table(text, (text, text), ((text, text), (text, 5)), text, (0,)),
        Table(text, ("", ""), ((text, text),), text, (1,)),
        Table(text, (text,), ((text,),), text, is_folded=True),
        Bars(text, (Bar(text, 3.0, text), Bar(text, 0.0, text)), text, 3.0, text),
        Histogram(text, (0.0, 0.5, 1.0), (3, 9), text, text, text),
        Line(text, ((0.0, 1.0), (2.0, 3.5)), text, text, "s", 2.0, text, text),
        Curves(text, (Curve(text, ((0.0, 1.0), (2.0, -3.5))), Curve(text, ())), text, text, has_marks=True, note=text),
        Heatmap(text, (text, text), (text, "x"), ((3, 0), (1, 2)), text, text, text),
        Sheet(text, (Tile(text, (text, text), text, PIXEL, text), Tile(text, (text,), text, "", text)), text),
        Code(text, text, text),
        Text((text,), text),
    )


def hostile_page(text: str) -> str:
    return render(Report(text, text, all_kinds(text), text, Verdict(text, is_good=True)))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_becomes_an_element_an_attribute_or_a_hidden_character(text: str) -> None:
    plain, hostile = Tags(hostile_page("plain")), Tags(hostile_page(text))
    assert hostile.shape == plain.shape
    shown = "".join(hostile.text + [value for _, attributes in hostile.elements for value in attributes.values()])
    hidden = {char for char in shown if unicodedata.category(char) in wording.HIDDEN_CATEGORIES}
    assert hidden <= {"\n", *wording.JOINERS}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_page_is_utf8_and_asks_no_network(text: str) -> None:
    html = hostile_page(text)
    html.encode("utf-8")
    for tag, attributes in Tags(html).elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "audio", "video", "a"}
        assert not [name for name in attributes if name.startswith("on") or name in {"srcset", "action", "background"}]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_content_policy_comes_before_anything_it_must_govern() -> None:
    html = hostile_page("plain")
    names = [tag for tag, _ in Tags(html).elements]
    policy = next(a for tag, a in Tags(html).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert names.index("meta") < names.index("style")
    assert html.index("Content-Security-Policy") < html.index("<style")


def test_a_long_uri_is_shortened_in_the_middle_and_whole_on_hover() -> None:
    uri = "zip://" + "folder/" * 30 + "image.jpg::file:///data/archive.zip"
    html = render(Report("t", "c", (Sheet("s", (Tile(uri, ("cat",), "n" * 100 + "0123.jpg", PIXEL),)),)))
    figure = next(attributes for tag, attributes in Tags(html).elements if tag == "figure")
    assert figure["title"] == uri
    assert f'<bdi class="head">{"n" * 30}' in html
    assert f">{'n' * 100}" not in html
    assert "n0123.jpg</bdi>" in html


def test_the_verdict_is_marked_by_words_too_not_by_colour_alone() -> None:
    for is_good, mark in ((True, "Passed"), (False, "Failed")):
        html = render(Report("t", "c", (), verdict=Verdict("2 = 1 + 1", is_good=is_good)))
        assert f'aria-label="{mark}"' in html
        assert "2 = 1 + 1" in html
    assert "aria-label" not in render(Report("t", "c", (), verdict=Verdict("so")))


def test_every_picture_has_a_text_and_every_table_a_caption_and_headers() -> None:
    elements = Tags(hostile_page("some text")).elements
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden")
        for tag, attributes in elements
        if tag == "svg" and "viewBox" in attributes and "preserveAspectRatio" not in attributes
    )
    tables = sum(tag == "table" for tag, _ in elements)
    captions = sum(tag == "caption" for tag, _ in elements)
    assert captions == tables - 1  # the histogram's folded numbers stand under their own summary
    assert sum(tag == "th" for tag, _ in elements) >= tables


def test_numbers_carry_thousands_separators() -> None:
    totals = Totals((Total("images", 1_234_567), Total("rate", 98765.4)))
    html = render(Report("t", "c", (totals, Table("x", ("n",), ((4321,),)))))
    for text in ("1,234,567", "98,765.4", "4,321"):
        assert text in html


def test_the_page_is_written_whole_over_an_older_one(tmp_path: Path) -> None:
    first = write_page(tmp_path, Report("first", "c", ()))
    second = write_page(tmp_path, Report("second", "c", ()))
    assert first == second == tmp_path / "report.html"
    assert "second" in second.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_page(tmp_path / "none", Report("t", "c", ()))


def test_importing_the_page_loads_no_engine_of_templates_numbers_or_pictures() -> None:
    heavy = ("jinja2", "numpy", "pyarrow", "PIL", "torch", "ray", "matplotlib", "simplejpeg", "fsspec", "pydantic")
    code = f"import sys, eagleray.pages.page; print([name for name in {heavy!r} if name in sys.modules])"
    env = {"PYTHONPATH": str(Path(page.__file__).parents[2])}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert answer.stdout.strip() == "[]"


def contrast(first: str, second: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes() -> dict[str, dict[str, str]]:
    style = (page.TEMPLATES / "style.html.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", text)) for text in blocks)
    return {"light": light, "dark": {**light, **dark}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back"),
    [(front, "paper") for front in ("ink", "soft", "good", "warn", "bad")]
    + [("ink", "raised"), ("soft", "raised"), ("good", "good-soft"), ("bad", "bad-soft")],
)
def test_text_can_be_read_in_both_schemes(scheme: str, front: str, back: str) -> None:
    colours = schemes()[scheme]
    assert contrast(colours[front], colours[back]) >= 4.5  # WCAG 2.2 AA for text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bars_can_be_told_from_the_paper(scheme: str) -> None:
    colours = schemes()[scheme]
    assert contrast(colours["mark"], colours["paper"]) >= 3  # WCAG 2.2 AA for graphics


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_can_be_told_from_the_paper_and_counts_read_on_the_fullest_cell(scheme: str) -> None:
    colours = schemes()[scheme]
    for name in ("s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[name], colours["paper"]) >= 3
    for name in ("mark", "s1"):
        pairs = [(int(colours[name][i : i + 2], 16), int(colours["paper"][i : i + 2], 16)) for i in (1, 3, 5)]
        mixed = [round(plots.DEEPEST * front + (1 - plots.DEEPEST) * back) for front, back in pairs]
        assert contrast(colours["ink"], "#" + "".join(f"{value:02x}" for value in mixed)) >= 4.5


def test_curves_and_heatmaps_at_their_limits_are_drawn() -> None:
    assert "Nothing to draw" in plots.curves(Curves("none", ()))
    for points in (((0.0, 0.0),), ((1.0, -2.0), (2.0, -2.0)), ((0.0, 1e9), (1e9, -1e9))):
        drawn = plots.curves(Curves("c", (Curve("a", points),), has_marks=True))
        assert "nan" not in drawn.lower()
        assert drawn.count("<circle") == len(points)
    assert "legend" not in plots.curves(Curves("one", (Curve("a", ((0.0, 1.0),)),)))
    empty = plots.heatmap(Heatmap("none", (), (), ()))
    assert "<table" in empty
    square = plots.heatmap(Heatmap("m", ("a", "b"), ("a", "b"), ((99, 1), (0, 5))))
    assert square.count('class="beside"') == 1  # what is wrong has another colour; zeros stay empty
    assert square.count("<b>") == 3


def test_the_floor_of_curves_is_zero_unless_they_go_below() -> None:
    drawn = plots.curves(Curves("c", (Curve("loss", ((0.0, 5.0), (9.0, 2.0))),)))
    assert 'text-anchor="end">0</text>' in drawn
    below = plots.curves(Curves("c", (Curve("loss", ((0.0, -1.5), (9.0, 0.5))),)))
    assert re.findall(r'text-anchor="end">([-\d.]+)</text>', below)[:5] == ["-1.5", "-1.0", "-0.5", "0.0", "0.5"]


@pytest.mark.parametrize("top", [1e-9, 0.003, 0.7, 1, 3, 4.999, 5, 7, 49, 50, 51, 99, 1234, 1e6, 123_456_789, 3.3e12])
def test_ticks_are_few_round_and_reach_the_top(top: float) -> None:
    ticks = plots.nice_ticks(top)
    assert ticks[0] == 0
    assert top <= ticks[-1] * (1 + 1e-9)
    assert 2 <= len(ticks) <= plots.NUM_TICKS + 1
    texts = [wording.axis_number(tick, ticks[1]) for tick in ticks]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("top", [0, 1, 2, 3, 7, 12, 1001])
def test_ticks_of_counts_are_whole(top: int) -> None:
    assert all(tick == int(tick) for tick in plots.nice_ticks(top, is_count=True))


@pytest.mark.parametrize("last_s", [0.05, 0.9, 3, 42, 179, 181, 3600, 10_000, 86_400, 5e6])
def test_time_ticks_are_few_and_inside(last_s: float) -> None:
    ticks = plots.time_ticks(last_s)
    assert 2 <= len(ticks) <= 7
    assert all(0 <= tick <= last_s * 1.01 for tick, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0, 1000, "0"), (5000, 5000, "5k"), (500, 100, "500"), (1_500_000, 500_000, "1.5 M"), (0.25, 0.05, "0.25")],
)
def test_axis_numbers_are_short(value: float, step: float, text: str) -> None:
    assert wording.axis_number(value, step) == text


def test_bars_and_lines_at_their_limits_are_drawn() -> None:
    assert plots.bars(Bars("none", ()))
    assert "0.40" in plots.bars(Bars("tiny", (Bar("a", 1e9), Bar("b", 1))))  # one image among a billion can be seen
    assert plots.histogram(Histogram("empty", (0.0, 1.0), (0,)))
    assert "Too few" in plots.line(Line("one", ((0.0, 1.0),)))
    assert "NaN" not in plots.line(Line("flat", ((0.0, 0.0), (0.0, 0.0))))


def test_shortening_keeps_both_ends_and_the_limit() -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(300))
    for limit in (3, 10, 64, 299):
        short = wording.shorten(text, limit)
        assert len(short) == limit
        assert (short[0], short[-1]) == (text[0], text[-1])
    assert wording.shorten("short", 64) == "short"


@pytest.mark.parametrize(
    ("iso", "text"),
    [
        ("2026-01-31T12:05:00Z", "31 January 2026, 12:05 UTC"),
        ("2026-01-31T12:05:00+02:00", "31 January 2026, 10:05 UTC"),
        ("2026-01-31", "31 January 2026, 00:00 UTC"),
        ("yesterday", "yesterday"),
    ],
)
def test_a_moment_is_said_in_utc(iso: str, text: str) -> None:
    assert wording.moment(iso) == text


def test_an_unknown_template_name_fails_loudly() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        page._environment().from_string("{{ nothing_of_that_name }}").render()
