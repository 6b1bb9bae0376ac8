"""The blind vote in a real browser: ten votes, nothing that tells the sides apart, and the CSV."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from app.ballots import COLUMNS, FILE, Votes
from app.voting import tallies
from tests.browser.conftest import Viewer, fits, go, pick
from tests.browser.roots import SEEDS, SUBJECTS, make_scores

pytestmark = pytest.mark.slow

LABELS = ("quagga-run", "zebra-run")
"""Words that stand nowhere else in the page."""
PAIRS = len(SUBJECTS) * len(SEEDS)
KEYS = {"1": "left", "2": "right", "0": "tie"}
VOTES = ("1", "left", "0", "right", "2", "tie", "1", "left", "2", "0")
"""Ten votes by keyboard and mouse."""


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


@pytest.fixture(scope="module")
def polls(tmp_path_factory: pytest.TempPathFactory, start: Callable[[Path], Viewer]) -> Viewer:
    """A viewer of one score folder."""
    root = tmp_path_factory.mktemp("polls")
    make_scores(root / "scores", LABELS)
    return start(root)


@pytest.fixture(autouse=True)
def no_votes_yet(polls: Viewer) -> None:
    """Each test begins without votes."""
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
        (polls.root / name).unlink(missing_ok=True)


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
    expect(page.locator(f"#vote-booth [data-ballot]:not([data-ballot='{shown}'])")).to_be_visible()


def download(page: Page) -> list[dict[str, str]]:
    """The rows of the CSV file."""
    with page.expect_download() as found:
        page.locator("#vote-export").click()
    assert found.value.suggested_filename == "votes.csv"
    with Path(found.value.path()).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


def test_ten_votes(polls: Viewer, page: Page, shot: Callable[[Page, str], Path]) -> None:
    addresses: list[str] = []
    page.add_init_script(LISTEN)
    go(page, polls.url, "Vote")
    expect(page.locator("#vote-start")).to_be_visible()
    wait_for_lists(page)
    page.evaluate("window.heard = []")
    page.on("response", lambda answer: addresses.append(answer.url.split("?")[0]))
    booth = begin(page)
    shot(page, "vote-ballot")
    for number, how in enumerate(VOTES, start=1):
        html = page.locator("#vote-booth").evaluate("element => element.outerHTML")
        assert not [word for word in LABELS if word in html]
        if number <= PAIRS:
            expect(booth.locator("#vote-standing")).to_contain_text(f"{number - 1} of {PAIRS}")
        cast(page, how)
    expect(booth.locator("#vote-standing")).to_contain_text(f"All {PAIRS} pairs voted on")
    require_blind("".join(page.evaluate("window.heard")), addresses)

    rows = download(page)
    assert [row["choice"] for row in rows] == [KEYS.get(how, how) for how in VOTES]
    assert len({(row["prompt"], row["seed"]) for row in rows[:PAIRS]}) == PAIRS, "no pair twice"
    assert len({row["session"] for row in rows}) == 1
    for row in rows:
        assert sorted((row["adapter left"], row["adapter right"])) == sorted(LABELS)
        assert row["winner"] == row.get(f"adapter {row['choice']}", "")
        assert row["score folder"] == "scores"

    page.locator("#vote-show").click()
    result = page.locator("#vote-result")
    expect(result).to_contain_text(f"{LABELS[0]} over {LABELS[1]}")
    wins, losses = (sum(row["winner"] == label for row in rows) for label in LABELS)
    assert wins + losses == 7
    expect(result).to_contain_text(f"{wins}, 3, {losses}")
    expect(result).to_contain_text(f"{10 * (wins + 1.5):.0f} %")
    (tally,) = tallies(Votes(polls.root / FILE).read())
    interval = tally.interval
    assert interval is not None
    expect(result).to_contain_text(f"({100 * interval.low:.0f}–{100 * interval.high:.0f})")
    shot(page, "vote-result")
    cast(page, "tie")
    expect(result).to_be_hidden()  # it would tell which side has just won


def wait_for_lists(page: Page) -> None:
    """Wait until all tabs have got the names for their lists, which come before any ballot."""
    count, before = 0, -1
    while not count or count != before:
        page.wait_for_timeout(4000)
        heard = "".join(page.evaluate("window.heard"))
        count, before = sum(heard.count(word) for word in LABELS), count


def require_blind(heard: str, addresses: list[str]) -> None:
    """Nothing that the server sent names an adapter: neither events, nor images, nor addresses."""
    for word in LABELS:
        found = heard.find(word)
        assert found < 0, heard[max(0, found - 500) : found + 200]
        assert not [address for address in addresses if word in address]
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", heard)
    assert len(images) >= 2 * len(VOTES), "the events with the ballots were read"
    for encoded in images:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert not image.info, "no text in the file"
            assert max(image.size) > 64, "enlarged"


def test_two_voters_at_once_and_a_second_click(polls: Viewer, visit: Callable[..., Page]) -> None:
    one, two = go(visit(), polls.url, "Vote"), go(visit(), polls.url, "Vote")
    for page in (one, two):
        begin(page)
    for how in ("left", "tie"):
        cast(one, how)
        cast(two, "right")
    cast(two, "right")
    expect(one.locator("#vote-standing")).to_contain_text(f"2 of {PAIRS}")
    expect(two.locator("#vote-standing")).to_contain_text(f"3 of {PAIRS}")
    votes = Votes(polls.root / FILE).read()
    assert sorted(Counter(vote.session for vote in votes).values()) == [2, 3]
    two.evaluate(
        "for (const side of ['left', 'right', 'left'])"
        " document.getElementById(`vote-${side}`).click();"
    )
    expect(two.locator("#vote-standing")).to_contain_text(f"4 of {PAIRS}")
    two.locator("#vote-show").click()
    expect(two.locator("#vote-result")).to_contain_text("Votes of 2 voters")
    assert len(Votes(polls.root / FILE).read()) == 6, "a second click is no second vote"
    begin(go(one, polls.url, "Vote"))  # the same browser is the same voter
    expect(one.locator("#vote-standing")).to_contain_text(f"2 of {PAIRS}")


def test_on_a_phone_and_where_votes_cant_be_kept(
    polls: Viewer, visit: Callable[..., Page], shot: Callable[[Page, str], Path]
) -> None:
    (polls.root / FILE).mkdir()
    page = go(visit(phone=True), polls.url, "Vote")
    pick(page, "vote-pair", " and ".join(LABELS))
    page.locator("#vote-start").click()
    expect(page.locator("#vote-notice")).to_contain_text("votes.sqlite can't be written")
    assert str(polls.root) not in page.content()
    shot(page, "vote-refused-phone")
    (polls.root / FILE).rmdir()
    begin(page)
    boxes: list[Any] = [page.locator(f"#vote-image-{s}").bounding_box() for s in ("left", "right")]
    assert boxes[0]["y"] == boxes[1]["y"], "side by side"
    assert all(box["width"] > 120 for box in boxes)
    cast(page, "right")
    assert fits(page)
    shot(page, "vote-phone")
