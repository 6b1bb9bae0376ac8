"""The Generate tab in a browser: progress, cancel, several users."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Viewer, Visit

pytestmark = pytest.mark.slow

UNDER_WAY = re.compile(r"step \d+ of 200")
PICTURE = "#generate-cards figure.card > img"
DRAWN = 600_000
"""Milliseconds that two small images may take on a machine with other work."""


@pytest.fixture
def enter(visit: Callable[..., Visit], viewer: Viewer) -> Callable[[], Page]:
    """A new visitor at the tab, with few steps chosen."""

    def go() -> Page:
        page = visit().open(viewer.url, "Generate")
        expect(page.locator("#generate-a input")).to_have_value("LoRA, seed 0")
        expect(page.locator("#generate-b input")).to_have_value("Bi-LoRA, seed 0")
        number(page, "steps", 3)
        return page

    return go


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


def begin(page: Page) -> None:
    """Press the button, and wait until the status is no longer that of the work before."""
    page.locator("#generate-go").click()
    expect(page.locator("#generate-status")).not_to_contain_text("Done.", timeout=DRAWN)


def test_two_images_from_the_same_noise(
    enter: Callable[[], Page], shot: Callable[[Page, str], Path]
) -> None:
    page = enter()
    begin(page)
    first = finish(page)
    names = ["ALoRA, seed 0", "BBi-LoRA, seed 0"]
    expect(page.locator("#generate-cards .name")).to_have_text(names)
    expect(page.locator("#generate-slider img")).to_have_count(2)
    shot(page, "generate-desktop")
    assert first[0] != first[1]
    page.locator("#generate-b input").click()
    page.get_by_role("option", name="LoRA, seed 0", exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)
    page.locator("#generate-go").click()
    # The cards of the second work: both of LoRA, whether they are still empty or drawn already.
    names = ["ALoRA, seed 0", "BLoRA, seed 0"]
    expect(page.locator("#generate-cards .name")).to_have_text(names, timeout=DRAWN)
    again = finish(page)
    assert again == [first[0], first[0]]  # the same adapter, noise and settings


def test_a_visitor_who_leaves_does_not_hold_up_the_next(enter: Callable[[], Page]) -> None:
    page = enter()
    number(page, "steps", 200)
    page.locator("#generate-go").click()
    expect(page.locator("#generate-status")).to_contain_text(UNDER_WAY)
    page.close()
    other = enter()
    other.locator("#generate-go").click()
    assert len(finish(other)) == 2


def test_who_waits_is_told_and_a_cancelled_work_makes_way(enter: Callable[[], Page]) -> None:
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
    expect(second.locator("#generate-status")).to_contain_text("Done.", timeout=DRAWN)
    expect(second.locator(PICTURE)).to_have_count(2)
    expect(first.locator(PICTURE)).to_have_count(0)
