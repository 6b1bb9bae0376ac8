"""The viewer in a process of its own, and a real browser that looks at it."""

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.app.folders import make_result, make_scores
from tests.scripts.runs import started, train

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
TEXTS = tuple(f"an icon of a {name}" for name in ("rabbit", "cloud", "lion", "frog"))
SEEDS = (0, 1)
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
        page.get_by_role("tab", name=tab).click()
    return page


def pick(page: Page, field: str, option: str) -> None:
    """Choose an option of a drop-down list."""
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)  # the list fades away


def fits(page: Page) -> bool:
    """Test that nothing is wider than the window."""
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return widths[0] <= widths[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(root: Path, log: Path, port: int) -> Iterator[Viewer]:
    """A viewer on this port, ended afterwards."""
    viewer, until = Viewer(f"http://127.0.0.1:{port}", root), time.monotonic() + PATIENCE
    with log.open("wb") as output:
        how = {"stdout": output, "stderr": subprocess.STDOUT}
        process = started("-m", "app.viewer", root, "--port", port, **how)
        try:
            while not _answers(viewer.url):
                if time.monotonic() > until or process.poll() is not None:
                    pytest.fail(f"the viewer ended or did not start: {log.read_text('utf-8')}")
                time.sleep(0.2)
            yield viewer
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@pytest.fixture(scope="session")
def full_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps with a checkpoint (``lora``, ``bilora``), ``scores``, a wide report."""
    root = tmp_path_factory.mktemp("viewer") / "studio"
    values: dict[str, Any] = {"learning_rate": 0.02}  # enough to see it
    values |= {"num_validation_images": 1, "checkpointing_steps": 2}
    train(root / "lora", method="lora", eval_on_start=True, **values)
    train(root / "bilora", method="bilora", rho=1.0, **values)
    make_scores(root / "scores", ("lora", "bilora"), TEXTS, SEEDS)
    wide = "very wide " * 30
    make_result(root / "landscape", f"| run | {wide} |\n| --- | --- |\n| LoRA | 0.12 |\n")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Viewer]]:
    """``start(root)`` runs a viewer until the tests of a file end: an idle one takes CPU, too."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def run(root: Path) -> Viewer:
            log = logs / f"{len(list(logs.iterdir()))}.log"
            return stack.enter_context(serving(root, log, free_port()))

        yield run


@pytest.fixture(scope="module")
def viewer(full_root: Path, start: Callable[[Path], Viewer]) -> Viewer:
    """A viewer of ``full_root``, shared by the tests of one process."""
    return start(full_root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.fail("the browser tests need Chromium: install it (apt-get install chromium)")
    expect.set_options(timeout=LOADED)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
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
