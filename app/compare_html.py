"""The Compare tab's own HTML: the list of prompts and the facts below pictures. Strings only."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eval.clip_scores.names import METRICS

from .compare_data import PromptRow, times_100
from .scored import Scored, ScoredImage


def prompt_list(listed: Sequence[PromptRow], chosen: str, a: str, b: str) -> str:
    """The prompts with their scores; a row is a button that carries its position."""
    if not listed:
        return '<p class="quiet">No prompt contains these words.</p>'
    rows = "".join(_row(row, row.text == chosen) for row in listed)
    return (
        '<div class="prompts-head"><span>Prompt</span>'
        f'<span title="{escape(a)}">A</span><span title="{escape(b)}">B</span><span>B − A</span>'
        f'</div><div class="prompts">{rows}</div>'
    )


def _row(row: PromptRow, chosen: bool) -> str:
    change = "–" if row.change is None else f"{100 * row.change:+.2f}"
    current = ' aria-current="true"' if chosen else ""
    return (
        f'<button type="button" class="prompt" data-prompt="{row.at}"{current}>'
        f'<span title="{escape(row.text)}">{escape(row.name)}</span><span>{times_100(row.a)}</span>'
        f'<span>{times_100(row.b)}</span><span class="{row.tone}">{change}</span></button>'
    )


def facts(result: Scored, image: ScoredImage, nearest: str | None) -> str:
    """Scores and caption of an image as HTML.

    Args:
        nearest: ``data:`` address of the training picture most like it.
    """
    rows = ""
    for name, value in image.scores.items():
        about = METRICS[name]
        head = f'<th title="{escape(about.explanation)}">{about.title}</th>'
        rows += f"<tr>{head}<td>{times_100(value)}</td></tr>"
    text = f'<table class="scores">{rows}</table>'
    text += f'<p class="quiet">by {escape(result.settings.scorer.name)}</p>'
    if image.caption:
        text += f'<p class="caption">“{escape(image.caption)}”</p>'
    if image.nearest_image:
        thumbnail = f'<img src="{nearest}" alt="">' if nearest else ""
        text += (
            f'<div class="nearest">{thumbnail}<span>nearest training image<br>'
            f"{escape(image.nearest_image)} · {times_100(image.scores.get('nearest'))}</span></div>"
        )
    return text


def legend(result: Scored) -> str:
    """The models that gave the scores, as HTML."""
    scorer, captioner = result.settings.scorer, result.settings.captioner
    captions = f" Captions by {escape(captioner.name)}." if captioner else ""
    notes = "".join(f" {escape(model.note)}" for model in (scorer, captioner) if model)
    return (
        f'<p class="quiet legend">Scores are cosines × 100 by {escape(scorer.name)}.{captions}'
        " A difference is green or red where its 95 % interval over the seeds leaves out zero."
        f" Means over the prompts are in the tab Results.{notes}</p>"
    )
