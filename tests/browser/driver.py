"""A viewer in a separate process and a browser, for the tests and for pictures in the docs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Arguments for a browser that runs as root and connects only to this machine
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
# Maximum time for the start of a viewer, which imports PyTorch and Gradio
START_SECONDS = 280.0
# Maximum time for a part of a page to load on a busy machine
LOADED_MS = 60_000
# Maximum time for two small images on a busy machine
GENERATED_MS = 600_000


@contextmanager
def serving(root: Path, log: Path, port: int) -> Iterator[str]:
    """Context manager: run a viewer of a folder; yields its URL.

    Args:
        root: folder of the viewer.
        log: file for everything that the viewer prints.
        port: port to listen on.

    Raises:
        RuntimeError: the viewer does not start, or a signal does not end it with exit code 0.
    """
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "app.viewer", str(root), "--port", str(port)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not _answers(url):
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"the viewer did not start: {log.read_text('utf-8')}")
                time.sleep(0.2)
            yield url
            process.terminate()
            if process.wait(20) != 0:
                raise RuntimeError(f"the viewer ended badly: {log.read_text('utf-8')}")
        finally:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@contextmanager
def chromium() -> Iterator[Browser]:
    """Context manager: run headless Chromium.

    Raises:
        RuntimeError: Chromium is not installed.
    """
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        raise RuntimeError("there is no Chromium here: install it (apt-get install chromium)")
    expect.set_options(timeout=LOADED_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


def go(page: Page, address: str, tab: str | None = None) -> Page:
    """Open a URL, wait until the page has loaded, and choose a tab."""
    page.goto(address)
    page.locator("#frame-title h1").wait_for()
    if tab is not None:
        page.get_by_role("tab", name=tab).click()
    return page


def pick(page: Page, field: str, option: str) -> None:
    """Choose an option in a drop-down list."""
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)  # the list has faded out
