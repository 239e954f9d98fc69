"""The page in a real browser: it shows its pictures, breaks no rule of its own policy and fits a phone."""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from eagleray.assure.report import (
    Bar,
    Bars,
    Code,
    Curve,
    Curves,
    Heatmap,
    Histogram,
    Interval,
    Intervals,
    Line,
    Mark,
    Report,
    Scatter,
    Sheet,
    Table,
    Text,
    Tile,
    Total,
    Totals,
    Verdict,
)
from eagleray.pages.page import write_page
from PIL import Image

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
)
PHONE_PX = 390
WARM_SHARE = 0.005  # of reddish pixels: 0.011 with the nine photographs, 0.000 without (measured); charts are blue
LONG = "an_unbroken_name_of_a_class_or_a_file_that_goes_on_and_on" * 4

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium")


def chromium(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def make_page(folder: Path, make_photo: Callable[..., bytes]) -> Path:
    tiles = tuple(Tile(f"file:///{index}.jpg", ("label", LONG), LONG, tag="0.9") for index in range(9))
    blocks = (
        Totals(
            (Total("images in", 1_234_567_890), Total("scored", 1_234_567_889), Total("quarantined", 1)), ("=", "+")
        ),
        Bars("Classes", tuple(Bar(LONG, float(index)) for index in range(30)), "images", 100.0),
        Histogram("Scores", tuple(index / 20 for index in range(21)), tuple(range(20)), "score", "images"),
        Line("Rate", tuple((float(x), x * 1e6) for x in range(60)), "time", "images/s", "s", 3e7, "mean"),
        Sheet("Pictures", (*tiles, Tile("file:///9", ("<script>alert(1)</script>",), tag="format_refused"))),
        Table("Facts", ("", ""), (("digest", "9f" * 32), ("path", "/" + "folder" * 40)), code_columns=(1,)),
        Table("Wide", tuple("abcdefgh"), (tuple(range(10**6, 10**6 + 8)),) * 3),
        Table("Folded", ("x",), ((LONG,),), is_folded=True),
        Code("Command", "eagleray score " + LONG),
        Text((LONG,)),
        Curves(
            "Several",
            tuple(Curve(LONG, ((0.0, 0.1 * index), (1.0, 1 - 0.1 * index))) for index in range(6)),
            is_unit=True,
            has_diagonal=True,
        ),
        Heatmap("Confusion", (LONG,) * 40, (LONG,) * 40, (tuple(range(40)),) * 40, "truth", "answer"),
        Intervals(
            "Slices", tuple(Interval(LONG, 0.1 * at, 0.05 * at, 0.12 * at, "n") for at in range(9)), "x", 0.4, LONG
        ),
        Scatter("Trade", tuple(Mark(LONG, float(at), 0.1 * at, 0.0, 1.0) for at in range(5)), "ms", "top-1", 0.3, LONG),
    )
    report = Report(LONG, "2026-01-31T12:00:00Z", blocks, LONG, Verdict("3 images in = 2 scored + 1", is_good=True))
    photos = {f"file:///{index}.jpg": make_photo(index, width=300, height=300) for index in range(9)}
    return write_page(folder, report, read_image=photos.get)


def test_the_page_shows_its_pictures_in_the_dark_and_its_policy_refuses_nothing(
    tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    shot = tmp_path / "shot.png"
    page = make_page(tmp_path, make_photo)
    done = chromium(
        tmp_path, page, "--blink-settings=preferredColorScheme=0", f"--screenshot={shot}", "--window-size=1200,3000"
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    with Image.open(shot, formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB").resize((300, 750)), np.int16)
    warm = (pixels[:, :, 0] - pixels[:, :, 2] > 40).mean()
    assert pixels[:, :4].mean() < 40  # the paper follows the reader's scheme
    assert warm > WARM_SHARE


def test_the_page_fits_a_phone(tmp_path: Path, make_photo: Callable[..., bytes]) -> None:
    text = make_page(tmp_path, make_photo).read_text("utf-8")
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)  # so that the frame's parent may measure it
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{PHONE_PX}px;height:2000px;border:0"></iframe><script>'
        "addEventListener('load', () => { const d = frames[0].document; document.body.dataset.width ="
        " d.documentElement.scrollWidth; });</script>",
        "utf-8",
    )
    dom = chromium(tmp_path, frame, "--dump-dom").stdout
    assert f'data-width="{PHONE_PX}"' in dom, re.findall(r"data-width=\"\d+\"", dom)
