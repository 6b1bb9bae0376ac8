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

from app.compare_data import arranged, rows, times_100
from app.scored import Scored, scored
from eval import table
from tests.app.scored_images import scores_of, write
from tests.browser.conftest import Viewer, go, pick

pytestmark = pytest.mark.slow

CARD = "#compare-cards figure.card"
CHOSEN = "#compare-list button.prompt[aria-current]"


@pytest.fixture(scope="session")
def result(full_root: Path) -> Scored:
    """The scores that are shown."""
    return scored(table.read(full_root / "scores"))


def opened(page: Page, viewer: Viewer, query: str = "") -> Page:
    """The tab with its images."""
    page.goto(viewer.url + "/" + query)
    page.locator(f"{CARD} img").first.wait_for()
    return page


def pictures(page: Page) -> list[str | None]:
    """Addresses of the big pictures."""
    return [image.get_attribute("src") for image in page.locator(f"{CARD} > img").all()]


def expected(result: Scored, order: str, metric: str = "i2t") -> list[str]:
    """The names as the data has them."""
    return [row.name for row in arranged(rows(result, "lora", "bilora", metric), metric, order)]


def test_images_side_by_side_with_scores_chosen_by_order_words_prompt_and_seed(
    page: Page, viewer: Viewer, result: Scored, shot: Callable[[Page, str], Path]
) -> None:
    opened(page, viewer)
    cards = page.locator(CARD)
    expect(cards).to_have_count(3)  # two adapters and the held-out picture
    expect(cards.locator(".name")).to_have_text(["Alora", "Bbilora", "ground truth"])
    assert len(set(pictures(page))) == 3
    first = arranged(rows(result, "lora", "bilora", "i2t"), "i2t", "gain")[0].text
    for at, label in enumerate(result.labels):
        image, card = result.images[label, first, 0], cards.nth(at)
        expect(card.locator("tr", has_text="CLIP I2T").locator("td")).to_have_text(
            times_100(image.scores["i2t"])
        )
        expect(card).to_contain_text("by test-CLIP")
        expect(card.locator(".caption")).to_contain_text(image.caption or "?")
        nearest = f"1fa96.png · {times_100(image.scores['nearest'])}"
        expect(card.locator(".nearest")).to_contain_text(nearest)
        assert card.locator(".nearest img").evaluate("image => image.naturalWidth") > 0
    assert cards.first.locator("> img").evaluate("image => image.naturalWidth") == 256
    shot(page, "compare-desktop")

    pick(page, "compare-order", "Largest loss first")
    first = page.locator("#compare-list button.prompt").first
    expect(first).to_contain_text(expected(result, "loss")[0])
    names = page.locator("#compare-list button.prompt span:first-child").all_inner_texts()
    assert [text.strip() for text in names] == expected(result, "loss")
    before = pictures(page)
    page.locator("#compare-list button.prompt", has_text="rabbit").click()
    expect(page.locator("#compare-prompt")).to_contain_text("rabbit")
    expect(page.locator(CHOSEN)).to_contain_text("rabbit")
    expect(page.locator(f"{CARD} > img").first).not_to_have_attribute("src", before[0] or "")
    before = pictures(page)
    pick(page, "compare-seed", "1")
    expect(page.locator(f"{CARD} > img").first).not_to_have_attribute("src", before[0] or "")
    assert pictures(page)[2] == before[2]  # the held-out picture has no seed
    page.locator("#compare-words textarea, #compare-words input").fill("zebra")
    expect(page.locator("#compare-list")).to_contain_text("No prompt contains these words")


def test_slider_and_enlargement_go_by_mouse_and_keyboard(page: Page, viewer: Viewer) -> None:
    opened(page, viewer)
    slider = page.locator("#compare-slider figure.pair")
    sources = [image.get_attribute("src") for image in slider.locator("img").all()]
    assert len(set(sources)) == 2
    handle, clip = slider.locator("input"), slider.locator("img.over")
    assert handle.get_attribute("aria-label") == "lora | bilora"
    read = "image => getComputedStyle(image).clipPath"
    handle.scroll_into_view_if_needed()
    box = slider.locator("> div").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + box["height"] / 2)
    shown = float(re.findall(r"([0-9.]+)%", clip.evaluate(read))[-1])
    assert shown == pytest.approx(25, abs=3)
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert float(re.findall(r"([0-9.]+)%", clip.evaluate(read))[-1]) == shown + 1
    style = "element => getComputedStyle(element).outlineStyle"
    assert slider.locator("> div").evaluate(style) == "solid", "it can be seen where the keys go"
    expect(page.locator("#compare-place")).to_have_text("1 of 4")  # the keys were the slider's

    images, zoom = page.locator("img.zoom"), page.locator("dialog#zoom")
    images.first.click()
    expect(zoom).to_be_visible()
    expect(zoom.locator("img")).to_have_attribute("src", images.first.get_attribute("src") or "")
    page.keyboard.press("ArrowRight")
    expect(zoom.locator("p")).to_have_text(images.nth(1).get_attribute("alt") or "")
    page.keyboard.press("Escape")
    expect(zoom).to_be_hidden()
    images.nth(2).focus()
    page.keyboard.press("Enter")
    expect(zoom.locator("p")).to_have_text(images.nth(2).get_attribute("alt") or "")
    zoom.get_by_role("button", name="Close").click()
    expect(zoom).to_be_hidden()
    expect(images.nth(2)).to_be_focused()


def test_runs_side_by_side_before_any_scoring_then_their_scores(
    page: Page,
    start: Callable[[Path], Viewer],
    full_root: Path,
    tmp_path: Path,
    shot: Callable[[Page, str], Path],
) -> None:
    for name in ("lora", "bilora"):
        shutil.copytree(full_root / name, tmp_path / name, copy_function=os.link)
    shown = tmp_path / "lora" / "validation"
    shutil.copytree(shown / "step-0", shown / "step-1")  # as if the first step had changed nothing
    go(page, start(tmp_path).url)
    subjects = page.locator("#validation-images section.subject")
    expect(subjects).to_have_count(6)
    names = ["base model", "LoRA, seed 0", "Bi-LoRA, seed 0"]
    for at in range(6):
        expect(subjects.nth(at).locator("figcaption")).to_have_text(names)
        images = subjects.nth(at).locator("img").all()
        assert len({image.get_attribute("src") for image in images}) == 3
    expect(subjects.first.locator("h4")).to_contain_text("icon of a rabbit")
    expect(page.locator("#validation-step output")).to_have_text("step 2")
    page.locator("#validation-step input").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#validation-step output")).to_have_text("step 1")
    expect(subjects.first.locator(".absent")).to_have_text("none at step 1")  # of Bi-LoRA
    base, lora = (image.get_attribute("src") for image in subjects.first.locator("img").all())
    assert base == lora
    command = f"python -m eval.clip_scores {tmp_path}/lora {tmp_path}/bilora"
    expect(page.locator("#tab-compare .command code")).to_have_text(command)
    shot(page, "before-scoring")
    page.evaluate("window.notReloaded = true")
    shutil.copytree(full_root / "scores", tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / "scores")
    expect(page.locator(CARD)).to_have_count(3)
    expect(page.locator("#compare-means")).to_contain_text("Scored images")
    expect(subjects).to_have_count(6)
    expect(page.locator("#validation-step output")).to_have_text("step 1")
    assert page.evaluate("window.notReloaded")


def test_buttons_and_keys_step_through_the_list_and_a_field_keeps_its_keys(
    page: Page, viewer: Viewer, result: Scored
) -> None:
    opened(page, viewer)
    order, place = expected(result, "gain"), page.locator("#compare-place")
    expect(place).to_have_text("1 of 4")
    page.locator("#compare-next").click()
    expect(place).to_have_text("2 of 4")
    for key, at in (("ArrowRight", 3), ("j", 4), ("j", 4), ("k", 3), ("ArrowLeft", 2)):
        page.keyboard.press(key)
        expect(place).to_have_text(f"{at} of 4")
        expect(page.locator(CHOSEN)).to_contain_text(order[at - 1])
    page.locator("#compare-previous").click()
    expect(place).to_have_text("1 of 4")
    expect(page.locator("#compare-prompt")).to_contain_text(order[0])
    field = page.locator("#compare-words textarea, #compare-words input")
    field.click()
    page.keyboard.type("jk")
    page.keyboard.press("ArrowLeft")
    expect(field).to_have_value("jk")
    field.fill("")
    expect(page.locator("#compare-place")).to_have_text("1 of 4")
    page.get_by_role("tab", name="Training").click()
    page.locator("#frame-title").click()
    page.keyboard.press("j")
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-place")).to_have_text("1 of 4")


def test_a_link_reopens_the_same_view(visit: Callable[..., Page], viewer: Viewer) -> None:
    page = opened(visit(), viewer)
    for field, option in (("a", "bilora"), ("b", "lora"), ("seed", "1")):
        pick(page, f"compare-{field}", option)
    page.locator("#compare-list button.prompt", has_text="frog").click()
    expect(page.locator("#compare-prompt")).to_contain_text("frog")
    link = page.locator("#compare-link textarea, #compare-link input")
    expect(link).to_have_value(re.compile("a=bilora.*b=lora.*frog.*seed=1"))
    address = link.input_value()
    assert address.startswith(viewer.url)
    assert "prompt=" in page.url  # the browser's own address follows
    other = visit()
    other.goto(address)
    expect(other.locator("#compare-prompt")).to_contain_text("frog")
    expect(other.locator(f"{CARD} .name").first).to_have_text("Abilora")
    for at, source in enumerate(pictures(page)):
        expect(other.locator(f"{CARD} > img").nth(at)).to_have_attribute("src", source or "")
    expect(other.locator("#compare-seed input")).to_have_value("1")
    opened(other, viewer, "?scores=scores&a=lora-9&prompt=<a href='https://evil.example/'>in</a>")
    expect(other.get_by_text("lora-9")).to_be_visible()
    expect(other.get_by_text("<a href=")).to_be_visible()
    expect(other.locator("a[href*=evil]")).to_have_count(0)
    expect(other.locator("#compare-place")).to_have_text("1 of 4")


def test_images_without_scores_are_shown_and_it_is_said(
    page: Page, start: Callable[[Path], Viewer], full_root: Path, result: Scored, tmp_path: Path
) -> None:
    shutil.copytree(full_root / "scores", tmp_path / "bare")
    images = {key: replace(image, scores={}) for key, image in result.images.items()}
    for name, some in (("bare", images), ("empty", {})):
        write(scores_of(result.labels, result.settings.prompts, some), tmp_path / name)
    viewer = start(tmp_path)
    opened(page, viewer)
    expect(page.locator("#compare-metric input")).to_have_value("no image has a score")
    pick(page, "compare-seed", "1")
    page.locator("#compare-next").click()
    expect(page.locator("#compare-place")).to_have_text("2 of 4")
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    opened(page, viewer, "?scores=empty")
    expect(page.get_by_test_id("toast-body")).to_contain_text("which have no images")
