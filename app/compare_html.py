"""The Compare tab's own HTML: the list of prompts, the means and the cards. Strings only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from eval.clip_scores.names import METRICS

from . import parts
from .compare_data import PromptRow, times_100
from .scored import Scored, ScoredImage


@dataclass(frozen=True)
class Card:
    """A picture and what is known of it.

    Args:
        title: its adapter's label, or what it is.
        picture, nearest: ``data:`` addresses, of it and of the training picture most like it.
        image: its record, for scores and caption.
        role: "A" or "B" for the pair.
        line: a sentence about it.
    """

    title: str
    picture: str | None
    image: ScoredImage | None = None
    nearest: str | None = None
    role: str = ""
    line: str = ""


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


def _title(metric: str) -> str:
    known = METRICS[metric]
    return f'<th title="{escape(known.explanation)}">{known.title}</th>'


def cards(result: Scored, shown: Sequence[Card]) -> str:
    """The pictures side by side with their scores."""
    body = "".join(
        parts.card(card.title, card.picture, card.role, "no image", _facts(result, card))
        for card in shown
    )
    return f'<div class="cards">{body}</div>{_legend(result)}'


def _facts(result: Scored, card: Card) -> str:
    image, rows = card.image, ""
    if image is None:
        return f'<p class="quiet">{escape(card.line)}</p>' if card.line else ""
    for name, value in image.scores.items():
        rows += f"<tr>{_title(name)}<td>{times_100(value)}</td></tr>"
    text = f'<table class="scores">{rows}</table>'
    text += f'<p class="quiet">by {escape(result.settings.scorer.name)}</p>'
    if image.caption:
        text += f'<p class="caption">“{escape(image.caption)}”</p>'
    if image.nearest_image:
        thumbnail = f'<img src="{card.nearest}" alt="">' if card.nearest else ""
        text += (
            f'<div class="nearest">{thumbnail}<span>nearest training image<br>'
            f"{escape(image.nearest_image)} · {times_100(image.scores.get('nearest'))}</span></div>"
        )
    return text


def _legend(result: Scored) -> str:
    """Whose scores these are."""
    scorer, captioner = result.settings.scorer, result.settings.captioner
    captions = f" Captions by {escape(captioner.name)}." if captioner else ""
    notes = "".join(f" {escape(model.note)}" for model in (scorer, captioner) if model)
    return (
        f'<p class="quiet legend">Scores are cosines × 100 by {escape(scorer.name)}.{captions}'
        " A difference is green or red where its 95 % interval over the seeds leaves out zero."
        f" Means over the prompts are in the tab Results.{notes}</p>"
    )
