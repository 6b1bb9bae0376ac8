"""The scored images in the tab Compare: side by side, and two of them under a slider.

The module `scores` computes the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from eval.clip_scores.reporting import METRICS

from . import parts
from . import scores as data
from .catalog import Catalog, ResultItem
from .parts import QUIET, Update
from .scores import PromptRow, ScoredImage, Scores, View, times_100

# Properties of events that run one at a time, so that the page ends up with the last choice
ORDERED: dict[str, Any] = {**QUIET, "concurrency_id": "compare", "concurrency_limit": 1}


class Tab:
    """The scored images: their widgets and their events.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of scores is filled.
    """

    def __init__(self, catalog: Catalog, changed: Any) -> None:
        self.catalog = catalog
        self.prompt = gr.State("")
        self.empty = parts.html(visible=False)
        with gr.Accordion("Scored images", visible=False, elem_id="compare-body") as self.body:
            self.answer = parts.html("compare-answer", visible=False)
            with gr.Row(equal_height=False):
                # Left: the form and the list of prompts
                with gr.Column(scale=2, min_width=300, elem_id="compare-choice"):
                    self.scores = _list("scores", "Scores")
                    with gr.Row():
                        self.a = _list("a", "A", min_width=120)
                        self.b = _list("b", "B", min_width=120)
                    self.also = _list("also", "Also show", multiselect=True)
                    with gr.Row():
                        self.seed = _list("seed", "Seed", min_width=90)
                        self.metric = _list("metric", "Score", min_width=120)
                    orders = [(text, key) for key, text in data.ORDERS.items()]
                    self.order = _list("order", "Order of the images", choices=orders)
                    self.words = gr.Textbox(
                        label="Filter", placeholder="words of the prompt", elem_id="compare-words"
                    )
                    pick = "bilora.pick(element, trigger, watch)"
                    self.list = parts.html("compare-list", js_on_load=pick)
                # Right: the view of one prompt
                with gr.Column(scale=5, min_width=300, elem_id="compare-view"):
                    with gr.Row(elem_id="compare-steps"):
                        previous = gr.Button("← Previous", elem_id="compare-previous", size="sm")
                        self.place = parts.html("compare-place")
                        following = gr.Button("Next →", elem_id="compare-next", size="sm")
                    self.title = parts.html("compare-prompt")
                    self.cards = parts.html("compare-cards")
                    with gr.Row(equal_height=False):
                        with gr.Column(min_width=300):
                            self.slider = parts.html("compare-slider")
                        with gr.Column(min_width=300):
                            self.legend = parts.html("compare-legend")
                            # The server writes the query of a view; the browser turns it into a
                            # link.
                            self.query = gr.Textbox(visible=False)
                            link = gr.Textbox(
                                label="Link to this view",
                                elem_id="compare-link",
                                interactive=False,
                                buttons=["copy"],
                                max_lines=1,
                            )

        # In the order of the fields of `View`, which is made from their values
        choice = [self.scores, self.a, self.b, self.also, self.prompt]
        choice += [self.seed, self.metric, self.order, self.words]
        view = [self.prompt, self.title, self.place, self.list, self.cards]
        view += [self.slider, self.legend, self.query]
        widgets = list(dict.fromkeys([self.empty, self.body, self.answer, *choice, *view]))
        changed(self.open, [], widgets, **ORDERED)
        # Other scores have other adapters, prompts and seeds, so all widgets are filled again.
        self.scores.input(
            lambda path: self._fill({"scores": path}), self.scores, widgets, **ORDERED
        )
        events = [self.words.change]
        # Only the user triggers the event `input`; filling the widgets also triggers `change`.
        for widget in (self.a, self.b, self.also, self.seed, self.metric, self.order):
            events.append(widget.input)
        gr.on(events, self.show, choice, view, trigger_mode="always_last", **ORDERED)
        self.list.select(self.pick, choice, view, **ORDERED)
        for button, offset in ((previous, -1), (following, 1)):
            step = partial(self.step, offset)
            button.click(step, choice, view, trigger_mode="multiple", **ORDERED)
        self.query.change(None, self.query, link, js="(query) => bilora.address(query)")

    def open(self, request: gr.Request) -> Update:
        """Fill the tab from the query in the page's address, set by a link or the last view."""
        return self._fill(dict(request.query_params))

    def _fill(self, query: dict[str, str]) -> Update:
        """Fill all widgets from a query, whose fields may be missing or wrong."""
        paths = {item.path for item in self.catalog.scan.scores}
        items = {}  # scores with images
        for item in self.catalog.scan.scores:
            if item.result.images:
                items[item.path] = item
        if not items:
            text = ""
            if parts.example_runs(self.catalog, "clip_scores"):
                text = parts.empty_notice(self.catalog, "No scored images yet", "clip_scores")
            return {self.empty: parts.notice(text), self.body: gr.update(visible=False)}
        path = query.get("scores")
        item = items.get(path or "") or next(iter(items.values()))
        if path and path not in items:
            fault = "have no images" if path in paths else "do not exist"
            parts.warn(f'The link refers to the scores "{path}", which {fault}.')
            query = {}
        view, faults = data.read_query(query, item.path, item.result)
        for sentence in faults:
            parts.warn(sentence)
        labels = item.result.labels
        metrics = [(METRICS[name].title, name) for name in data.measured_metrics(item.result)]
        if not metrics:
            # Gradio rejects any value of an empty list of choices.
            metrics = [("no image has a score", view.metric)]
        seeds = [(str(seed), seed) for seed in item.result.settings.seeds]
        folders = [(scores.name, scores.path) for scores in items.values()]
        return {
            self.empty: gr.update(visible=False),
            self.body: gr.update(visible=True, label=f"Scored images: {item.name}"),
            self.answer: parts.notice(answers_html(item.result)),
            self.scores: gr.update(choices=folders, value=view.scores, visible=len(items) > 1),
            self.a: gr.update(choices=labels, value=view.a),
            self.b: gr.update(choices=labels, value=view.b),
            self.also: gr.update(choices=labels, value=list(view.also), visible=len(labels) > 2),
            self.seed: gr.update(choices=seeds, value=view.seed),
            self.metric: gr.update(choices=metrics, value=view.metric),
            self.order: view.order,
            self.words: view.words,
            **self._update(view, item),
        }

    def show(self, *values: Any) -> Update:
        """Show the view that the user chose; do nothing before the widgets are filled."""
        if not values[0]:  # the path of the scores
            return {self.query: gr.skip()}
        view, item = self._view(*values)
        return self._update(view, item)

    def pick(self, event: gr.EventData, *values: Any) -> Update:
        """Show the prompt that the user clicked in the list."""
        view, item = self._view(*values)
        texts = item.result.texts
        number = event._data["prompt"]  # from the browser, which may send anything
        if not isinstance(number, int) or not 0 <= number < len(texts):
            raise gr.Error("There is no such prompt.")
        return self._update(replace(view, prompt=texts[number]), item)

    def step(self, offset: int, *values: Any) -> Update:
        """Show the next or the previous prompt of the list."""
        view, item = self._view(*values)
        prompt = data.find_neighbor(data.list_prompts(view, item.result), view.prompt, offset)
        return self._update(replace(view, prompt=prompt), item)

    def _view(self, *values: Any) -> tuple[View, ResultItem]:
        """Make a view from the widgets' values, and find its scores.

        Raises:
            gr.Error: the scores no longer exist, or lack the prompt or an adapter.
        """
        view = View(*values)
        for item in self.catalog.scan.scores:
            labels = item.result.labels
            has_pair = view.a in labels and view.b in labels
            if item.path == view.scores and view.prompt in item.result.texts and has_pair:
                also = tuple(label for label in view.also or () if label in labels)
                return replace(view, also=also, words=view.words or ""), item
        raise gr.Error("These scores were changed or deleted: load the page again.")

    def _update(self, view: View, item: ResultItem) -> Update:
        """Return the updates of the widgets that show a view."""
        rows = data.list_prompts(view, item.result)
        pictures: dict[str, Image.Image | None] = {}  # those of the pair first
        for label in (view.a, view.b, *view.also):
            if label not in pictures:
                pictures[label] = self._picture(item, view, label)
        place = "–"
        for number, row in enumerate(rows, start=1):
            if row.text == view.prompt:
                place = f"{number} of {len(rows)}"
        return {
            self.prompt: view.prompt,
            self.title: f"<h2>{escape(view.prompt)}</h2>",
            self.place: place,
            self.list: prompts_html(rows, view.prompt, view.a, view.b),
            self.cards: self._cards_html(item, view, pictures),
            self.slider: parts.slider_html((view.a, view.b), (pictures[view.a], pictures[view.b])),
            self.legend: legend_html(item.result),
            self.query: data.write_query(view),
        }

    def _picture(self, item: ResultItem, view: View, label: str) -> Image.Image | None:
        """Read an adapter's picture in a view; None if it is missing or unreadable."""
        image = item.result.images.get((label, view.prompt, view.seed))
        if image is None:
            return None
        try:
            return parts.read_picture(self.catalog.resolve(item.file(image.file)))
        except UserError as error:
            parts.warn(str(error))
            return None

    def _cards_html(
        self, item: ResultItem, view: View, pictures: dict[str, Image.Image | None]
    ) -> str:
        """Return the cards of a view's adapters and of the ground truth, as HTML."""
        cards = ""
        for label, picture in pictures.items():
            image = item.result.images.get((label, view.prompt, view.seed))
            text = ""
            if image is not None:
                nearest = self._nearest_uri(item, image.nearest_image)
                text = facts_html(item.result, image, nearest)
            role = {view.b: "B", view.a: "A"}.get(label, "")  # "A" if both are the same adapter
            uri = parts.data_uri(picture) if picture else None
            cards += parts.card_html(label, uri, role, "no image", text)
        reference = item.result.prompt(view.prompt).reference
        truth = None
        if reference is not None:
            truth = parts.file_uri_below_root(self.catalog, item.file(str(reference)))
        if truth:
            line = '<p class="quiet">the held-out picture of this prompt</p>'
            cards += parts.card_html("ground truth", truth, facts=line)
        return f'<div class="cards">{cards}</div>'

    def _nearest_uri(self, item: ResultItem, name: str | None) -> str | None:
        """Return the URI of the training picture nearest to an image; None if it is unavailable.

        It must be a file in the result's folder, or one of the miniature's training icons.
        """
        if not name:
            return None
        uri = parts.file_uri_below_root(self.catalog, item.file(name))
        if uri is None and name == Path(name).name:
            uri = parts.file_uri(mini.train_dir() / name)
        return uri


def _list(name: str, label: str, min_width: int = 160, **options: Any) -> gr.Dropdown:
    """Create a drop-down list of the form."""
    return gr.Dropdown(label=label, elem_id=f"compare-{name}", min_width=min_width, **options)


def prompts_html(prompt_rows: Sequence[PromptRow], prompt: str, a: str, b: str) -> str:
    """Return the prompts with their scores, as HTML; each row is a button.

    Args:
        prompt_rows: rows of the list.
        prompt: text of the chosen prompt.
        a: label of the first adapter.
        b: label of the second adapter.
    """
    if not prompt_rows:
        return '<p class="quiet">No prompt contains these words.</p>'
    rows = ""
    for row in prompt_rows:
        change = "–" if row.change is None else f"{100 * row.change:+.2f}"
        current = ' aria-current="true"' if row.text == prompt else ""
        rows += (
            f'<button type="button" class="prompt" data-prompt="{row.position}"{current}><span'
            f' title="{escape(row.text)}">{escape(row.name)}</span><span>{times_100(row.a)}</span>'
            f'<span>{times_100(row.b)}</span><span class="{row.tone}">{change}</span></button>'
        )
    return (
        '<div class="prompts-head"><span>Prompt</span>'
        f'<span title="{escape(a)}">A</span><span title="{escape(b)}">B</span><span>B − A</span>'
        f'</div><div class="prompts">{rows}</div>'
    )


def facts_html(scores: Scores, image: ScoredImage, nearest: str | None) -> str:
    """Return the scores and the caption of an image, as HTML.

    Args:
        scores: scores that include the image.
        image: an image of the scores.
        nearest: URI of the nearest training picture; None if it is unavailable.
    """
    rows = ""
    for name, value in image.scores.items():
        metric = METRICS[name]
        head = f'<th title="{escape(metric.explanation)}">{metric.title}</th>'
        rows += f"<tr>{head}<td>{times_100(value)}</td></tr>"
    text = f'<table class="scores">{rows}</table>'
    text += f'<p class="quiet">scorer: {escape(scores.settings.scorer.name)}</p>'
    if image.caption:
        text += f'<p class="caption">“{escape(image.caption)}”</p>'
    if image.nearest_image:
        thumbnail = f'<img src="{nearest}" alt="">' if nearest else ""
        text += (
            f'<div class="nearest">{thumbnail}<span>nearest training image<br>'
            f"{escape(image.nearest_image)} · {times_100(image.scores.get('nearest'))}</span></div>"
        )
    return text


def answers_html(scores: Scores) -> str:
    """Return the sentences on the best steps as HTML; "" unless checkpoints were scored."""
    sentences = [answer.sentence for answer in scores.settings.answers]
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def legend_html(scores: Scores) -> str:
    """Return an explanation of the scores and their models, as HTML."""
    scorer = scores.settings.scorer
    captioner = scores.settings.captioner
    captions = ""
    notes = scorer.note
    if captioner is not None:
        captions = f" Captions by {escape(captioner.name)}."
        # The miniature's captioner uses the scorer, so its note includes the scorer's note.
        is_included = scorer.note in captioner.note
        notes = captioner.note if is_included else f"{scorer.note} {captioner.note}"
    return (
        f'<p class="quiet legend">Scores are cosines × 100 by {escape(scorer.name)};'
        f" DINO scores are by DINOv2.{captions}"
        " A difference is green or red if its 95 % interval over the seeds excludes zero."
        f" The tab Results shows the means over the prompts. {escape(notes)}</p>"
    )
