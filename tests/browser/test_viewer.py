"""Smoke tests of the viewer in a real browser; its data are tested in ``tests/app``."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Response, expect

from app.catalog import Catalog
from app.scored import first_view, listed, scored, times_100
from app.votes import COLUMNS, FILE
from bilora_diffusion.run.runlog import RunLog
from eval import table
from tests.app.folders import make_scores
from tests.browser.conftest import SEEDS, TEXTS, fits, free_port, go, pick, serving

pytestmark = pytest.mark.slow

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
"""Visible text whose contrast with its background is below WCAG's 4.5."""
LINES = """(cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
}"""
"""Lines of text in a cell."""
NAMELESS = """() => [...document.querySelectorAll("a, button, input, textarea, [role=button]")]
  .filter((element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
  .filter((element) => ![
    element.ariaLabel, element.alt, element.title, element.textContent,
    element.querySelector("img")?.alt,
    ...[...(element.labels || [])].map((label) => label.textContent),
  ].some((name) => name && name.trim()))
  .map((element) => element.outerHTML.slice(0, 200))"""
"""Visible controls without a name for a screen reader."""
FILLED = {
    "Compare": "#compare-cards figure.card img",
    "Generate": "#generate-a input",
    "Vote": "#vote-start",
    "Training": "#training-loss svg.marks",
    "Results": "#results-result input",
}
"""A part that is there when a tab has been filled."""
CARD = "#compare-cards figure.card"
DRAWN = 600_000
"""Milliseconds that two small images may take on a machine with other work."""
LABELS = ("quagga-run", "zebra-run")
"""Words that stand nowhere else in the page."""
LISTEN = """
window.heard = [];
const ask = window.fetch;
window.fetch = async (...request) => {
    const answer = await ask(...request);
    const reader = answer.clone().body?.pipeThrough(new TextDecoderStream()).getReader();
    const listen = async () => {
        for (let part = await reader.read(); !part.done; part = await reader.read())
            window.heard.push(part.value);
    };
    if (reader) listen().catch(() => {});
    return answer;
};
"""
"""Keeps the server's answers, its streams of events too, which the browser itself forgets."""


def test_every_tab_is_in_the_address_readable_fits_and_asks_nothing_of_others(viewer, visit):
    for dark in (False, True):
        page, console, asked = visit(phone=dark, dark=dark), [], []
        answers: list[Response] = []
        page.on("console", lambda message, console=console: console.append(message.text))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("response", lambda answer, answers=answers: answers.append(answer))
        go(page, viewer.url)
        for tab, there in FILLED.items():
            page.get_by_role("tab", name=tab).click()
            expect(page.locator(there).first).to_be_visible()
            if tab == "Results":
                pick(page, "results-result", "Landscape: landscape")
                expect(page.locator("#results-figures img")).to_have_count(1)
                table = page.locator("#results-report table")
                expect(table).to_contain_text("very wide")
                lines = table.locator("th").last.evaluate(LINES)
                assert lines == 1, "a table scrolls and its words are not broken"
            assert page.evaluate(NAMELESS) == [], tab
            assert fits(page), tab
            assert page.evaluate(CONTRAST) == [], tab
            expect(page.get_by_test_id("toast-body")).to_have_count(0)
        ink = page.locator("#frame-title h1").evaluate("element => getComputedStyle(element).color")
        assert (sum(int(part) for part in ink[4:-1].split(",")) > 3 * 128) == dark, ink
        own = ("data:", "blob:", viewer.url)
        assert [address for address in asked if not address.startswith(own)] == []
        assert len(asked) > 10
        expect(page).to_have_url(re.compile("tab=results"))
        page.go_back()
        expect(page.locator("#frame-tabs [role=tab][aria-selected=true]")).to_have_text("Training")
        closed = [answer.url for answer in answers if not answer.ok]
        assert closed == [], "no route that the page needs is closed"
        assert [text for text in console if "Content Security Policy" in text] == []


def test_scores_are_compared_by_mouse_keyboard_and_link(viewer, visit):
    page = go(visit(), viewer.url)
    subjects = page.locator("#validation-images section.subject")
    expect(subjects).to_have_count(6)
    names = ["base model", "lora (LoRA, seed 0)", "bilora (Bi-LoRA, seed 0)"]
    expect(subjects.first.locator("figcaption")).to_have_text(names)
    result = scored(table.read(viewer.root / "scores"))
    view = first_view("scores", result)
    cards, place = page.locator(CARD), page.locator("#compare-place")
    expect(cards.locator(".name")).to_have_text(["Alora", "Bbilora", "ground truth"])
    image = result.images["lora", listed(view, result)[0].text, 0]
    score = cards.first.locator("tr", has_text="CLIP I2T").locator("td")
    expect(score).to_have_text(times_100(image.scores["i2t"]))
    shutil.copytree(viewer.root / "scores", viewer.root.parent / "aside")
    (viewer.root.parent / "aside").rename(viewer.root / "scores-again")
    expect(page.locator("#compare-scores")).to_be_visible()  # comes while the page is open

    page.locator("#compare-next").click()
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(place).to_have_text("2 of 4")
    pick(page, "compare-order", "Largest loss first")
    first = listed(replace(view, order="loss"), result)[0].name
    expect(page.locator("#compare-list button.prompt").first).to_contain_text(first)
    pick(page, "compare-seed", "1")
    words = page.locator("#compare-words textarea, #compare-words input")
    words.click()
    page.keyboard.type("jk")  # a field keeps its keys
    expect(page.locator("#compare-list")).to_contain_text("No prompt contains these words")
    words.fill("")
    page.locator("#compare-list button.prompt", has_text="frog").click()
    expect(page.locator("#compare-prompt")).to_contain_text("frog")

    handle, clip = (page.locator(f"#compare-slider {part}") for part in ("input", "img.over"))
    handle.focus()
    page.keyboard.press("ArrowRight")
    shape = clip.evaluate("image => getComputedStyle(image).clipPath")
    assert float(re.findall(r"([0-9.]+)%", shape)[-1]) == 51
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
    sources = [
        picture.get_attribute("src") or "" for picture in page.locator(f"{CARD} > img").all()
    ]
    assert len(set(sources)) == 3
    for at, source in enumerate(sources):
        expect(other.locator(f"{CARD} > img").nth(at)).to_have_attribute("src", source)


def test_images_are_generated_and_work_ends_when_it_is_cancelled_or_its_page_is_closed(
    viewer, visit
):
    first, second = (go(visit(one, one), viewer.url, "Generate") for one in (False, True))

    def begin(page, steps):
        expect(page.locator("#generate-b input")).to_have_value("bilora (Bi-LoRA, seed 0)")
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
    begin(second, 2)  # waits its turn, which comes when the first has gone
    first.close()
    expect(second.locator("#generate-status")).to_contain_text("Done.", timeout=DRAWN)
    expect(second.locator("#generate-slider img")).to_have_count(2)
    pictures = second.locator("#generate-cards figure.card > img").all()
    assert len({picture.get_attribute("src") for picture in pictures}) == 2
    runs = {run.path: run for run in Catalog(viewer.root).now.runs}
    expect(second.locator("#generate-prompt textarea")).to_have_value(runs["lora"].first_prompt)
    field = second.locator("#generate-steps input")
    field.fill("100000")
    field.blur()
    second.locator("#generate-go").click()
    toast = second.get_by_test_id("toast-body")
    expect(toast).to_contain_text("the number of steps is 100000")
    expect(second.locator("#generate-status")).not_to_contain_text("Done.")
    expect(second.locator("#generate-cards img, #generate-slider img")).to_have_count(0)

    second.get_by_role("tab", name="Compare").click()
    expect(toast).to_have_count(0)
    second.locator("#grid > button").click()
    strengths = second.locator("#grid-strengths").get_by_role("textbox")
    strengths.fill("0.5, 1")
    strengths.blur()
    second.locator("#grid-go").click()
    grid = second.locator("#grid-images img")
    expect(grid).to_have_count(2, timeout=DRAWN)
    assert fits(second)
    assert second.evaluate(CONTRAST) == []
    grid.first.focus()
    second.keyboard.press("Enter")
    second.keyboard.press("ArrowRight")
    expect(second.locator("dialog#zoom p")).to_have_text("step 2, strength 1")


@pytest.fixture(scope="module")
def small(tmp_path_factory, start):
    """A viewer of scores of two adapters alone."""
    root = tmp_path_factory.mktemp("small")
    make_scores(root / "scores", LABELS, TEXTS, SEEDS)
    return start(root)


def test_curves_follow_a_run(small, visit):
    logs = {method: RunLog(small.root / method, "cpu") for method in ("lora", "bilora")}

    def train(method, first, last):
        for at in range(first, last + 1):
            norms = {"auxiliary_norm_before": 0.06 + 0.2 / at, "auxiliary_norm": 0.05}
            more = norms if method == "bilora" else {}
            logs[method].metric(at, loss=0.1 + 1 / at, lr=1e-3 / at, seconds=0.05, **more)
        logs[method].sync()

    for method, log in logs.items():
        config = {"pretrained_model_name_or_path": "mini", "rho": 0.05, "max_train_steps": 400}
        log.start(config, method=method, seed=0, resume_step=None)
        log.doing("training")
        train(method, 1, 100)
    page = go(visit(), small.url, "Training")
    card = page.locator("#training-cards li").filter(has_text="Bi-LoRA, seed 0")
    expect(card).to_contain_text("100 of 400 steps")
    for chart, count in {"loss": 4, "loss-difference": 2, "norm": 3, "rate": 2}.items():
        expect(page.locator(f"#training-{chart} .mark-line path")).to_have_count(count)
    loss = page.locator("#training-loss .mark-line path").last
    before = loss.get_attribute("d") or ""
    train("bilora", 101, 200)
    expect(card).to_contain_text("200 of 400 steps")
    expect(loss).not_to_have_attribute("d", before)
    page.locator("#training-norm svg.marks").hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("Bi-LoRA, seed 0")
    logs["bilora"].close("failed", "the loss at step 201 is not finite: lower --learning_rate")
    expect(card).to_contain_text("the loss at step 201 is not finite")


def test_votes_are_blind_kept_and_exported_and_a_session_goes_on(small, visit):
    page, pairs = visit(phone=True), len(TEXTS) * len(SEEDS)
    page.add_init_script(LISTEN)
    booth, keys = page.locator("#vote-booth"), {"1": "left", "2": "right", "0": "tie"}

    def heard():
        return "".join(page.evaluate("window.heard"))

    (small.root / FILE).mkdir()
    go(page, small.url, "Vote")
    pick(page, "vote-pair", " and ".join(LABELS))
    page.locator("#vote-start").click()
    expect(page.locator("#vote-notice")).to_contain_text("votes.db can't be used")
    (small.root / FILE).rmdir()
    count, before = 0, -1
    while not count or count != before:  # the names for the lists of all tabs come before a ballot
        page.wait_for_timeout(4000)
        count, before = sum(heard().count(word) for word in LABELS), count
    page.evaluate("window.heard = []")
    page.locator("#vote-start").click()
    tops = [
        page.locator(f"#vote-image-{side}").evaluate("image => image.getBoundingClientRect().top")
        for side in ("left", "right")
    ]
    assert tops[0] == tops[1], "side by side"
    assert fits(page)
    votes = ("1", "left", "0", "right", "2", "tie")
    for number, how in enumerate(votes):
        expect(booth.locator("#vote-standing")).to_contain_text(f"{number} of {pairs}")
        ballot = booth.locator("[data-ballot]").get_attribute("data-ballot")
        if how in keys:
            page.keyboard.press(how)
        else:
            page.locator(f"#vote-{how}").click()
        expect(page.locator(f"[data-ballot='{ballot}']")).to_have_count(0)
    text = heard()
    assert text.count("data:image/webp;base64,") >= 2 * len(votes), "the ballots were read"
    assert not [word for word in LABELS if word in text]

    go(page, small.url, "Vote")  # the same browser goes on
    page.locator("#vote-start").click()
    expect(booth.locator("#vote-standing")).to_contain_text(f"{len(votes)} of {pairs}")
    page.evaluate(
        "for (const side of ['left', 'right', 'left'])"
        " document.getElementById(`vote-${side}`).click();"
    )
    expect(booth.locator("#vote-standing")).to_contain_text(f"{len(votes) + 1} of {pairs}")
    page.locator("#vote-show").click()
    expect(page.locator("#vote-result")).to_contain_text(f"{LABELS[0]} over {LABELS[1]}")
    page.locator("#vote-tie").click()
    expect(booth.locator("#vote-standing")).to_contain_text(f"All {pairs} pairs voted on")
    expect(page.locator("#vote-result")).to_be_hidden()  # it would tell which side has just won
    with page.expect_download() as download:
        page.locator("#vote-export").click()
    with Path(download.value.path()).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["choice"] for row in rows[: len(votes)]] == [keys.get(how, how) for how in votes]
    assert len({(row["prompt"], row["seed"]) for row in rows}) == len(rows) == pairs


def test_a_page_loads_again_by_itself_when_its_server_was_started_again(tmp_path, visit):
    port, page = free_port(), visit()
    with serving(tmp_path, tmp_path / "first.log", port) as viewer:
        go(page, viewer.url, "Vote")
        page.evaluate("window.isOld = true")
    with serving(tmp_path, tmp_path / "second.log", port):
        page.wait_for_function("window.isOld === undefined")
        expect(page.locator("#frame-tabs [role=tab][aria-selected=true]")).to_have_text("Vote")
