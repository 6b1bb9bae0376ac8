"""The viewer's frame in a browser and by plain requests: what it serves, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import Page, Response, expect

from tests.browser.conftest import ROOT, Viewer, fits, go

SECRET = "nobody may read this"
CONTENTS = (SECRET, "root:x:", "schema_version", "[project]")
"""Words of the files that are asked for below."""


@pytest.fixture(scope="module")
def odd(
    tmp_path_factory: pytest.TempPathFactory, full_root: Path, start: Callable[[Path], Viewer]
) -> Viewer:
    """A viewer of a good run, a broken one and links out of the root, with a secret beside it."""
    place = tmp_path_factory.mktemp("odd")
    (place / "secret.txt").write_text(SECRET, encoding="utf-8")
    root = place / "root"
    root.mkdir()
    for name in ("lora", "scores"):
        shutil.copytree(full_root / name, root / name, copy_function=os.link)
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{", encoding="utf-8")
    (root / "link.txt").symlink_to(place / "secret.txt")
    (root / "link").symlink_to(place, target_is_directory=True)
    # An image that leads out of the root: the secret must not get into the page by it.
    stolen = next((root / "scores" / "images" / "lora" / "seed-0").glob("*.png"))
    stolen.unlink()
    stolen.symlink_to(place / "secret.txt")
    return start(root)


def get(viewer: Viewer, path: str, method: str = "GET", body: str | None = None) -> tuple[int, str]:
    """Status and text of a request whose path is sent as it is."""
    address = urlsplit(viewer.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


@pytest.mark.slow
def test_it_serves_no_files_reaches_nowhere_takes_nothing_and_listens_here_alone(
    odd: Viewer,
) -> None:
    root, passwd = odd.root, Path("/etc/passwd")
    asked = [
        passwd,
        root.parent / "secret.txt",
        f"{root}/../secret.txt",
        f"{root}/link.txt",
        f"{root}/link/secret.txt",
        root / "lora" / "run.json",  # not even the root's own files by their path
        "pyproject.toml",
        ROOT / "pyproject.toml",
        "../../../../../../../etc/passwd",
        "file:///etc/passwd",
    ]
    routes = {
        "/gradio_api/file=": asked,
        "/file=": asked[:4],
        "/static/": asked[-2:],
        "/assets/": asked[-2:],
    }
    for route, paths in routes.items():
        for path in paths:
            for text in dict.fromkeys((str(path), quote(str(path), safe=""))):
                status, body = get(odd, route + text)
                assert 400 <= status < 500, (status, route, text)
                assert not any(word in body for word in CONTENTS)
    for path in (
        "/gradio_api/file=http://example.com/",
        "/gradio_api/file=https://example.com/",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/monitoring/summary",
        "/monitoring",
    ):
        assert get(odd, path)[0] == 403, path
    assert get(odd, "/gradio_api/upload", "POST", "")[0] == 403
    listening = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    own = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{urlsplit(odd.url).port:04X}" in own
    assert f"00000000:{urlsplit(odd.url).port:04X}" not in own, "on this machine alone"


@pytest.mark.slow
def test_a_broken_run_and_links_are_named_and_no_place_is_told(
    odd: Viewer, page: Page, shot: Callable[..., Path]
) -> None:
    go(page, f"{odd.url}/?scores=scores&a=lora&b=bilora&seed=0&order=list")
    notice = page.locator("#frame-notice")
    expect(notice).to_contain_text("2 folders are not shown")
    expect(notice).to_contain_text("broken run.json is damaged")
    expect(notice).to_contain_text("link it is a link out of the root")
    expect(page.locator("#frame-title")).to_contain_text("1 run, 1 score folder")
    cards = page.locator("#compare-cards figure.card")
    expect(cards).to_have_count(3)
    shot(page, "broken-run")
    page.locator("#compare-list button.prompt").first.click()
    expect(cards.first.locator(".absent")).to_have_text("no image")  # it leads out of the root
    expect(page.locator("#compare-slider img")).to_have_count(0)
    config = get(odd, "/config")[1]
    assert json.loads(config)["analytics_enabled"] is False
    for text in (get(odd, "/")[1], config, page.content()):
        assert str(odd.root) not in text
        assert str(Path.home()) not in text


@pytest.mark.slow
def test_an_empty_root_says_what_to_run_and_shows_what_comes(
    tmp_path: Path, start: Callable[[Path], Viewer], visit: Callable[..., Page], shot: Callable
) -> None:
    page = go(visit(phone=True), start(tmp_path).url)
    for tab, command in (
        ("Compare", f"python -m examples.demo --output_dir {tmp_path}"),
        ("Generate", f"python -m examples.demo --output_dir {tmp_path}"),
        ("Vote", f"python -m eval.clip_scores {tmp_path}/lora {tmp_path}/bilora"),
        ("Training", "accelerate launch train_dreambooth_bilora.py"),
        ("Results", f"python -m eval.landscape {tmp_path}/lora {tmp_path}/bilora"),
    ):
        page.get_by_role("tab", name=tab).click()
        notice = page.locator(f"#tab-{tab.lower()} section.empty")
        expect(notice).to_contain_text(command)
        assert fits(page)
        expect(page.get_by_test_id("toast-body")).to_have_count(0)
    shot(page, "empty-root")
    assert not (tmp_path / "votes.sqlite").exists()
    page.evaluate("window.notReloaded = true")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "run.json").write_text("{", encoding="utf-8")
    expect(page.locator("#frame-notice")).to_contain_text("1 folder is not shown")
    assert page.evaluate("window.notReloaded")


@pytest.mark.slow
def test_the_tab_is_in_the_address(viewer: Viewer, page: Page) -> None:
    go(page, f"{viewer.url}/?tab=training")
    chosen = page.locator("#frame-tabs [role=tab][aria-selected=true]")
    expect(chosen).to_have_text("Training")
    page.get_by_role("tab", name="Vote").click()
    expect(page).to_have_url(re.compile("tab=vote"))
    page.go_back()
    expect(chosen).to_have_text("Training")
    expect(page).to_have_url(re.compile("tab=training"))
    page.go_forward()
    expect(chosen).to_have_text("Vote")


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
    "Training": "#training-plots figure.plot",
    "Results": "#tab-results section.empty",
}
"""What is there when a tab has been filled."""
OTHER_LOOKS = ((True, False), (False, True), (True, True))


@pytest.mark.parametrize(
    ("phone", "dark"),
    [(False, False), *(pytest.param(*p, marks=pytest.mark.slow) for p in OTHER_LOOKS)],
)
def test_every_tab_is_readable_fits_and_asks_nothing_of_others(
    viewer: Viewer,
    visit: Callable[..., Page],
    shot: Callable[..., Path],
    phone: bool,
    dark: bool,
) -> None:
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
    closed = [answer.url for answer in answers if not answer.ok]
    assert closed == [], "no route that the page needs is closed"
    assert [text for text in refused if "Content Security Policy" in text] == []
