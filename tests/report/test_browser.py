"""The page in a browser: choices work without a script, nothing overflows a phone, it prints."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from scantly.report import compare
from scantly.training.run import Run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
pytestmark = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("SCANTLY_REQUIRE_BROWSER"), reason="no Chromium on this machine"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert BROWSER, "SCANTLY_REQUIRE_BROWSER is set, but there is no chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def page_file(make_run: Callable[..., Run], tmp_path: Path) -> Path:
    runs = [
        make_run(f"{method}-{labeled}-{seed}", method=method, labeled=labeled, seed=seed, shift=shift)
        for method, shift in (("supervised", 3), ("mean_teacher", 1))
        for labeled in (1, 2)
        for seed in (1, 2)
    ]
    return compare(runs, tmp_path / "report.html")


def opened(browser: Browser, file: Path, *, width: int = 1200, height: int = 900) -> Page:
    """The page in a context without network: a request that is no file fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda asked: problems.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
    )
    page.goto(file.as_uri())
    assert not problems
    return page


def shown(page: Page) -> list[str]:
    """What the leaderboards that can be seen are about."""
    regions = page.locator(".board .choice")
    return [str(r.get_attribute("aria-label")) for r in regions.all() if r.is_visible()]


def test_class_and_metric_are_switched(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    assert shown(page) == ["Leaderboard: Dice (0 to 1), mean over classes"]
    assert page.locator(".board .choice").count() > 4
    first = page.screenshot()
    page.get_by_text("LV", exact=True).first.click()
    assert shown(page) == ["Leaderboard: Dice (0 to 1), LV"]
    page.get_by_text("HD95 (voxels)", exact=True).first.click()
    assert shown(page) == ["Leaderboard: HD95 (voxels), LV"]
    assert page.screenshot() != first


def test_the_board_is_sorted_and_its_numbers_lead_to_the_runs(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    table = page.locator(".board .choice:visible table")
    heads = [cell.inner_text() for cell in table.locator("thead th").all()]
    assert heads == ["Method", "1 subject", "2 subjects"]
    rows = [row.locator("th").inner_text() for row in table.locator("tbody tr").all()]
    assert [row.split("\n")[0] for row in rows] == ["1Mean Teacher", "2Supervised"]
    link = table.locator("tbody a").first
    target = str(link.get_attribute("href")).removeprefix("#")
    link.click()
    entry = page.locator(f"[id='{target}']")
    assert "mean_teacher-1-1" in entry.locator("summary").inner_text()


def test_the_keyboard_reaches_the_choices(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    page.locator(".board input").first.focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) != ["Leaderboard: Dice (0 to 1), mean over classes"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, page_file: Path, scheme: str) -> None:
    page = opened(browser, page_file, width=390, height=844)
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L"), dtype=float)
    background = picture[:3].mean()
    assert (background > 200) == (scheme == "light")
    assert picture.std() > 10  # something is drawn


def test_diagrams_have_a_size_and_it_prints(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    boxes = [svg.bounding_box() for svg in page.locator(".wide svg").all()]
    assert len(boxes) == 3  # the learning curve, and the ranks with one and with two labeled
    assert all(box and box["width"] > 250 and box["height"] > 100 for box in boxes)
    assert page.pdf().startswith(b"%PDF")
