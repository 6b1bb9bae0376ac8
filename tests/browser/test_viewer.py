"""The viewer's page in a browser: every tab in light and dark, on a desktop and on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Response, expect

from tests.browser.conftest import Viewer, fits, go

CONTRAST = """() => {
  const parts = (color) => color.match(/[0-9.]+/g).map(Number);
  const channel = (value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) =>
    0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, at) => a * x + (1 - a) * below[at]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own.length < 4 || own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || element.closest("script, style, :disabled")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const back = behind(element), ink = over(parts(getComputedStyle(element).color), back);
    const [dark, bright] = [light(ink), light(back)].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)} (${element.className})`);
  }
  return low;
}"""
"""Visible text whose contrast with what lies behind it is below WCAG's 4.5."""
FILLED = {
    "Compare": "#compare-cards figure.card img",
    "Generate": "#generate-a input",
    "Vote": "#vote-start",
    "Training": "#training-loss svg.marks",
    "Results": "#results-result input",
}
"""What is there when a tab has been filled."""


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("phone", [False, True])
def test_every_tab_is_in_the_address_readable_fits_and_asks_nothing_of_others(
    viewer: Viewer,
    visit: Callable[..., Page],
    shot: Callable[..., Path],
    phone: bool,
) -> None:
    dark = phone
    page, refused, asked = visit(phone=phone, dark=dark), [], []
    answers: list[Response] = []
    page.on("console", lambda message: refused.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda answer: answers.append(answer))
    go(page, viewer.url)
    for tab, there in FILLED.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(there).first).to_be_visible()
        assert fits(page), tab
        assert page.evaluate(CONTRAST) == [], tab
        expect(page.get_by_test_id("toast-body")).to_have_count(0)
        shot(page, f"{tab.lower()}{'-phone' * phone}{'-dark' * dark}")
    ink = page.locator("#frame-title h1").evaluate("element => getComputedStyle(element).color")
    assert (sum(int(part) for part in ink[4:-1].split(",")) > 3 * 128) == dark, ink
    own = ("data:", "blob:", viewer.url)
    assert [address for address in asked if not address.startswith(own)] == []
    assert len(asked) > 10
    expect(page).to_have_url(re.compile("tab=results"))
    page.go_back()
    expect(page.locator("#frame-tabs [role=tab][aria-selected=true]")).to_have_text("Training")
    closed = [answer.url for answer in answers if not answer.ok]
    assert closed == [], "no route that the page needs is closed"
    assert [text for text in refused if "Content Security Policy" in text] == []
