"""Training curves in a real browser, live while a run writes its record."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from app.charts import COLORS
from bilora_diffusion.runlog import RunLog
from tests.browser.conftest import Viewer, Visit
from tests.browser.test_vote import choose

STEPS = 400
CONFIG: dict[str, Any] = {
    "pretrained_model_name_or_path": "mini",
    "rho": 0.05,
    "rho_norm": "scaled",
    "max_train_steps": STEPS,
}
LINES = {"loss": 4, "heldout": 4, "norm": 3, "rate": 2}
"""Charts and how many lines they have: one or two a run, and rho."""


def begin(folder: Path, method: str) -> RunLog:
    """Open a run's record as training does."""
    log = RunLog(folder, "cpu")
    log.start(CONFIG, method=method, seed=0, resume_step=None)
    log.metric(0, heldout_loss=0.093, train_grid_loss=0.098)
    return log


def step(log: RunLog, at: int, method: str) -> None:
    """Write what a step and, now and then, a measurement leave."""
    norms, lower = {}, 0.0
    if method == "bilora":
        before = 0.06 + 0.2 / at + 0.005 * math.cos(at)
        norms, lower = {"auxiliary_norm_before": before, "auxiliary_norm": 0.05}, 0.02
    loss = 0.1 + 0.03 * math.sin(at * at) - 0.03 * at / STEPS - lower
    log.metric(at, loss=loss, lr=1e-3 * (1 - at / STEPS), grad_norm=0.1, **norms, seconds=0.05)
    if at % 50 == 0:
        gain = 1e-3 * math.sqrt(at) * (1 + 20 * lower) / 5
        log.metric(at, heldout_loss=0.093 - gain, train_grid_loss=0.098 - 2 * gain)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> RunLog:
    """A Bi-LoRA run that is going on, beside a finished LoRA run and a broken one."""
    root = tmp_path_factory.mktemp("training")
    other = begin(root / "lora", "lora")
    for at in range(1, 201):
        step(other, at, "lora")
    other.finish(steps=200)
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    log = begin(root / "bilora", "bilora")
    for at in range(1, 101):
        step(log, at, "bilora")
    log.sync()
    return log


@pytest.fixture(scope="module")
def studio(live: RunLog, start: Callable[..., Viewer]) -> Viewer:
    """A viewer of these runs."""
    return start(live.folder.parent)


def card(page: Page, name: str) -> Locator:
    """The card of a run."""
    named = page.locator("b", has_text=re.compile(f"^{name}$"))
    return page.locator("#training-cards li", has=named)


def drawn(page: Page, chart: str) -> list[str]:
    """The paths of a plot's lines, in screen units, when they have come to rest."""
    expect(page.locator(f"#training-{chart} svg")).to_be_visible()
    lines = page.locator(f"#training-{chart} .mark-line path")
    read = "paths => paths.map(path => path.getAttribute('d'))"
    found, before = [], None
    while found != before:
        found, before = [line for line in lines.evaluate_all(read) if line], found
        page.wait_for_timeout(500)
    return found


def strokes(page: Page, chart: str) -> list[str]:
    """The colours of a plot's lines."""
    drawn(page, chart)
    return page.locator(f"#training-{chart} .mark-line path").evaluate_all(
        "lines => lines.filter(x => x.getAttribute('d')).map(x => x.getAttribute('stroke'))"
    )


def wait_for_change(page: Page, chart: str, before: list[str]) -> None:
    """Wait until a plot has other lines."""
    page.wait_for_function(
        """([id, before]) => {
            const lines = [...document.querySelectorAll(`#${id} .mark-line path`)];
            const now = lines.map(line => line.getAttribute("d")).filter(Boolean);
            return now.length && now.join() !== before.join();
        }""",
        arg=[f"training-{chart}", before],
    )


def test_curves_on_a_phone_in_the_dark(
    studio: Viewer, visit: Callable[..., Visit], shot: Callable[[Page, str], Path]
) -> None:
    look = visit(phone=True, dark=True)
    page = look.open(studio.url)
    expect(page.locator("#frame-notice")).to_contain_text("broken")
    choose(page, "Training")
    expect(card(page, "lora")).to_contain_text(f"200 of {STEPS} steps")
    expect(card(page, "lora")).to_contain_text("finished")
    for chart, count in LINES.items():
        lines = drawn(page, chart)
        assert len(lines) == count
        assert "NaN" not in "".join(lines)
        box = page.locator(f"#training-{chart} svg").bounding_box()
        assert box is not None
        assert 200 < box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(url.startswith((studio.url, "data:", "blob:")) for url in look.requests)
    shot(page, "training-phone-dark")


def test_a_run_that_goes_on_is_followed(
    studio: Viewer, live: RunLog, visit: Callable[..., Visit], shot: Callable[[Page, str], Path]
) -> None:
    live.sync()  # the heartbeat
    page = visit().open(studio.url, "Training")
    mine = card(page, "bilora")
    expect(mine).to_contain_text(f"100 of {STEPS} steps")
    expect(mine).to_contain_text("running")
    expect(mine).to_contain_text("ρ 0.05")
    page.evaluate("window.notReloaded = true")
    before = {chart: drawn(page, chart) for chart in LINES}

    def train() -> None:
        for at in range(101, 201):
            step(live, at, "bilora")
        live.sync()

    writer = threading.Thread(target=train)
    writer.start()
    expect(mine).to_contain_text(f"200 of {STEPS} steps")
    writer.join()
    for chart in LINES:
        wait_for_change(page, chart, before[chart])
    both = [COLORS["teal"], COLORS["orange"]]  # by path: bilora, lora
    assert strokes(page, "loss") == [*(f"{color}77" for color in both), *both]
    assert strokes(page, "norm")[:2] == [f"{both[0]}77", both[0]]
    shot(page, "training")

    with (live.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "lo')  # a kill leaves a torn line
    live.fail("the loss at step 201 is not finite: lower --learning_rate")
    expect(mine).to_contain_text("failed")
    expect(mine).to_contain_text("the loss at step 201 is not finite")
    expect(mine).to_contain_text(f"200 of {STEPS} steps")
    assert page.evaluate("window.notReloaded")


def test_runs_are_chosen(studio: Viewer, visit: Callable[..., Visit]) -> None:
    page = visit().open(studio.url, "Training")
    expect(page.locator("#training-cards li")).to_have_count(2)
    expect(page.locator("#training-norm svg")).to_be_visible()
    before = drawn(page, "loss")
    names = page.locator("#training-cards b").all_inner_texts()
    page.get_by_role("button", name=f"Remove {names.index('bilora')}").click()
    expect(page.locator("#training-cards li")).to_have_count(1)
    expect(page.locator("#training-norm")).to_be_hidden()  # LoRA has no auxiliary
    wait_for_change(page, "loss", before)
    assert strokes(page, "loss") == [COLORS["orange"] + "77", COLORS["orange"]]
