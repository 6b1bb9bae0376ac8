"""Training curves in a browser, live while a run writes its record."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from bilora_diffusion.run.runlog import RunLog
from tests.browser.conftest import Viewer, go

pytestmark = pytest.mark.slow

CONFIG = {"pretrained_model_name_or_path": "mini", "rho": 0.05, "max_train_steps": 400}
LINES = {"loss": 4, "loss-difference": 2, "norm": 3, "rate": 2}
"""Charts and how many lines they have: one or two a run, zero, and rho."""


def begin(folder: Path, method: str) -> RunLog:
    """Open a run's record as training does."""
    log = RunLog(folder, "cpu")
    log.start(CONFIG, method=method, seed=0, resume_step=None)
    log.doing("training")
    return log


def train(log: RunLog, method: str, first: int, last: int) -> None:
    """Write what steps leave."""
    for at in range(first, last + 1):
        norms = {"auxiliary_norm_before": 0.06 + 0.2 / at, "auxiliary_norm": 0.05}
        more = norms if method == "bilora" else {}
        log.metric(at, loss=0.1 + 1 / at, lr=1e-3 / at, seconds=0.05, **more)
    log.sync()


def test_curves_follow_a_run_and_show_values(
    tmp_path: Path, start: Callable[[Path], Viewer], visit: Callable[..., Page]
) -> None:
    other = begin(tmp_path / "lora", "lora")
    train(other, "lora", 1, 200)
    other.close("finished", steps=200)
    live = begin(tmp_path / "bilora", "bilora")
    train(live, "bilora", 1, 100)
    page = go(visit(), start(tmp_path).url, "Training")
    cards = page.locator("#training-cards li")
    mine = cards.filter(has=page.locator("b", has_text=re.compile("^Bi-LoRA, seed 0$")))
    for text in ("100 of 400 steps", "ρ 0.05"):
        expect(mine).to_contain_text(text)
    for chart, count in LINES.items():
        expect(page.locator(f"#training-{chart} .mark-line path")).to_have_count(count)
    loss = page.locator("#training-loss .mark-line path").last
    before = loss.get_attribute("d")
    train(live, "bilora", 101, 200)
    expect(mine).to_contain_text("200 of 400 steps")
    expect(loss).not_to_have_attribute("d", before or "")
    page.locator("#training-norm svg.marks").hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("Bi-LoRA, seed 0")
    live.close("failed", "the loss at step 201 is not finite: lower --learning_rate")
    expect(mine).to_contain_text("the loss at step 201 is not finite")
