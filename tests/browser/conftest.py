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
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Viewer:
    """A running viewer: its address, its root, and what it has printed."""

    url: str
    root: Path
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Visit:
    """A page of a running viewer, and every address that it asked for."""

    page: Page
    requests: list[str] = field(default_factory=list)

    def open(self, address: str, tab: str | None = None) -> Page:
        """Go there, wait until the page has settled, and choose a tab."""
        self.page.goto(address)
        self.page.locator("#frame-title h1").wait_for()
        if tab is not None:
            self.page.get_by_role("tab", name=tab).click()
        return self.page


@contextmanager
def serving(root: Path, log: Path, *arguments: str) -> Iterator[Viewer]:
    """A viewer on a free port, ended afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "app.viewer", str(root), "--port", str(port), *arguments]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(url, process, log)
            yield Viewer(url, root, process, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"the viewer ended: {log.read_text(encoding='utf-8')}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the viewer did not start in {PATIENCE} s: {log.read_text('utf-8')}")


@pytest.fixture(scope="session")
def full_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two steps (``lora``, ``bilora``) and their ``scores``."""
    root = tmp_path_factory.mktemp("viewer") / "studio"
    root.mkdir()
    roots.make_runs(root)
    roots.make_scores(root)
    return root


def link_tree(source: Path, target: Path) -> None:
    """The files of a folder in another one, without checkpoints."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and "checkpoints" not in path.parts:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Viewer]]:
    """``start(root, *arguments)`` runs a viewer until the tests end."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:
        count = 0

        def run(root: Path, *arguments: str) -> Viewer:
            nonlocal count
            count += 1
            return stack.enter_context(serving(root, logs / f"{count}.log", *arguments))

        yield run


@pytest.fixture(scope="session")
def viewer(full_root: Path, start: Callable[..., Viewer]) -> Viewer:
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
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """``visit(phone=False, dark=False)`` is a new visitor with a browser context of their own."""
    with ExitStack() as stack:

        def enter(phone: bool = False, dark: bool = False) -> Visit:
            context = browser.new_context(
                viewport={"width": 360, "height": 740} if phone else {"width": 1280, "height": 900},
                color_scheme="dark" if dark else "light",
            )
            stack.callback(context.close)
            context.set_default_timeout(LOADED)
            found = Visit(context.new_page())
            context.on("request", lambda request: found.requests.append(request.url))
            return found

        yield enter


@pytest.fixture
def page(visit: Callable[..., Visit]) -> Page:
    """A page of a desktop browser, at no address yet."""
    return visit().page


@pytest.fixture(scope="session")
def shot() -> Callable[[Page, str], Path]:
    """``shot(page, "compare")`` keeps a screenshot of the whole page."""
    folder = Path(os.environ.get("BROWSER_ARTEFACTS") or Path(__file__).parent / "artefacts")

    def take(page: Page, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", full_page=True, animations="disabled")
        return folder / f"{name}.png"

    return take
