"""Fixtures: a viewer in a separate process, and a real browser."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, Page

from tests.app.folders import make_result, make_scores
from tests.browser import driver
from tests.scripts.runs import free_port, train

TEXTS = ("an icon of a rabbit", "an icon of a cloud", "an icon of a lion", "an icon of a frog")
SEEDS = (0, 1)


class Viewer(NamedTuple):
    """A running viewer."""

    url: str
    root: Path


def fits(page: Page) -> bool:
    """Return whether nothing on the page is wider than the window."""
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return widths[0] <= widths[1]


@contextmanager
def serving(root: Path, log: Path, port: int) -> Iterator[Viewer]:
    """Context manager: run a viewer on this port."""
    with driver.serving(root, log, port) as url:
        yield Viewer(url, root)


@pytest.fixture(scope="session")
def full_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a root with two short runs (``lora``, ``bilora``), ``scores``, and a wide report."""
    root = tmp_path_factory.mktemp("viewer") / "studio"
    values: dict[str, Any] = {
        "learning_rate": 0.02,  # large enough to change the images visibly
        "num_validation_images": 1,
        "checkpointing_steps": 2,
    }
    train(root / "lora", method="lora", eval_on_start=True, **values)
    train(root / "bilora", method="bilora", rho=1.0, **values)
    make_scores(root / "scores", ("lora", "bilora"), TEXTS, SEEDS)
    wide = "very wide " * 30
    make_result(root / "landscape", f"| run | {wide} |\n| --- | --- |\n| LoRA | 0.12 |\n")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Viewer]]:
    """Yield ``start(root)``, which runs a viewer until the tests of the file end.

    Viewers do not run longer, because even an idle viewer uses the CPU.
    """
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def run(root: Path) -> Viewer:
            log = logs / f"{len(list(logs.iterdir()))}.log"
            return stack.enter_context(serving(root, log, free_port()))

        yield run


@pytest.fixture(scope="module")
def viewer(full_root: Path, start: Callable[[Path], Viewer]) -> Viewer:
    """Start a viewer of ``full_root`` that the tests of a file share."""
    return start(full_root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run headless Chromium."""
    with driver.chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Yield ``visit(phone=False, dark=False)``, which opens a page for a new visitor."""
    with ExitStack() as stack:

        def enter(phone: bool = False, dark: bool = False) -> Page:
            context = browser.new_context(
                viewport={"width": 360, "height": 740} if phone else {"width": 1280, "height": 900},
                color_scheme="dark" if dark else "light",
            )
            stack.callback(context.close)
            context.set_default_timeout(driver.LOADED_MS)
            return context.new_page()

        yield enter
