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
STATUS, PICTURE = "#generate-status", "#generate-cards figure.card > img"
DRAWN = 600_000
"""Milliseconds that two small images may take on a machine with other work."""


def number(page: Page, name: str, value: int) -> None:
    """Fill a field."""
    field = page.locator(f"#generate-{name} input")
    field.fill(str(value))
    field.blur()


def finish(page: Page) -> list[str]:
    """Wait until nothing is drawn any more; the addresses of both images."""
    expect(page.locator(STATUS)).to_contain_text(re.compile(r"Done\.|Cancelled\."), timeout=DRAWN)
    expect(page.locator(STATUS)).to_contain_text("Done.")
    expect(page.locator(PICTURE)).to_have_count(2)
    return [image.get_attribute("src") or "" for image in page.locator(PICTURE).all()]


def test_images_from_the_same_noise_and_who_waits_cancels_or_leaves(
    visit: Callable[..., Page], viewer: Viewer, shot: Callable[[Page, str], Path]
) -> None:
    first, second = go(visit(), viewer.url, "Generate"), go(visit(), viewer.url, "Generate")
    for page in (first, second):
        expect(page.locator("#generate-b input")).to_have_value("Bi-LoRA, seed 0")
        number(page, "steps", 3)
    first.locator("#generate-go").click()
    drawn = finish(first)
    names = first.locator("#generate-cards .name")
    expect(names).to_have_text(["ALoRA, seed 0", "BBi-LoRA, seed 0"])
    expect(first.locator("#generate-slider img")).to_have_count(2)
    shot(first, "generate-desktop")
    assert drawn[0] != drawn[1]
    pick(first, "generate-b", "LoRA, seed 0")
    first.locator("#generate-go").click()
    # The cards of the second work: both of LoRA, whether they are still empty or drawn already.
    expect(names).to_have_text(["ALoRA, seed 0", "BLoRA, seed 0"], timeout=DRAWN)
    assert finish(first) == [drawn[0]] * 2  # the same adapter, noise and settings

    number(first, "steps", 200)
    first.locator("#generate-go").click()
    second.locator("#generate-go").click()
    expect(second.locator(STATUS)).to_contain_text("Waiting: 1 before you.")
    second.locator("#generate-cancel").click()
    expect(second.locator(STATUS)).to_contain_text("Cancelled.")
    number(second, "seed", -1)
    second.locator("#generate-go").click()
    expect(second.get_by_test_id("toast-body")).to_contain_text("seed is -1")
    number(second, "seed", 1)
    first.locator("#generate-go").click()  # anew: the one before may have ended
    second.locator("#generate-go").click()
    expect(second.locator(STATUS)).to_contain_text("Waiting: 1 before you.")
    expect(first.locator(STATUS)).to_contain_text(UNDER_WAY)
    first.locator("#generate-cancel").click()
    expect(first.locator(STATUS)).to_contain_text("Cancelled.")
    finish(second)
    first.locator("#generate-go").click()
    expect(first.locator(STATUS)).to_contain_text(UNDER_WAY)
    first.close()
    number(second, "seed", 2)
    second.locator("#generate-go").click()
    expect(second.locator(STATUS)).not_to_contain_text("Done.", timeout=DRAWN)
    finish(second)
