"""Screenshots of the viewer, and what a tab shows, as a hash can tell.

What a tab shows is the order and the texts of its components, the words of the HTML that the viewer
makes, and the rules of its style. Names of functions, comments, files, error messages and the
runs' own figures are not part of it, so that a screenshot is made again only when it would look
different.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "app"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# For a browser that runs as root and talks to this machine only
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
# Time that a viewer may take to start: it imports PyTorch and Gradio.
START_SECONDS = 280.0
# Milliseconds that a part of a page may take on a machine with other work.
LOADED_MS = 60_000
# Milliseconds that two small images may take there.
GENERATED_MS = 600_000
# Colors of a picture that would be too large with all.
PALETTE = 256
# Largest file of a picture in the repository.
MAX_BYTES = 195_000


# the browser, also of tests/browser


@contextmanager
def serving(root: Path, log: Path, port: int) -> Iterator[str]:
    """A viewer of a folder in a process of its own; yields its address.

    Raises:
        RuntimeError: it does not start, or does not end by a signal with exit code 0.
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
    """Headless Chromium.

    Raises:
        RuntimeError: there is none.
    """
    from playwright.sync_api import expect, sync_playwright

    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        raise RuntimeError("there is no Chromium here: install it (apt-get install chromium)")
    expect.set_options(timeout=LOADED_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


def go(page: Page, address: str, tab: str | None = None) -> Page:
    """Go there, wait until the page has settled, and choose a tab."""
    page.goto(address)
    page.locator("#frame-title h1").wait_for()
    if tab is not None:
        page.get_by_role("tab", name=tab).click()
    return page


def pick(page: Page, field: str, option: str) -> None:
    """Choose an option of a drop-down list."""
    from playwright.sync_api import expect

    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)  # the list fades away


@dataclass(frozen=True)
class Screenshot:
    """A tab in a window of some size, in pixels."""

    tab: str
    width: int = 1400
    height: int = 1000
    is_dark: bool = False


# Pixels
PHONE_WIDTH = 390
SCREENSHOTS = {
    "viewer/compare.png": Screenshot("Compare", height=860),
    "viewer/compare-dark.png": Screenshot("Compare", height=720, is_dark=True),
    "viewer/compare-phone.png": Screenshot("Compare", width=PHONE_WIDTH),
    "viewer/generate.png": Screenshot("Generate", height=900),
    "viewer/generate-phone.png": Screenshot("Generate", width=PHONE_WIDTH, height=1480),
    "viewer/training.png": Screenshot("Training"),
    "viewer/training-phone.png": Screenshot("Training", width=PHONE_WIDTH),
    "viewer/results.png": Screenshot("Results"),
    "viewer/results-phone.png": Screenshot("Results", width=PHONE_WIDTH),
}
# A part that is there when a tab has been filled.
FILLED = {
    "Compare": "#validation-images img",
    "Generate": "#generate-a input",
    "Training": "#training-loss svg.marks",
    "Results": "#results-figures img",
}


def take(screenshots: Mapping[Path, Screenshot], root: Path, port: int) -> None:
    """Take screenshots of a viewer that shows the runs and results below a folder."""
    from playwright.sync_api import expect

    with (
        TemporaryDirectory() as temporary,
        serving(root, Path(temporary) / "log", port) as url,
        chromium() as browser,
    ):
        for file, screenshot in screenshots.items():
            context = browser.new_context(
                viewport={"width": screenshot.width, "height": screenshot.height},
                color_scheme="dark" if screenshot.is_dark else "light",
                reduced_motion="reduce",
            )
            context.set_default_timeout(LOADED_MS)
            page = go(context.new_page(), url, screenshot.tab)
            expect(page.locator(FILLED[screenshot.tab]).first).to_be_visible()
            if screenshot.tab == "Generate":
                page.locator("#generate-go").click()
                status = page.locator("#generate-status")
                expect(status).to_contain_text("Done.", timeout=GENERATED_MS)
            page.wait_for_timeout(1500)  # milliseconds; until animations have ended
            pixels = Image.open(BytesIO(page.screenshot()))
            save(pixels, file)
            context.close()


def save(picture: Image.Image, file: Path) -> None:
    """Write a picture with as many colors as its size allows."""
    full = picture.convert("RGB")
    plain = full.quantize(PALETTE, kmeans=3, dither=Image.Dither.NONE)
    dithered = full.quantize(palette=plain, dither=Image.Dither.FLOYDSTEINBERG)
    file.parent.mkdir(parents=True, exist_ok=True)
    for version in (full, dithered, plain):
        version.save(file, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            return


# what a tab shows

# Properties of components that a reader of the page sees.
VISIBLE = ("label", "info", "placeholder", "caption", "scale", "variant", "open")
# Components that Gradio adds, and those without a place.
OF_GRADIO = ("form", "state")


@cache
def structure(tab: str) -> object:
    """What a tab shows, as JSON can hold it."""
    return [components(tab), sorted(html_words()), style_rules(tab)]


def components(tab: str) -> list[list[Any]]:
    """Kind and visible properties of a tab's components, in their order."""
    from app.catalog import Catalog
    from app.page import build

    with TemporaryDirectory() as empty:
        config = build(Catalog(Path(empty))).get_config_file()
    parts = {part["id"]: part for part in config["components"]}
    listing: list[list[Any]] = []

    def walk(node: Mapping[str, Any], is_inside: bool) -> None:
        part = parts.get(node["id"], {"type": "page", "props": {}})
        is_inside = is_inside or part["props"].get("elem_id") == f"tab-{tab.lower()}"
        if is_inside and part["type"] not in OF_GRADIO:
            values = {name: part["props"].get(name) for name in VISIBLE}
            if part["type"] == "button":
                values["text"] = part["props"].get("value")
            listing.append([part["type"], values])
        for child in node.get("children", ()):
            walk(child, is_inside)

    layout: Any = config.get("layout")
    walk(layout, False)
    return listing


def html_words() -> set[str]:
    """Words of the HTML in the viewer's code, and of its script: tags, classes and texts."""
    words: set[str] = set()
    for path in APP.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # A formatted string is one text, whose constant parts lie between its values.
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = []
            for piece in pieces:
                if isinstance(piece, ast.Constant) and isinstance(piece.value, str):
                    texts.append(piece.value)
            if re.search("</?[a-z]", "".join(texts)):
                words.update(re.findall(r"[\w-]+", " ".join(texts)))
    return words


def style_rules(tab: str) -> list[str]:
    """Rules of the style sheet but for those of other tabs, whose ids begin with their names."""
    style = re.sub(r"/\*.*?\*/", "", (APP / "style.css").read_text("utf-8"), flags=re.DOTALL)
    tabs = {screenshot.tab.lower() for screenshot in SCREENSHOTS.values()} | {"vote"}
    rules = []
    for selector, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        owners = {name for name in re.findall(r"#([a-z]+)-", selector) if name in tabs}
        if not owners or tab.lower() in owners:
            rules.append(" ".join(f"{selector} {{{declarations}}}".split()))
    return rules
