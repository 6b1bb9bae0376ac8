"""Training curves in a real browser, live while a run writes its record."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from bilora_diffusion.run.runlog import RunLog
from tests.browser.conftest import Viewer, fits, go

pytestmark = pytest.mark.slow

STEPS = 400
CONFIG: dict[str, Any] = {
    "pretrained_model_name_or_path": "mini",
    "rho": 0.05,
    "rho_norm": "scaled",
    "max_train_steps": STEPS,
}
LINES = {
    **{"loss": 4, "loss-difference": 2, "heldout": 4, "heldout-difference": 2},
    **{"norm": 3, "rate": 2},
}
"""Charts and how many lines they have: one or two a run, zero, and rho."""


def begin(folder: Path, method: str) -> RunLog:
    """Open a run's record as training does."""
    log = RunLog(folder, "cpu")
    log.start(CONFIG, method=method, seed=0, resume_step=None)
    log.doing("training")
    log.metric(0, heldout_loss=0.093, train_grid_loss=0.098)
    return log


def train(log: RunLog, method: str, first: int, last: int) -> None:
    """Write what steps and, now and then, a measurement leave."""
    for at in range(first, last + 1):
        norms, lower = {}, 0.0
        if method == "bilora":
            before = 0.06 + 0.2 / at + 0.005 * math.cos(at)
            norms, lower = {"auxiliary_norm_before": before, "auxiliary_norm": 0.05}, 0.02
        loss = 0.1 + 0.03 * math.sin(at * at) - 0.03 * at / STEPS - lower
        log.metric(at, loss=loss, lr=1e-3 * (1 - at / STEPS), grad_norm=0.1, **norms, seconds=0.05)
        if at % 50 == 0:
            gain = 1e-3 * math.sqrt(at) * (1 + 20 * lower) / 5
            log.metric(at, heldout_loss=0.093 - gain, train_grid_loss=0.098 - 2 * gain)
    log.sync()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> RunLog:
    """A Bi-LoRA run that is going on, beside a finished LoRA run and a broken one."""
    root = tmp_path_factory.mktemp("training")
    other = begin(root / "lora", "lora")
    train(other, "lora", 1, 200)
    other.finish(steps=200)
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    log = begin(root / "bilora", "bilora")
    train(log, "bilora", 1, 100)
    return log


@pytest.fixture(scope="module")
def studio(live: RunLog, start: Callable[[Path], Viewer]) -> Viewer:
    """A viewer of these runs."""
    return start(live.folder.parent)


def card(page: Page, name: str) -> Locator:
    """The card of a run."""
    named = page.locator("b", has_text=re.compile(f"^{name}, seed 0$"))
    return page.locator("#training-cards li", has=named)


def lines(page: Page, chart: str) -> Locator:
    """The lines of a plot."""
    return page.locator(f"#training-{chart} svg path")


def test_curves_on_a_phone_in_the_dark(
    studio: Viewer, visit: Callable[..., Page], shot: Callable[[Page, str], Path]
) -> None:
    page = go(visit(phone=True, dark=True), studio.url, "Training")
    expect(page.locator("#frame-notice")).to_contain_text("broken")
    expect(card(page, "LoRA")).to_contain_text(f"200 of {STEPS} steps")
    expect(card(page, "LoRA")).to_contain_text("finished")
    for chart, count in LINES.items():
        expect(lines(page, chart)).to_have_count(count)
        names = page.locator(f"#training-{chart} .names span").all()
        area: Any = page.locator(f"#training-{chart} .area").bounding_box()
        boxes: list[Any] = [area, *(name.bounding_box() for name in names)]
        assert all(box["x"] + box["width"] <= 360 for box in boxes)
        assert area["width"] > 150
    assert "NaN" not in page.locator("#training-plots").inner_html()
    assert fits(page)
    shot(page, "training-phone-dark")


def test_a_run_that_goes_on_is_followed_and_runs_are_chosen(
    studio: Viewer, live: RunLog, page: Page, shot: Callable[[Page, str], Path]
) -> None:
    live.sync()  # the heartbeat
    go(page, studio.url, "Training")
    mine = card(page, "Bi-LoRA")
    for text in (f"100 of {STEPS} steps", "running", "ρ 0.05"):
        expect(mine).to_contain_text(text)
    page.evaluate("window.notReloaded = true")
    before = lines(page, "loss").last.get_attribute("d")
    train(live, "bilora", 101, 200)
    expect(mine).to_contain_text(f"200 of {STEPS} steps")
    expect(lines(page, "loss").last).not_to_have_attribute("d", before or "")
    colors = [lines(page, "loss").nth(at).get_attribute("class") for at in range(4)]
    assert colors == ["of-1 faint", "of-0 faint", "of-1 wide", "of-0"]  # by path: bilora, lora
    for chart in ("heldout-difference", "norm"):  # a run keeps its colour
        expect(page.locator(f"#training-{chart} .names .of-0")).to_have_text("Bi-LoRA, seed 0")
    shot(page, "training-live")

    live.doing("validation images")
    expect(mine.locator(".state")).to_have_text("validation images")
    live.doing("training")
    expect(mine.locator(".state")).to_have_text("running")
    with (live.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "lo')  # a kill leaves a torn line
    live.close("failed", "the loss at step 201 is not finite: lower --learning_rate")
    for text in ("failed", "the loss at step 201 is not finite", f"200 of {STEPS} steps"):
        expect(mine).to_contain_text(text)
    assert page.evaluate("window.notReloaded")

    token = page.locator("#training-runs .token", has_text="Bi-LoRA")
    token.get_by_role("button").click()
    expect(page.locator("#training-cards li")).to_have_count(1)
    for chart in ("norm", "loss-difference", "heldout-difference"):
        expect(page.locator(f"#training-{chart}")).to_have_count(0)
    expect(page.locator("#training-loss .names")).to_have_text("LoRA, seed 0")
    expect(lines(page, "loss").first).to_have_class("of-1 faint")
