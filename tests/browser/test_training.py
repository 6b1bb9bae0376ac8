"""Training curves in a real browser, live while a run writes its record."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

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


def test_curves_follow_a_run_show_values_and_fit_a_phone(
    tmp_path: Path,
    start: Callable[[Path], Viewer],
    visit: Callable[..., Page],
    shot: Callable[[Page, str], Path],
) -> None:
    other = begin(tmp_path / "lora", "lora")
    train(other, "lora", 1, 200)
    other.finish(steps=200)
    live = begin(tmp_path / "bilora", "bilora")
    train(live, "bilora", 1, 100)
    viewer, page = start(tmp_path), visit()
    live.sync()  # the heartbeat
    go(page, viewer.url, "Training")
    cards = page.locator("#training-cards li")
    mine = cards.filter(has=page.locator("b", has_text=re.compile("^Bi-LoRA, seed 0$")))
    for text in (f"100 of {STEPS} steps", "running", "ρ 0.05"):
        expect(mine).to_contain_text(text)
    for chart, count in LINES.items():
        expect(page.locator(f"#training-{chart} .mark-line path")).to_have_count(count)
    page.evaluate("window.notReloaded = true")
    loss = page.locator("#training-loss .mark-line path").last
    before = loss.get_attribute("d")
    train(live, "bilora", 101, 200)
    expect(mine).to_contain_text(f"200 of {STEPS} steps")
    expect(loss).not_to_have_attribute("d", before or "")
    color = "element => getComputedStyle(element).getPropertyValue('--line').trim()"
    assert loss.get_attribute("stroke") == mine.evaluate(color), "cards and curves agree"
    page.locator("#training-norm svg.marks").hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("Bi-LoRA, seed 0")
    shot(page, "training-live")

    live.doing("validation images")
    expect(mine.locator(".state")).to_have_text("validation images")
    live.close("failed", "the loss at step 201 is not finite: lower --learning_rate")
    expect(mine).to_contain_text("the loss at step 201 is not finite")
    page.locator("#training-runs .token", has_text="Bi-LoRA").get_by_role("button").click()
    expect(cards).to_have_count(1)
    for chart in ("norm", "loss-difference", "heldout-difference"):
        expect(page.locator(f"#training-{chart}")).to_have_count(0)
    expect(page.locator("#training-loss .mark-line path")).to_have_count(2)
    assert page.evaluate("window.notReloaded")

    page = go(visit(phone=True, dark=True), viewer.url, "Training")
    expect(page.locator("#training-loss .mark-line path")).to_have_count(LINES["loss"])
    area = page.locator("#training-loss svg.marks").bounding_box()
    assert area is not None
    assert area["width"] > 250
    assert fits(page)
    page.mouse.wheel(0, 1500)
    page.wait_for_timeout(500)
    expect(page.locator("#training-legend span").first).to_be_in_viewport()
