"""The Generate tab in a browser: two images, progress, cancel, and who leaves."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Viewer, go

pytestmark = pytest.mark.slow

UNDER_WAY = re.compile(r"\d+/200 steps")
STATUS, PICTURE = "#generate-status", "#generate-cards figure.card > img"
DRAWN = 600_000
"""Milliseconds that two small images may take on a machine with other work."""


def begin(page: Page, steps: int) -> None:
    """Ask for images of so many steps."""
    field = page.locator("#generate-steps input")
    field.fill(str(steps))
    field.blur()
    page.locator("#generate-go").click()


def test_images_come_and_work_ends_when_it_is_cancelled_or_its_page_is_closed(
    visit: Callable[..., Page], viewer: Viewer
) -> None:
    first, second = go(visit(), viewer.url, "Generate"), go(visit(), viewer.url, "Generate")
    for page in (first, second):
        expect(page.locator("#generate-b input")).to_have_value("Bi-LoRA, seed 0")
    begin(first, 3)
    expect(first.locator(STATUS)).to_contain_text("Done.", timeout=DRAWN)
    names = first.locator("#generate-cards .name")
    expect(names).to_have_text(["ALoRA, seed 0", "BBi-LoRA, seed 0"])
    expect(first.locator("#generate-slider img")).to_have_count(2)
    drawn = [image.get_attribute("src") for image in first.locator(PICTURE).all()]
    assert len(set(drawn)) == 2

    begin(first, 200)
    expect(first.locator(STATUS)).to_contain_text(UNDER_WAY)
    first.locator("#generate-cancel").click()
    expect(first.locator(STATUS)).to_contain_text("Cancelled.")
    begin(first, 200)
    expect(first.locator(STATUS)).to_contain_text(UNDER_WAY)
    begin(second, 3)  # waits its turn, which comes when the first has gone
    first.close()
    expect(second.locator(STATUS)).to_contain_text("Done.", timeout=DRAWN)
    assert [image.get_attribute("src") for image in second.locator(PICTURE).all()] == drawn
