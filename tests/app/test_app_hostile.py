"""All tabs of the viewer, with damaged and hostile folders."""

import re
from types import SimpleNamespace
from typing import Any

import gradio as gr
import orjson
import pytest

from app import compare, generate, page, results, scores, training, validation
from app.catalog import Catalog
from app.generate import Work
from tests.app.hostile import HOSTILE, LAST_LINE, make_good

pytestmark = pytest.mark.timeout(60)  # reading a pipe blocks


class Tabs:
    """The tabs of a viewer."""

    def __init__(self, root):
        self.catalog = Catalog(root)
        with gr.Blocks() as blocks:
            changed = gr.State().change
            self.compare = compare.Tab(self.catalog, changed)
            self.generate = generate.Tab(Work(self.catalog, blocks, "cpu"), changed)
            self.training = training.Tab(self.catalog, changed)

    def contents(self):
        """Open each tab and make each choice; return part -> data that the browser gets."""
        values = {
            "page": [page.heading_html(self.catalog), page.broken_html(self.catalog)],
            "images": [],
            "Generate": list(self.generate.fill("", "")),
            "Training": list(self.training._fill(None).values()),
            "Compare": self._scores(),
            **self._curves(),
            "Results": [],
            "reports": [],
        }
        runs = validation.runs_with_images(self.catalog)
        for step in validation.all_steps(runs):
            values["images"].append(validation.images_html(self.catalog, runs, step))
        for item in self.catalog.scan.results:
            figures = results.figures_html(self.catalog, item)
            values["Results"].append(f"{item.path} {figures.count('<img')}")
            values["reports"].append(results.read_report(self.catalog, item))
        return {part: event_json(part_values) for part, part_values in values.items()}

    def _scores(self):
        """Return the data of the tab Compare with each folder of scores."""
        request: Any = SimpleNamespace(query_params={})
        compared = list(self.compare.open(request).values())
        for item in self.catalog.scan.scores:
            first = scores.first_view(item.path, item.result)
            compared += self.compare._fill({"scores": item.path}).values()
            compared += self.compare.step(1, *vars(first).values()).values()
        return compared

    def _curves(self):
        """Return the data of the tab Training: the good runs with six other runs at a time."""
        paths = [run.path for run in self.catalog.scan.runs]
        good_paths = [path for path in paths if path.startswith("good/")]
        cards, curves = [], []
        for start in range(0, len(paths), 6):
            update = self.training._draw(good_paths + paths[start : start + 6], 5)
            cards += [update.pop(self.training.cards), update.pop(self.training.legend)]
            for value in update.values():
                if hasattr(value, "to_json"):
                    value = value.to_json(orient="split")  # as Gradio writes a table
                curves.append(value)
        return {"cards": cards, "curves": curves}


def event_json(values):
    """Return an event's values as Gradio sends them to the browser."""
    return orjson.dumps(values, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


@pytest.mark.slow
def test_tabs_show_the_good_folders_next_to_damaged_and_hostile_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(gr, "Warning", print)
    make_good(tmp_path)
    for number, damage in enumerate(HOSTILE.values()):
        damage(tmp_path / f"{number:02}")  # before the good folders in each list
    # Each tab shows the good folders.
    contents = Tabs(tmp_path).contents()
    for tab in ("Generate", "Training"):
        assert "good/lora" in contents[tab]
        assert "good/bilora" in contents[tab]
    assert "good/scores" in contents["Compare"]
    assert "good/landscape 1" in contents["Results"]
    for tab in ("images", "Compare"):
        assert contents[tab].count("data:image/webp") >= 2, tab
    for part in ("cards", "curves"):
        assert "(LoRA, seed 0" in contents[part]
        assert "(Bi-LoRA, seed 0" in contents[part]
    # Nothing from the hostile folders is executed.
    for part in ("page", "images", "cards"):  # the other parts are not HTML
        assert "<script" not in contents[part], part
    assert "<" not in contents["reports"], "reports must not contain HTML"
    # Thousands of nested levels would exhaust the browser's stack.
    assert LAST_LINE in contents["reports"]
    assert not re.search(r"(> ?|- |1\. ){100}", contents["reports"])
    for part, text in contents.items():
        assert "rm -rf" not in text, f"{part} must not have a dangerous command to copy"
        assert str(tmp_path) not in text, f"{part} must not have the root's path"
