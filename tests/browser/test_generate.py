"""The Generate tab in a browser: progress, cancel, several users."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Viewer, go, pick

pytestmark = pytest.mark.slow

UNDER_WAY = re.compile(r"step \d+ of 200")
PICTURE = "#generate-cards figure.card > img"
DRAWN = 600_000
"""Milliseconds that two small images may take on a machine with other work."""


@pytest.fixture
def enter(visit: Callable[..., Page], viewer: Viewer) -> Callable[[], Page]:
    """A new visitor at the tab, with few steps chosen."""

    def come() -> Page:
        page = go(visit(), viewer.url, "Generate")
        expect(page.locator("#generate-a input")).to_have_value("LoRA, seed 0")
        expect(page.locator("#generate-b input")).to_have_value("Bi-LoRA, seed 0")
        number(page, "steps", 3)
        return page

    return come


def number(page: Page, name: str, value: int) -> None:
    """Fill a field."""
    field = page.locator(f"#generate-{name} input")
    field.fill(str(value))
    field.blur()


def finish(page: Page) -> list[str]:
    """Wait until nothing is drawn any more; the addresses of both images."""
    status = page.locator("#generate-status")
    expect(status).to_contain_text(re.compile(r"Done\.|Cancelled\."), timeout=DRAWN)
    expect(status).to_contain_text("Done.")
    expect(page.locator(PICTURE)).to_have_count(2)
    return [image.get_attribute("src") or "" for image in page.locator(PICTURE).all()]


def test_two_images_from_the_same_noise(
    enter: Callable[[], Page], shot: Callable[[Page, str], Path]
) -> None:
    page = enter()
    page.locator("#generate-go").click()
    first = finish(page)
    names = ["ALoRA, seed 0", "BBi-LoRA, seed 0"]
    expect(page.locator("#generate-cards .name")).to_have_text(names)
    expect(page.locator("#generate-slider img")).to_have_count(2)
    shot(page, "generate-desktop")
    assert first[0] != first[1]
    pick(page, "generate-b", "LoRA, seed 0")
    page.locator("#generate-go").click()
    # The cards of the second work: both of LoRA, whether they are still empty or drawn already.
    names = ["ALoRA, seed 0", "BLoRA, seed 0"]
    expect(page.locator("#generate-cards .name")).to_have_text(names, timeout=DRAWN)
    again = finish(page)
    assert again == [first[0], first[0]]  # the same adapter, noise and settings


def test_who_waits_is_told_and_work_that_is_cancelled_or_left_makes_way(
    enter: Callable[[], Page],
) -> None:
    first, second = enter(), enter()
    number(first, "steps", 200)
    first.locator("#generate-go").click()
    expect(first.locator("#generate-status")).to_contain_text(UNDER_WAY)
    second.locator("#generate-go").click()
    expect(second.locator("#generate-status")).to_contain_text("Waiting: 1 before you.")
    second.locator("#generate-cancel").click()
    expect(second.locator("#generate-status")).to_contain_text("Cancelled.")
    expect(first.locator("#generate-status")).to_contain_text(UNDER_WAY)
    number(second, "seed", -1)
    second.locator("#generate-go").click()
    expect(second.get_by_test_id("toast-body")).to_contain_text("seed is -1")
    number(second, "seed", 1)
    second.locator("#generate-go").click()
    expect(second.locator("#generate-status")).to_contain_text("Waiting: 1 before you.")
    first.locator("#generate-cancel").click()
    expect(first.locator("#generate-status")).to_contain_text("Cancelled.")
    expect(first.locator("#generate-status progress")).to_have_count(0)
    finish(second)
    expect(first.locator(PICTURE)).to_have_count(0)
    first.locator("#generate-go").click()
    expect(first.locator("#generate-status")).to_contain_text(UNDER_WAY)
    first.close()
    number(second, "seed", 2)
    second.locator("#generate-go").click()
    expect(second.locator("#generate-status")).not_to_contain_text("Done.", timeout=DRAWN)
    finish(second)
