"""report.html in a headless Chromium, at the width of a desktop and of a phone, light and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import NASTY, large_report, small_report

from wanda_ext.report import page

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium and chromedriver on the PATH"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=service.Service(DRIVER))
    driver.get("about:blank")  # so that what a new tab asks for is over
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    page.write(small_report(), folder / "small.html")
    page.write(large_report(), folder / "large.html")
    return folder


def show(browser: Any, path: Path, width: int, scheme: str = "light") -> list[str]:
    """Loads a page; returns the addresses that were asked for meanwhile."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["small", "large"])
def test_no_request_no_message_no_sideways_scroll(
    browser: Any, folder: Path, name: str, width: int
) -> None:
    path = folder / f"{name}.html"
    asked = show(browser, path, width)
    assert path.as_uri() in asked
    assert [url for url in asked if url != path.as_uri() and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.cards div, figure, .box, pre, h1, p')]"
        ".map(e => { const r = e.getBoundingClientRect(); return [e.className, r.left, r.right] })"
    )
    assert [box for box in boxes if box[1] < 0 or box[2] > width + 0.5] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_plots_have_size_and_can_be_read(browser: Any, folder: Path, width: int) -> None:
    show(browser, folder / "large.html", width)
    plots = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(e => { const r = "
        "e.getBoundingClientRect(); return [r.width, r.height, e.querySelectorAll('rect, circle')"
        ".length, document.getElementById(e.getAttribute('aria-labelledby').split(' ')[0])"
        ".textContent] })"
    )
    assert len(plots) == 5
    assert all(w >= 320 and h >= 100 and marks for w, h, marks, _ in plots), plots
    assert all(title for *_, title in plots) and plots[0][2] >= 560
    small = browser.execute_script(
        "return [...document.querySelectorAll('td, th, p, dd, dt, code')]"
        ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length"
    )
    assert small == 0


def test_every_linear_is_in_the_table(browser: Any, folder: Path) -> None:
    show(browser, folder / "large.html", 1280)
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#linears tbody tr')]"
        ".map(e => e.cells[0].textContent)"
    )
    assert rows == [line.name for line in large_report().linears]
    shown = "return document.querySelector('#linears tbody tr').checkVisibility()"
    assert not browser.execute_script(shown)  # the table is long, and closed
    browser.execute_script(
        "document.querySelectorAll('details').forEach(e => e.querySelector('summary').click())"
    )
    assert browser.execute_script(shown)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [1280, 900, 880, 390])
def test_what_scrolls_sideways_says_so(browser: Any, folder: Path, width: int) -> None:
    """A line above the plot, and a bar below it that is there before anybody touches it."""
    show(browser, folder / "large.html", width)
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure')].map(e => { const s = e.querySelector("
        "'.scroll'); return [s.scrollWidth > s.clientWidth, "
        "e.querySelector('.sideways').getBoundingClientRect().height > 10, "
        "s.offsetHeight - s.clientHeight] })"
    )
    assert len(figures) == 5
    assert all(told == scrolls for scrolls, told, _ in figures), figures
    assert all(scrolls == (width < 800) for scrolls, *_ in figures if width not in (880, 900))
    assert all(bar >= 8 for scrolls, _, bar in figures if scrolls), figures


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_stand_side_by_side_where_there_is_room(
    browser: Any, folder: Path, width: int
) -> None:
    show(browser, folder / "small.html", width)
    places = browser.execute_script(
        "return [...document.querySelectorAll('.pair .box')].map(e => { const r = "
        "e.getBoundingClientRect(); return [r.left, r.top, r.width] })"
    )
    (left, top, wide), (other_left, other_top, _), *_ = places
    assert len(places) == 4 and wide > 250
    assert (other_top == top and other_left >= left + wide) == (width == 1280)
    assert (other_left == left and other_top > top) == (width == 390)


def test_text_is_text(browser: Any, folder: Path) -> None:
    show(browser, folder / "small.html", 1280)
    assert browser.execute_script("return document.querySelectorAll('script, main b').length") == 0
    cells = browser.execute_script(
        "return [...document.querySelectorAll('td')].map(e => e.textContent)"
    )
    assert NASTY in cells


def test_both_colour_schemes_have_contrast(browser: Any, folder: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        show(browser, folder / "small.html", 1280, scheme)
        colours = browser.execute_script(
            "const s = getComputedStyle(document.body); const m = getComputedStyle("
            "document.querySelector('.about')); return [s.backgroundColor, s.color, m.color]"
        )
        ground, ink, soft = (luminance(colour) for colour in colours)
        for text in (ink, soft):
            high, low = max(text, ground), min(text, ground)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, colours)  # WCAG 2, level AA
        seen.append(ground)
    assert seen[0] > seen[1]


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
