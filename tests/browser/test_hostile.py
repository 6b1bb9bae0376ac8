"""The viewer in a browser beside damaged and hostile folders, and beside hostile pages."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Response, expect

from app.catalog import Catalog
from tests.app.hostile import HOSTILE, make_good
from tests.browser.conftest import Viewer, go, pick

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, start: Callable[[Path], Viewer]) -> Viewer:
    """A viewer of good folders behind all damaged and hostile ones."""
    root = tmp_path_factory.mktemp("hostile")
    make_good(root)
    for number, damage in enumerate(HOSTILE.values()):
        damage(root / f"{number:02}")
    return start(root)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The address of another web site, whose pages are empty."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_good_folders_stay_on_every_tab_beside_all_others(
    hostile: Viewer, page: Page, shot: Callable[[Page, str], Path]
) -> None:
    names = {run.path: run.name for run in Catalog(hostile.root).now.runs}
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    go(page, hostile.url)
    expect(page.locator("#frame-notice")).to_contain_text("folders are not shown")
    expect(page.locator("#validation-images img").first).to_be_visible()
    expect(page.locator("#compare-cards figure.card").first).to_be_visible()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    pick(page, "compare-scores", "good/scores")
    expect(page.locator("#compare-means")).to_contain_text("good/scores")
    expect(page.locator("#compare-cards img")).not_to_have_count(0)
    shot(page, "hostile-compare")

    go(page, hostile.url, "Generate")
    pick(page, "generate-b", names["good/bilora"])
    expect(page.locator("#generate-b input")).to_have_value(names["good/bilora"])

    go(page, hostile.url, "Vote")
    pick(page, "vote-scores", "good/scores")
    page.locator("#vote-start").click()
    expect(page.locator("#vote-booth [data-ballot]")).to_be_visible()

    go(page, hostile.url, "Training")
    expect(page.locator("#training-plots figure.plot").first).to_be_visible()
    page.locator("#training-runs input").click()
    page.get_by_role("option", name=names["good/bilora"], exact=True).click()
    page.keyboard.press("Escape")
    expect(page.locator("#training-cards")).to_contain_text("good/bilora")
    expect(page.locator("#training-loss .names")).to_contain_text(names["good/bilora"])
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    shot(page, "hostile-training")

    go(page, hostile.url, "Results")
    pick(page, "results-result", "Loss landscape: good/landscape")
    expect(page.locator("#results-figures img")).to_have_count(1)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    place = list(HOSTILE).index("report is a page")
    pick(page, "results-result", f"Loss landscape: {place:02}")
    with page.expect_console_message(lambda message: "form-action" in message.text):
        page.get_by_role("button", name="log in").evaluate("button => button.click()")
    shot(page, "hostile-results")
    assert page.evaluate("window.evil") is None
    assert [url for url in asked if not url.startswith((hostile.url, "data:", "blob:"))] == []


def test_another_web_site_can_neither_read_nor_send_nor_frame(
    hostile: Viewer, page: Page, elsewhere: str
) -> None:
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))
    page.goto(elsewhere)
    ask = "([url, how]) => fetch(url, how).then(a => a.text(), e => `refused: ${e}`)"
    assert "refused" in page.evaluate(ask, [f"{hostile.url}/config", {}])
    sent = {"method": "POST", "mode": "no-cors", "body": '{"data": [], "fn_index": 0}'}
    assert page.evaluate(ask, [f"{hostile.url}/gradio_api/queue/join", sent]) == ""
    assert {a.status for a in answers if a.url.startswith(hostile.url)} == {403}
    page.set_content(f'<iframe src="{hostile.url}/"></iframe>')
    page.wait_for_timeout(2000)
    assert [frame for frame in page.frames if frame.url.startswith(hostile.url)] == []
