"""An empty root, a landscape that comes while the page is open, a lost figure, text scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from playwright.sync_api import Page, expect

from eval import table
from eval.table import Result
from tests.browser.conftest import Viewer, fits, go, pick

pytestmark = pytest.mark.slow

FIGURES = ("landscape_directions.png", "landscape_plane.png")
COMMANDS = {
    "Compare": "python -m bilora_diffusion.demo --output_dir {0}",
    "Generate": "python -m bilora_diffusion.demo --output_dir {0}",
    "Vote": "python -m eval.clip_scores {0}/lora {0}/bilora",
    "Training": "accelerate launch train_dreambooth_bilora.py",
    "Results": "python -m eval.landscape {0}/lora {0}/bilora",
}
"""What each tab says of an empty root."""
REPORT = """# Loss landscape

![the plane](landscape_plane.png)
![elsewhere](http://example.com/pixel.png)

| run | SAM sharpness | top eigenvalue |
| --- | ---: | ---: |
| lora | 0.12 | 3.4 |

<script>window.ranReport = true</script>
"""


def make_landscape(folder: Path) -> None:
    """A result as ``python -m eval.landscape`` leaves it."""
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir()
    for number, name in enumerate(FIGURES, start=1):
        figure = Figure(figsize=(6, 4))
        axes = figure.add_subplot(title=f"Loss landscape {number}")
        along = [at / 20 for at in range(-20, 21)]
        axes.plot(along, [number * at * at for at in along], label="lora")
        axes.legend()
        figure.savefig(folder / name)
    table.write(Result("landscape", figures=list(FIGURES)), folder, REPORT)


def test_figures_and_report_come_while_the_page_is_open_and_a_lost_figure_is_named(
    tmp_path: Path,
    start: Callable[[Path], Viewer],
    visit: Callable[..., Page],
    shot: Callable[[Page, str], Path],
) -> None:
    studio, page = start(tmp_path), visit()
    go(page, studio.url)
    for tab, command in COMMANDS.items():
        page.get_by_role("tab", name=tab).click()
        notice = page.locator(f"#tab-{tab.lower()} section.empty")
        expect(notice).to_contain_text(command.format(tmp_path))
    assert list(tmp_path.iterdir()) == []
    make_landscape(studio.root / "landscape")
    images = page.locator("#results-figures img")
    expect(images).to_have_count(2)
    for place, name in enumerate(("landscape directions", "landscape plane")):
        expect(images.nth(place)).to_have_attribute("alt", name)
        page.wait_for_function(
            "place => document.querySelectorAll('#results-figures img')[place].naturalWidth > 0",
            arg=place,
        )
        size = images.nth(place).evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert size == [600, 400], "as it is in the file"
    report = page.locator("#results-report")
    expect(report).to_contain_text("SAM sharpness")
    expect(report.locator("table")).to_be_visible()
    assert report.locator("img").count() == 0
    assert not page.evaluate("Boolean(window.ranReport)")
    shot(page, "results-figures")

    (studio.root / "landscape" / FIGURES[1]).write_bytes(b"no picture")
    wide = "| a | " + "very wide " * 30 + "|\n| --- | --- |\n| gsm8k | 12.5 |\n"
    other = studio.root / "text_scores"
    other.mkdir()
    table.write(Result("text_scores"), other, "# Scores of texts\n\n" + wide)
    page = go(visit(phone=True, dark=True), studio.url, "Results")
    expect(page.locator("#results-figures img")).to_have_count(1)
    expect(page.locator("#results-report")).to_contain_text("landscape_plane.png can't be read")
    assert fits(page)
    shot(page, "results-figures-phone-dark")
    pick(page, "results-result", "Text scores: text_scores")
    expect(page.locator("#results-report")).to_contain_text("gsm8k")
    assert fits(page), "a wide table too"
