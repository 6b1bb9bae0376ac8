"""The Compare tab in a browser: validation images, scores, the slider, the keyboard, the link."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.compare_data import PromptRow, first_view, listed, times_100
from app.scored import Scored, scored
from eval import table
from tests.browser.conftest import Viewer, go, pick

pytestmark = pytest.mark.slow

CARD = "#compare-cards figure.card"
ROW = "#compare-list button.prompt"


def expected(result: Scored, order: str) -> list[PromptRow]:
    """The prompts as the data has them."""
    return listed(replace(first_view("scores", result), order=order), result)


def sources(page: Page) -> list[str | None]:
    """Addresses of the big pictures."""
    return [image.get_attribute("src") for image in page.locator(f"{CARD} > img").all()]


def test_runs_before_any_scoring_then_their_scores_by_mouse_keyboard_and_link(
    visit: Callable[..., Page],
    start: Callable[[Path], Viewer],
    full_root: Path,
    tmp_path: Path,
) -> None:
    page = visit()
    for name in ("lora", "bilora"):
        shutil.copytree(full_root / name, tmp_path / name, copy_function=os.link)
    images = tmp_path / "lora" / "validation"
    shutil.copytree(
        images / "step-0", images / "step-1"
    )  # as if the first step had changed nothing
    viewer = start(tmp_path)
    go(page, viewer.url)
    subjects = page.locator("#validation-images section.subject")
    expect(subjects).to_have_count(6)
    names = ["base model", "LoRA, seed 0", "Bi-LoRA, seed 0"]
    expect(subjects.first.locator("figcaption")).to_have_text(names)
    expect(page.locator("#validation-step input:checked")).to_have_value("2")
    page.locator("#validation-step label", has_text="1").click()
    expect(subjects.first.locator(".absent")).to_have_text("none at step 1")  # of Bi-LoRA
    base, lora = (image.get_attribute("src") for image in subjects.first.locator("img").all())
    assert base == lora
    command = f"python -m eval.clip_scores {tmp_path}/lora {tmp_path}/bilora"
    expect(page.locator("#tab-compare .command code")).to_have_text(command)

    page.evaluate("window.notReloaded = true")
    shutil.copytree(full_root / "scores", tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / "scores")
    result = scored(table.read(tmp_path / "scores"))
    cards, place = page.locator(CARD), page.locator("#compare-place")
    expect(cards.locator(".name")).to_have_text(["Alora", "Bbilora", "ground truth"])
    assert len(set(sources(page))) == 3
    assert page.evaluate("window.notReloaded")
    image = result.images["lora", expected(result, "gain")[0].text, 0]
    score = cards.first.locator("tr", has_text="CLIP I2T").locator("td")
    expect(score).to_have_text(times_100(image.scores["i2t"]))
    expect(cards.first.locator(".caption")).to_contain_text(image.caption or "?")

    page.locator("#compare-next").click()
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(place).to_have_text("2 of 4")
    pick(page, "compare-order", "Largest loss first")
    expect(page.locator(ROW).first).to_contain_text(expected(result, "loss")[0].name)
    before = sources(page)
    pick(page, "compare-seed", "1")
    expect(page.locator(f"{CARD} > img").first).not_to_have_attribute("src", before[0] or "")
    page.locator("#compare-words textarea, #compare-words input").click()
    page.keyboard.type("jk")  # a field keeps its keys
    expect(page.locator("#compare-list")).to_contain_text("No prompt contains these words")
    page.locator("#compare-words textarea, #compare-words input").fill("")
    page.locator(ROW, has_text="frog").click()
    expect(page.locator("#compare-prompt")).to_contain_text("frog")

    handle, clip = (page.locator(f"#compare-slider {part}") for part in ("input", "img.over"))
    read = "image => getComputedStyle(image).clipPath"
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert float(re.findall(r"([0-9.]+)%", clip.evaluate(read))[-1]) == 51
    images, zoom = page.locator("img.zoom"), page.locator("dialog#zoom")
    images.first.click()
    page.keyboard.press("ArrowRight")
    expect(zoom.locator("p")).to_have_text(images.nth(1).get_attribute("alt") or "")
    page.keyboard.press("Escape")
    expect(zoom).to_be_hidden()

    link = page.locator("#compare-link textarea, #compare-link input")
    expect(link).to_have_value(re.compile("a=lora.*b=bilora.*frog.*seed=1.*order=loss"))
    other = go(visit(), link.input_value())
    expect(other.locator("#compare-prompt")).to_contain_text("frog")
    expect(other.locator("#compare-seed input")).to_have_value("1")
    for at, source in enumerate(sources(page)):
        expect(other.locator(f"{CARD} > img").nth(at)).to_have_attribute("src", source or "")
