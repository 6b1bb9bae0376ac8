"""One damaged or hostile folder takes nothing else from any tab."""

from types import SimpleNamespace

import gradio as gr
import orjson
import pytest

from app import compare, generate, page, results, scored, training, validation, vote
from app.catalog import Catalog
from app.generate import Work
from app.grid import Grid
from app.votes import ANY_PAIR
from tests.app.hostile import HOSTILE, make_good

pytestmark = pytest.mark.timeout(60)  # a pipe keeps its reader waiting


class Tabs:
    """The tabs of a viewer of good folders, which takes others in between."""

    def __init__(self, root):
        self.catalog = Catalog(root)
        with gr.Blocks() as page:
            changed = gr.State().change
            self.compare = compare.Tab(self.catalog, changed)
            self.drawing = Work(self.catalog, page, "cpu")
            self.grid = Grid(self.drawing, changed)
            self.generate = generate.Tab(self.drawing, changed)
            self.vote = vote.Tab(self.catalog, changed)
            self.training = training.Tab(self.catalog, changed)

    def contents(self):
        """The contents of each when it is opened and everything in it is chosen once."""
        scan, runs = self.catalog.scan, validation.with_images(self.catalog)
        steps = validation.common_steps(runs)
        images = [validation.table(self.catalog, runs, step) for step in steps]
        scores = [self.compare.open(SimpleNamespace(query_params={}))]  # pyright: ignore
        votes = [self.vote._load(None, None)]
        for item in scan.scores:
            first = scored.first_view(item.path, item.result)
            scores += [self.compare._opened({"scores": item.path})]
            scores += [self.compare.step(1, *vars(first).values())]
            votes += [
                {0: self.vote.votes.pairs(item.path)},
                self.vote._begin(item.path, ANY_PAIR, ""),
            ]
        paths = [run.path for run in scan.runs]
        good = [path for path in paths if path.startswith("good/")]
        starts = range(0, len(paths), 6)
        draws = [self.training._draw([*good, *paths[start : start + 6]], 5) for start in starts]
        cards = [draw.pop(self.training.cards) + draw.pop(self.training.legend) for draw in draws]
        figures = [len(results.pictures(self.catalog, item)[0]) for item in scan.figures]
        return {
            "page": event_json([page.title(self.catalog), page.notices(self.catalog)]),
            "images": event_json(images),
            "cards": event_json(cards),
            "curves": event_json(to_json(update) for draw in draws for update in draw.values()),
            "Compare": event_json(value for update in scores for value in update.values()),
            "Generate": event_json(self.generate.choices("", "")),
            "Vote": event_json(value for update in votes for value in update.values()),
            "Training": event_json(self.training._load(None).values()),
            "Results": event_json(
                f"{item.path} {n}" for item, n in zip(scan.figures, figures, strict=True)
            ),
            "reports": event_json(results.text(self.catalog, item) for item in scan.figures),
        }


def to_json(update):
    """An update with what Gradio makes of its table."""
    return update.to_json(orient="split") if hasattr(update, "to_json") else update


def event_json(values):
    """An event's values for the browser, as Gradio writes them."""
    return orjson.dumps(list(values), default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def test_damaged_and_hostile_folders_take_nothing_else_from_any_tab(tmp_path, monkeypatch):
    monkeypatch.setattr(gr, "Warning", print)
    make_good(tmp_path)
    for number, damage in enumerate(HOSTILE.values()):
        damage(tmp_path / f"{number:02}")  # before the good ones in every list
    contents = Tabs(tmp_path).contents()
    for tab in ("Generate", "Training"):
        assert all(f"good/{name}" in contents[tab] for name in ("lora", "bilora")), tab
    for tab in ("Compare", "Vote"):
        assert "good/scores" in contents[tab]
    assert "good/landscape 1" in contents["Results"]
    for tab in ("images", "Compare", "Vote"):
        assert contents[tab].count("data:image/webp") >= 2, tab
    for part in ("cards", "curves"):
        assert all(f"{name}, seed 0" in contents[part] for name in ("LoRA", "Bi-LoRA")), part
    for tab in ("page", "images", "cards"):  # the others' texts are no HTML
        assert "<script" not in contents[tab], tab
    assert "<" not in contents["reports"], "Markdown passes HTML on"
    assert not [part for part, text in contents.items() if "rm -rf" in text], "a command to copy"
    assert not [part for part, text in contents.items() if str(tmp_path) in text], (
        "no place is told"
    )
