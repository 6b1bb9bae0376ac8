"""The viewer in a browser with damaged and hostile folders, and with a hostile website open."""

import http.server
import threading

import pytest
from playwright.sync_api import Response, expect

from app.catalog import Catalog
from tests.app.hostile import HOSTILE, LAST_LINE, make_good
from tests.browser.driver import go, pick

pytestmark = pytest.mark.slow
LOCALHOST = "127.0.0.1"


def test_names_are_text_on_every_tab_and_another_website_is_refused(tmp_path, start, visit):
    make_good(tmp_path)
    for number, damage in enumerate(HOSTILE.values()):
        damage(tmp_path / f"{number:03}")
    hostile, page = start(tmp_path), visit()
    requested_urls: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    go(page, hostile.url)
    expect(page.locator("#frame-notice")).to_contain_text("folders are not shown")
    expect(page.locator("#validation-images img").first).to_be_visible()
    pick(page, "compare-scores", "good/scores")
    expect(page.locator("#compare-cards img")).not_to_have_count(0)
    go(page, hostile.url, "Training")
    names = [run.name for run in Catalog(tmp_path).scan.runs]
    good_name = next(name for name in names if name.startswith("good/bilora"))
    evil_name = next(name for name in names if "<img" in name)
    expect(page.locator("#training-cards")).to_contain_text(good_name)  # chosen by default
    page.locator("#training-runs input").click()
    page.get_by_role("option", name=evil_name, exact=True).click()
    page.locator("#training-runs input").blur()
    expect(page.locator("#training-cards")).to_contain_text(evil_name)
    expect(page.locator("#training-loss svg.marks")).to_be_visible()
    curve = page.locator("#training-loss").bounding_box()  # the plot itself is redrawn
    for step in range(1, 20):  # the tooltip also shows names as text
        share = step / 20
        page.mouse.move(curve["x"] + share * curve["width"], curve["y"] + share * curve["height"])
    go(page, hostile.url, "Results")
    pick(page, "results-result", f"Landscape: {list(HOSTILE).index('report is a page'):03}")
    report = page.locator("#results-report")
    for text in ("log in", "overlay", "graph TD", r"\rule", "<script>"):  # all as text
        expect(report).to_contain_text(text)
    expect(report.locator("form, img, svg, .katex, .mermaid, [style*=fixed]")).to_have_count(0)
    pick(
        page,
        "results-result",
        f"Landscape: {list(HOSTILE).index('report is nested without end'):03}",
    )
    expect(report).to_contain_text(LAST_LINE)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    assert page.evaluate("window.evil") is None
    for url in requested_urls:
        assert url.startswith((hostile.url, "data:", "blob:"))

    page.goto("about:blank")  # ends the last requests of the viewer's page
    page.wait_for_timeout(1000)
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))
    # Another website that the visitor has opened
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer((LOCALHOST, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://{LOCALHOST}:{server.server_port}/docs/")
        ask = "([url, how]) => fetch(url, how).then(a => a.text(), e => `refused: ${e}`)"
        assert "refused" in page.evaluate(ask, [f"{hostile.url}/config", {}])
        post = {"method": "POST", "mode": "no-cors", "body": '{"data": [], "fn_index": 0}'}
        assert page.evaluate(ask, [f"{hostile.url}/gradio_api/queue/join", post]) == ""
        server.shutdown()
    statuses = {answer.status for answer in answers if answer.url.startswith(hostile.url)}
    assert statuses == {403}
    page.set_content(f'<iframe src="{hostile.url}/"></iframe>')
    page.wait_for_timeout(2000)
    for frame in page.frames:
        assert not frame.url.startswith(hostile.url)
