"""The drop page in a real browser, before a real service with keys: a person's way from the key to the answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.chromium import CHROMIUM, Page, browser
from tests.serving_server import make_key, running, service_config
from tests.tiny_model import make_bundle

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium")

PHONE_PX = 390
CARDS = "document.querySelectorAll('#answers > li')"
NOT_WAITING = "document.querySelectorAll('.waiting').length === 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[str, str]]:
    """The service's address and a key that opens it."""
    folder = tmp_path_factory.mktemp("page")
    other = make_bundle(folder / "other", seed=8)
    key = make_key(folder / "keys.json")
    with running(service_config(folder / "keys.json", tiny=tiny_model, other=other)) as address:
        yield address, key


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def photos(tmp_path: Path, make_photo: Callable[..., bytes]) -> list[Path]:
    """Two photos and one file that only pretends."""
    found = [tmp_path / name for name in ("<b>one.jpg", "two.png", "broken.jpg")]
    found[0].write_bytes(make_photo(1, width=320, height=240))
    found[1].write_bytes(make_photo(2, width=240, height=320, kind="PNG"))
    found[2].write_bytes(make_photo(3)[:300])
    return found


def enter(page: Page, place: tuple[str, str], **view: int | bool) -> None:
    address, key = place
    page.open(address + "/", **view)  # type: ignore[arg-type]
    page.wait("!document.getElementById('door').hidden")
    page.type_into("#key", key)
    page.wait("!document.getElementById('drop').hidden")


def test_a_key_then_pictures_then_answers_and_nothing_from_elsewhere(
    page: Page, place: tuple[str, str], photos: list[Path]
) -> None:
    enter(page, place)
    page.choose_files("#files", photos)
    page.wait(f"{CARDS}.length === 3 && {NOT_WAITING}")
    titles = page.value(f"[...{CARDS}].map((card) => card.querySelector('h2').textContent)")  # the newest first
    assert titles[0] == "This picture cannot be used"
    assert set(titles[1:]) <= {"circle", "cross", "square", "star", "wave"}
    assert page.value(f"[...{CARDS}].map((card) => card.querySelectorAll('tr').length)") == [0, 5, 5]
    widths = page.value("[...document.querySelectorAll('.card:last-child .track i')].map((bar) => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0
    assert page.value("document.querySelectorAll('.picture img').length") == 2  # what cannot be shown is taken away
    address, key = place
    assert {url for url in page.requested if not url.startswith(("blob:", "data:"))} <= {
        f"{address}/{path}"
        for path in (
            *("", "v1/models"),
            "v1/predict?top_k=5&model=tiny",
        )
    }
    assert key not in page.value("document.documentElement.outerHTML")
    assert key not in page.value(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert page.complaints == []


def test_a_wrong_key_is_told_and_another_may_be_tried(page: Page, place: tuple[str, str]) -> None:
    address, key = place
    page.open(address + "/")
    page.wait("!document.getElementById('door').hidden")
    page.type_into("#key", "er_000000000000_" + "0" * 64)
    page.wait("document.getElementById('door-why').textContent.includes('Try another')")
    assert page.value("document.getElementById('key').value") == ""
    page.type_into("#key", key)
    page.wait("!document.getElementById('drop').hidden && document.getElementById('door').hidden")


def test_the_chosen_model_answers(page: Page, place: tuple[str, str], photos: list[Path]) -> None:
    enter(page, place)
    assert page.value("[...document.getElementById('model').options].map((one) => one.value)") == ["tiny", "other"]
    page.value(
        "(() => { const model = document.getElementById('model'); model.value = 'other';"
        " model.dispatchEvent(new Event('change')); })()"
    )
    assert "model=other" in page.value("document.getElementById('command').textContent")
    page.choose_files("#files", photos[:1])
    page.wait(f"{CARDS}.length === 1 && {NOT_WAITING}")
    assert page.value("document.querySelector('.facts').textContent").startswith("other ")


def test_a_picture_is_dropped(page: Page, place: tuple[str, str]) -> None:
    enter(page, place)
    page.value(
        "(async () => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;"
        " canvas.getContext('2d').fillRect(8, 8, 30, 30);"
        " const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));"
        " const data = new DataTransfer(); data.items.add(new File([blob], 'drawn.png', { type: 'image/png' }));"
        " const drop = new DragEvent('drop', { dataTransfer: data, bubbles: true });"
        " document.getElementById('drop').dispatchEvent(drop); })()"
    )
    page.wait(f"{CARDS}.length === 1 && {NOT_WAITING}")
    assert page.value("document.querySelectorAll('.card tr').length") == 5


def test_a_service_that_is_gone_is_said(page: Page, tmp_path: Path, tiny_model: Path, photos: list[Path]) -> None:
    with running(service_config(None, tiny=tiny_model)) as address:
        page.open(address + "/")
        page.wait("!document.getElementById('drop').hidden")  # without keys there is no door
        assert page.value("document.getElementById('door').hidden")
        assert page.value("document.getElementById('choice').hidden")  # one model is no choice
    page.choose_files("#files", photos[:1])
    page.wait(f"{CARDS}.length === 1 && {NOT_WAITING}")
    assert page.value("document.querySelector('h2').textContent") == "The service does not answer"


@pytest.mark.parametrize(("is_dark", "width_px"), list(itertools.product([False, True], [1200, PHONE_PX])))
def test_it_fits_its_screen_and_follows_the_readers_scheme(
    page: Page, place: tuple[str, str], photos: list[Path], tmp_path: Path, is_dark: bool, width_px: int
) -> None:
    enter(page, place, width_px=width_px, is_dark=is_dark)
    page.choose_files("#files", photos)
    page.wait(f"{CARDS}.length === 3 && {NOT_WAITING}")
    assert page.value("document.documentElement.scrollWidth") <= width_px
    shown = page.value("document.getElementById('drop').innerText")
    assert ("Drop" in shown) == (width_px != PHONE_PX)  # a finger drops nothing
    smallest = "Math.min(...[...document.querySelectorAll('select, .drop')].map((one) => one.offsetHeight))"
    assert page.value(smallest) >= 44  # a finger's width: WCAG 2.2, 2.5.5
    with Image.open(page.screenshot(tmp_path / "shot.png"), formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    paper = pixels[:, :4].mean()
    assert paper < 40 if is_dark else paper > 240
