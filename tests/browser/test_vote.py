"""The blind vote in a real browser: nothing that tells the sides apart, and the CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from app.votes import COLUMNS, FILE
from tests.browser.conftest import Viewer, fits, go, pick
from tests.browser.roots import SEEDS, SUBJECTS, make_scores

pytestmark = pytest.mark.slow

LABELS = ("quagga-run", "zebra-run")
"""Words that stand nowhere else in the page."""
PAIRS = len(SUBJECTS) * len(SEEDS)
KEYS = {"1": "left", "2": "right", "0": "tie"}
VOTES = ("1", "left", "0", "right", "2", "tie")
"""Votes by keyboard and mouse."""
LISTEN = """
window.heard = [];
const ask = window.fetch;
window.fetch = async (...request) => {
    const answer = await ask(...request);
    const reader = answer.clone().body?.pipeThrough(new TextDecoderStream()).getReader();
    const listen = async () => {
        for (let part = await reader.read(); !part.done; part = await reader.read())
            window.heard.push(part.value);
    };
    if (reader) listen().catch(() => {});
    return answer;
};
"""
"""Keeps what the server answers, its streams of events too, which the browser itself forgets."""


def begin(page: Page) -> Locator:
    """Start voting; returns the panel, which then shows a ballot."""
    page.locator("#vote-start").click()
    booth = page.locator("#vote-booth")
    expect(booth.locator("[data-ballot]")).to_be_visible()
    return booth


def cast(page: Page, how: str) -> None:
    """Vote once, by a key or by a button's name, and wait for the next ballot."""
    shown = page.locator("#vote-booth [data-ballot]").get_attribute("data-ballot")
    if how in KEYS:
        page.keyboard.press(how)
    else:
        page.locator(f"#vote-{how}").click()
    expect(page.locator(f"[data-ballot='{shown}']")).to_have_count(0)


def wait_for_lists(page: Page) -> None:
    """Wait until all tabs have got the names for their lists, which come before any ballot."""
    count, before = 0, -1
    while not count or count != before:
        page.wait_for_timeout(4000)
        heard = "".join(page.evaluate("window.heard"))
        count, before = sum(heard.count(word) for word in LABELS), count


def test_votes_are_blind_kept_and_exported_and_a_session_goes_on(
    tmp_path: Path,
    start: Callable[[Path], Viewer],
    visit: Callable[..., Page],
) -> None:
    make_scores(tmp_path / "scores", LABELS)
    polls, page = start(tmp_path), visit(phone=True)
    page.add_init_script(LISTEN)
    (tmp_path / FILE).mkdir()
    go(page, polls.url, "Vote")
    pick(page, "vote-pair", " and ".join(LABELS))
    page.locator("#vote-start").click()
    expect(page.locator("#vote-notice")).to_contain_text("votes.db can't be written")
    (tmp_path / FILE).rmdir()
    wait_for_lists(page)
    page.evaluate("window.heard = []")
    addresses: list[str] = []
    page.on("response", lambda answer: addresses.append(answer.url.split("?")[0]))
    booth = begin(page)
    boxes: list[Any] = [page.locator(f"#vote-image-{s}").bounding_box() for s in ("left", "right")]
    assert boxes[0]["y"] == boxes[1]["y"], "side by side"
    assert all(box["width"] > 120 for box in boxes)
    assert fits(page)
    for number, how in enumerate(VOTES):
        expect(booth.locator("#vote-standing")).to_contain_text(f"{number} of {PAIRS}")
        cast(page, how)
    heard = "".join(page.evaluate("window.heard"))
    assert heard.count("data:image/png;base64,") >= 2 * len(VOTES), "the ballots were read"
    for word in LABELS:
        assert word not in heard
        assert not [address for address in addresses if word in address]

    begin(go(page, polls.url, "Vote"))  # the same browser goes on
    expect(booth.locator("#vote-standing")).to_contain_text(f"{len(VOTES)} of {PAIRS}")
    page.evaluate(
        "for (const side of ['left', 'right', 'left'])"
        " document.getElementById(`vote-${side}`).click();"
    )
    expect(booth.locator("#vote-standing")).to_contain_text(f"{len(VOTES) + 1} of {PAIRS}")
    page.locator("#vote-show").click()
    expect(page.locator("#vote-result")).to_contain_text(f"{LABELS[0]} over {LABELS[1]}")
    page.locator("#vote-tie").click()
    expect(booth.locator("#vote-standing")).to_contain_text(f"All {PAIRS} pairs voted on")
    expect(page.locator("#vote-result")).to_be_hidden()  # it would tell which side has just won
    expect(page.locator("#vote-left")).to_be_hidden()

    with page.expect_download() as found:
        page.locator("#vote-export").click()
    assert found.value.suggested_filename == "votes.csv"
    with Path(found.value.path()).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        rows = list(reader)
    assert [row["choice"] for row in rows[: len(VOTES)]] == [KEYS.get(how, how) for how in VOTES]
    assert len({(row["prompt"], row["seed"]) for row in rows}) == len(rows) == PAIRS
    assert len({row["session"] for row in rows}) == 1
    for row in rows:
        assert sorted((row["adapter left"], row["adapter right"])) == sorted(LABELS)
        assert row["winner"] == row.get(f"adapter {row['choice']}", "")
