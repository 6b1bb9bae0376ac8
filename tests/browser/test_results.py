"""An empty root, and a landscape that comes while the page is open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from eval import table
from eval.table import Result
from tests.browser.conftest import Viewer, fits, go

pytestmark = pytest.mark.slow

FIGURE = "landscape_plane.png"
COMMANDS = {
    "Compare": "python -m bilora_diffusion.demo --output_dir {0}",
    "Vote": "python -m eval.clip_scores {0}/lora {0}/bilora",
    "Training": "accelerate launch train_dreambooth_bilora.py",
    "Results": "python -m eval.landscape {0}/lora {0}/bilora",
}
"""What tabs say of an empty root."""
REPORT = f"""# Loss landscape

![the plane]({FIGURE})
![elsewhere](http://example.com/pixel.png)

| run | SAM sharpness | {"very wide " * 30} |
| --- | ---: | ---: |
| lora | 0.12 | 3.4 |

<script>window.ranReport = true</script>
"""


def test_figures_and_report_come_while_the_page_is_open(
    tmp_path: Path, start: Callable[[Path], Viewer], visit: Callable[..., Page]
) -> None:
    studio, page = start(tmp_path), visit(phone=True)
    go(page, studio.url)
    for tab, command in COMMANDS.items():
        go(page, f"{studio.url}/?tab={tab.lower()}")
        notice = page.locator(f"#tab-{tab.lower()} section.empty")
        expect(notice).to_contain_text(command.format(tmp_path))
    folder = tmp_path / "landscape"
    folder.mkdir()
    Image.new("RGB", (600, 400), "teal").save(folder / FIGURE)
    table.write(Result("landscape", figures=[FIGURE]), folder, REPORT)
    image = page.locator("#results-figures img")
    expect(image).to_have_count(1)
    page.wait_for_function("document.querySelector('#results-figures img').naturalWidth === 600")
    report = page.locator("#results-report")
    expect(report.locator("table")).to_contain_text("SAM sharpness")
    assert report.locator("img").count() == 0
    assert not page.evaluate("Boolean(window.ranReport)")
    assert fits(page), "a wide table too"
