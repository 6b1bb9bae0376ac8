"""The viewer in a process of its own, and a real browser that looks at it.

Screenshots are kept in the folder that ``BROWSER_ARTEFACTS`` names, or in ``artefacts`` here.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import roots

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 280.0
"""Seconds that a viewer may take to start: it imports PyTorch and Gradio."""
LOADED = 60_000
"""Milliseconds that a page may take on a machine with other work."""


class Viewer(NamedTuple):
    """A running viewer."""

    url: str
    root: Path


def go(page: Page, address: str, tab: str | None = None) -> Page:
    """Go there, wait until the page has settled, and choose a tab."""
    page.goto(address)
    page.locator("#frame-title h1").wait_for()
    if tab is not None:
        found = page.get_by_role("tab", name=tab)
        if not found.is_visible():  # where they don't all fit, the others are in a menu
            page.locator(".overflow-menu > button").click()
            found = page.locator(".overflow-dropdown").get_by_text(tab)
        found.click()
    return page


def pick(page: Page, field: str, option: str) -> None:
    """Choose an option of a drop-down list."""
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)  # the list fades away


def fits(page: Page) -> bool:
    """Whether nothing is wider than the window."""
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return widths[0] <= widths[1]


@contextmanager
def serving(root: Path, log: Path) -> Iterator[Viewer]:
    """A viewer on a free port, ended afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "app.viewer", str(root), "--port", str(port)]
    viewer = Viewer(f"http://127.0.0.1:{port}", root)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(viewer.url, process, log)
            yield viewer
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the viewer ended or did not start: {log.read_text('utf-8')}")


@pytest.fixture(scope="session")
def full_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two steps (``lora``, ``bilora``) and their ``scores``."""
    root = tmp_path_factory.mktemp("viewer") / "studio"
    root.mkdir()
    roots.make_runs(root)
    roots.make_scores(root / "scores", roots.METHODS)
    return root


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Viewer]]:
    """``start(root)`` runs a viewer until the tests end."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def run(root: Path) -> Viewer:
            return stack.enter_context(serving(root, logs / f"{len(list(logs.iterdir()))}.log"))

        yield run


@pytest.fixture(scope="session")
def viewer(full_root: Path, start: Callable[[Path], Viewer]) -> Viewer:
    """A viewer of ``full_root``, shared by the tests of one process."""
    return start(full_root)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("the browser tests need Chromium: install it (apt-get install chromium)")
    expect.set_options(timeout=LOADED)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """``visit(phone=False, dark=False)`` is a page of a new visitor's own browser context."""
    with ExitStack() as stack:

        def enter(phone: bool = False, dark: bool = False) -> Page:
            context = browser.new_context(
                viewport={"width": 360, "height": 740} if phone else {"width": 1280, "height": 900},
                color_scheme="dark" if dark else "light",
            )
            stack.callback(context.close)
            context.set_default_timeout(LOADED)
            return context.new_page()

        yield enter


@pytest.fixture
def page(visit: Callable[..., Page]) -> Page:
    """A page of a desktop browser, at no address yet."""
    return visit()


@pytest.fixture(scope="session")
def shot() -> Callable[[Page, str], Path]:
    """``shot(page, "compare")`` keeps a screenshot of the whole page."""
    folder = Path(os.environ.get("BROWSER_ARTEFACTS") or Path(__file__).parent / "artefacts")

    def take(page: Page, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", full_page=True, animations="disabled")
        return folder / f"{name}.png"

    return take
