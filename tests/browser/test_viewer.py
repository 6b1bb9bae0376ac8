"""Smoke tests of the viewer in a real browser; ``tests/app`` tests the data of its tabs."""

import re
from itertools import pairwise

import pytest
from playwright.sync_api import ConsoleMessage, Request, Response, expect

from bilora_diffusion.run.runlog import RunLog
from tests.browser.conftest import fits, serving
from tests.browser.driver import GENERATED_MS, go, pick
from tests.scripts.runs import free_port

pytestmark = pytest.mark.slow

# Visible texts whose contrast with the background is below WCAG's minimum of 4.5
CONTRAST = """() => {
  const parts = (color) => color.match(/[0-9.]+/g).map(Number);
  const channel = (value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) =>
    0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, at) => a * x + (1 - a) * below[at]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own.length < 4 || own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || element.closest("script, style, :disabled")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const back = behind(element), ink = over(parts(getComputedStyle(element).color), back);
    const [dark, bright] = [light(ink), light(back)].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)} (${element.className})`);
  }
  return low;
}"""
# Visible controls that have no name for a screen reader
NAMELESS = """() => [...document.querySelectorAll("a, button, input, textarea, [role=button]")]
  .filter((element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
  .filter((element) => ![
    element.ariaLabel, element.alt, element.title, element.textContent,
    element.querySelector("img")?.alt,
    ...[...(element.labels || [])].map((label) => label.textContent),
  ].some((name) => name && name.trim()))
  .map((element) => element.outerHTML.slice(0, 200))"""
# Visible buttons smaller than WCAG 2.2's minimum of 24 pixels
SMALL = """() => [...document.querySelectorAll(
    ".token-remove, .reset-button, .icon-button, .label-wrap"
  )]
  .filter((element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
  .filter((element) => {
    const { width, height } = element.getBoundingClientRect();
    return Math.min(width, height) < 24;
  })
  .map((element) => element.outerHTML.slice(0, 200))"""
# Levels of the visible headings, in page order
LEVELS = """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
  .filter((element) => element.checkVisibility())
  .map((element) => Number(element.tagName[1]))"""
# Tab -> a part of the page that is visible when the tab has loaded
FILLED = {
    "Compare": "#compare-cards figure.card img",
    "Generate": "#generate-a input",
    "Training": "#training-loss svg.marks",
    "Results": "#results-result input",
}
# Left and right edges of a plot's step labels, in pixels, from left to right
LABEL_EDGES = """(plot) => [
    ...plot.querySelectorAll('g[aria-label^="X-axis"] .role-axis-label text')
  ]
  .filter((label) => label.getAttribute("opacity") !== "0")
  .map((label) => label.getBoundingClientRect())
  .map(({ left, right }) => [left, right])
  .sort(([a], [b]) => a - b)"""
CARD = "#compare-cards figure.card"


def check_training_on_a_phone(page):
    """Check that the widgets are stacked and have the same width."""
    runs = page.locator("#training-runs").bounding_box()
    window = page.locator("#training-window").bounding_box()
    assert runs["y"] + runs["height"] <= window["y"]
    assert runs["width"] == window["width"]


def check_results(page):
    pick(page, "results-result", "Landscape: landscape")
    expect(page.locator("#results-report table")).to_contain_text("very wide")
    cell = page.locator("#results-report td").first.bounding_box()
    assert cell["height"] < 60, "the words must be on one line"
    expect(page.locator("#results-figures img.zoom")).to_have_count(1)
    padding = page.locator("#results-result input").evaluate(
        "input => parseFloat(getComputedStyle(input).paddingRight)"
    )
    assert padding >= 24, "a long name must end before the arrow"


def check_accessible(page):
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(SMALL) == []
    for level, next_level in pairwise(page.evaluate(LEVELS)):
        assert next_level <= level + 1
    assert fits(page)
    assert page.evaluate(CONTRAST) == []
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


@pytest.mark.parametrize("is_dark_phone", [False, True])
def test_tabs_are_accessible_fit_and_request_nothing_from_other_sites(viewer, visit, is_dark_phone):
    page = visit(phone=is_dark_phone, dark=is_dark_phone)
    messages: list[ConsoleMessage] = []
    requests: list[Request] = []
    answers: list[Response] = []
    page.on("console", lambda message: messages.append(message))
    page.on("request", lambda request: requests.append(request))
    page.on("response", lambda answer: answers.append(answer))
    go(page, viewer.url)
    for tab, part in FILLED.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(part).first).to_be_visible()
        if tab == "Results":
            check_results(page)
        if tab == "Training" and is_dark_phone:
            check_training_on_a_phone(page)
        check_accessible(page)
    for request in requests:
        assert request.url.startswith(("data:", "blob:", viewer.url))
    expect(page).to_have_url(re.compile("tab=results"))
    page.go_back()
    expect(page.locator("#frame-tabs [role=tab][aria-selected=true]")).to_have_text("Training")
    for answer in answers:
        assert answer.ok, answer.url  # every route that the page needs is open
    for message in messages:
        assert "Content Security Policy" not in message.text


def test_scores_are_compared_by_mouse_keyboard_and_link(viewer, visit):
    page = go(visit(), viewer.url)
    names = ["base model", "lora (LoRA, seed 0)", "bilora (Bi-LoRA, seed 0)"]
    first_prompt = page.locator("#validation-images section.subject").first
    expect(first_prompt.locator("figcaption")).to_have_text(names)
    place = page.locator("#compare-place")
    expect(page.locator(CARD).locator(".name")).to_have_text(["Alora", "Bbilora", "ground truth"])
    page.locator("#compare-next").click()
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(place).to_have_text("2 of 4")
    words = page.locator("#compare-words textarea, #compare-words input")
    words.click()
    page.keyboard.type("jk")  # in a text field these keys are text
    expect(page.locator("#compare-list")).to_contain_text("No prompt contains these words")
    words.fill("")
    page.locator("#compare-list button.prompt", has_text="frog").click()
    expect(page.locator("#compare-prompt")).to_contain_text("frog")

    # An arrow key moves the slider between two images by 1 % of their width.
    page.locator("#compare-slider input").focus()
    page.keyboard.press("ArrowRight")
    front_image = page.locator("#compare-slider img.over")
    shape = front_image.evaluate("image => getComputedStyle(image).clipPath")
    assert float(re.findall(r"([0-9.]+)%", shape)[-1]) == 51
    images, zoom = page.locator("img.zoom"), page.locator("dialog#zoom")
    images.first.click()
    page.keyboard.press("ArrowRight")
    expect(zoom.locator("p")).to_have_text(images.nth(1).get_attribute("alt") or "")
    page.keyboard.press("Escape")
    expect(zoom).to_be_hidden()

    link = page.locator("#compare-link textarea, #compare-link input")
    expect(link).to_have_value(re.compile("a=lora.*b=bilora.*frog"))
    linked = go(visit(), link.input_value())
    expect(linked.locator("#compare-prompt")).to_contain_text("frog")


def test_images_are_generated_and_work_ends_if_it_is_cancelled_or_its_page_is_closed(viewer, visit):
    first = go(visit(), viewer.url, "Generate")
    second = go(visit(phone=True, dark=True), viewer.url, "Generate")

    def begin(page, steps):
        expect(page.locator("#generate-a input")).to_have_value("bilora (Bi-LoRA, seed 0)")
        field = page.locator("#generate-steps input")
        field.fill(str(steps))
        field.blur()
        page.locator("#generate-go").click()
        if steps == 1000:
            expect(page.locator("#generate-status")).to_contain_text(re.compile(r"\d+/1000 steps"))

    begin(first, 1000)
    first.locator("#generate-cancel").click()
    expect(first.locator("#generate-status")).to_contain_text("Cancelled.")
    begin(first, 1000)
    begin(second, 2)  # this work starts when the first page is closed
    first.close()
    expect(second.locator("#generate-status")).to_contain_text("Done.", timeout=GENERATED_MS)
    expect(second.locator("#generate-slider img")).to_have_count(2)
    begin(second, 0)  # this click clears the earlier images
    expect(second.get_by_test_id("toast-body")).to_contain_text("steps is 0")
    expect(second.locator("#generate-slider img")).to_have_count(0)
    expect(second.locator("#generate-status")).not_to_contain_text("Done.")
    second.get_by_role("tab", name="Training").click()
    expect(second.get_by_test_id("toast-body")).to_have_count(0)


def test_curves_follow_a_running_run(tmp_path, start, visit):
    log = RunLog(tmp_path / "bilora", "cpu")

    def train(steps):
        for step in steps:
            norms = {"auxiliary_norm_before": 0.06 + 0.2 / step, "auxiliary_norm": 0.05}
            log.metric(step, loss=0.1 + 1 / step, lr=1e-3 / step, seconds=0.05, **norms)
        log.sync()

    config = {"pretrained_model_name_or_path": "mini", "rho": 0.05, "max_train_steps": 500}
    log.start(config, method="bilora", seed=0, resume_step=None)
    log.record_activity("training")
    train(range(1, 101))
    page = go(visit(), start(tmp_path).url, "Training")
    card = page.locator("#training-cards li")
    expect(card).to_contain_text("100 of 500 steps")
    for chart, count in {"loss": 2, "norm": 3, "rate": 1}.items():
        expect(page.locator(f"#training-{chart} .mark-line path")).to_have_count(count)
    curve = page.locator("#training-loss .mark-line path").last
    path = curve.get_attribute("d") or ""
    train(range(101, 501))
    expect(card).to_contain_text("500 of 500 steps")
    expect(curve).not_to_have_attribute("d", path)
    page.set_viewport_size({"width": 1400, "height": 900})  # three plots side by side
    page.wait_for_timeout(1000)  # in ms; until the plots are redrawn
    for chart in ("loss", "norm", "rate"):
        edges = page.locator(f"#training-{chart}").evaluate(LABEL_EDGES)
        assert len(edges) > 2
        for (_, end), (start, _) in pairwise(edges):
            assert end + 5 < start, "step labels must not touch"
    page.locator("#training-norm svg.marks").hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("Bi-LoRA, seed 0")


@pytest.mark.matrix
def test_a_page_reloads_after_its_server_restarts(tmp_path, visit):
    port, page = free_port(), visit()
    with serving(tmp_path, tmp_path / "first.log", port) as viewer:
        go(page, viewer.url, "Training")
        page.evaluate("window.isOld = true")
    with serving(tmp_path, tmp_path / "second.log", port):
        page.wait_for_function("window.isOld === undefined")
        expect(page.locator("#frame-tabs [role=tab][aria-selected=true]")).to_have_text("Training")
