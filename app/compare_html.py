"""The Compare tab's own HTML: the list of prompts and the cards. Strings only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from eval.clip_scores.names import METRICS

from . import pictures
from .compare_data import Row, best, comparison, times_100
from .scored import Scored, ScoredImage


@dataclass(frozen=True)
class Card:
    """A picture and what is known of it.

    Args:
        title: its adapter's label, or what it is.
        picture: ``data:`` address; None where there is none.
        image: its record, for scores and caption.
        nearest: ``data:`` address of the training picture that is most like it.
        role: "A" or "B" for the pair.
    """

    title: str
    picture: str | None
    image: ScoredImage | None = None
    nearest: str | None = None
    role: str = ""
    lines: list[str] = field(default_factory=list)


def heading(prompt: str) -> str:
    """The prompt whose images are shown."""
    return f"<h3>{escape(prompt)}</h3>"


def prompt_list(listed: Sequence[Row], chosen: int, metric: str, a: str, b: str) -> str:
    """The prompts with their scores; a row is a button that carries its position."""
    if not listed:
        return '<p class="quiet">No prompt contains these words.</p>'
    rows = "".join(_row(row, row.prompt == chosen, metric) for row in listed)
    return (
        '<div class="prompts-head"><span>Prompt</span>'
        f'<span title="{escape(a)}">A</span><span title="{escape(b)}">B</span><span>B − A</span>'
        f'</div><div class="prompts">{rows}</div>'
    )


def _row(row: Row, chosen: bool, metric: str) -> str:
    change = "–" if row.change is None else f"{100 * row.change:+.2f}"
    tone = _tone(metric, row.change, row.certain)
    current = ' aria-current="true"' if chosen else ""
    return (
        f'<button type="button" class="prompt" data-prompt="{row.prompt}"{current}>'
        f'<span title="{escape(row.text)}">{escape(row.name)}</span><span>{times_100(row.a)}</span>'
        f'<span>{times_100(row.b)}</span><span class="{tone}">{change}</span></button>'
    )


def _tone(metric: str, change: float | None, certain: bool) -> str:
    """Better, worse, or neither: what chance alone explains has no colour."""
    known = METRICS.get(metric)
    if change is None or not certain or known is None or known.higher_is_better is None:
        return "even"
    return "up" if (change > 0) == known.higher_is_better else "down"


def summary(result: Scored, a: int, b: int) -> str:
    """Each score's mean over the prompts, and the difference of the pair with its interval."""
    means = {(line.metric, line.group): line.mean for line in result.summaries}
    shown = [name for name in METRICS if any(metric == name for metric, _ in means)]
    if not shown:
        return ""
    labels = [adapter.label for adapter in result.adapters]
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    body = ""
    for name in shown:
        values = "".join(f"<td>{times_100(means.get((name, label)))}</td>" for label in labels)
        title = f'title="{escape(METRICS[name].explanation)}"'
        body += f"<tr><th {title}>{METRICS[name].title}</th>{values}"
        body += f"{_difference(result, a, b, name)}</tr>"
    return (
        '<div class="scroll"><table class="means"><thead><tr><th>mean over prompts</th>'
        f"{head}<th>{escape(labels[b])} − {escape(labels[a])}, 95 % interval</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _difference(result: Scored, a: int, b: int, metric: str) -> str:
    found, sign = comparison(result, a, b, metric), 1
    if found is None:
        found, sign = comparison(result, b, a, metric), -1
    if found is None or found.difference is None:
        return "<td>–</td>"
    text, certain = f"{100 * sign * found.difference:+.2f}", False
    if found.difference_interval is not None:
        low, high = sorted(sign * end for end in found.difference_interval)
        text += f" ({100 * low:+.2f} to {100 * high:+.2f})"
        certain = low > 0 or high < 0
    return f'<td class="{_tone(metric, sign * found.difference, certain)}">{text}</td>'


def cards(result: Scored, shown: Sequence[Card]) -> str:
    """The pictures side by side with their scores."""
    leaders = best([card.image for card in shown if card.image is not None])
    body = "".join(_card(result, card, leaders) for card in shown)
    return f'<div class="cards">{body}</div>{legend(result)}'


def _card(result: Scored, card: Card, leaders: dict[str, float]) -> str:
    role = f'<span class="role">{card.role}</span>' if card.role else ""
    picture = pictures.tag(card.picture, card.title) or '<div class="absent">no image</div>'
    text = f'<figure class="card"><div class="name">{role}{escape(card.title)}</div>{picture}'
    text += "".join(f'<p class="quiet">{escape(line)}</p>' for line in card.lines)
    return text + (_facts(result, card, leaders) if card.image else "") + "</figure>"


def _facts(result: Scored, card: Card, leaders: dict[str, float]) -> str:
    image = card.image
    assert image is not None
    rows = ""
    for name, value in image.scores.items():
        mark = ' class="best"' if leaders.get(name) == value else ""
        title = f'title="{escape(METRICS[name].explanation)}"'
        rows += f"<tr{mark}><th {title}>{METRICS[name].title}</th><td>{times_100(value)}</td></tr>"
    text = f'<table class="scores">{rows}</table>'
    text += f'<p class="quiet">by {escape(result.scorer.name)}</p>'
    if image.caption:
        text += f'<p class="caption">“{escape(image.caption)}”</p>'
    if image.nearest_image:
        thumbnail = f'<img src="{card.nearest}" alt="">' if card.nearest else ""
        text += (
            f'<div class="nearest">{thumbnail}<span>nearest training image<br>'
            f"{escape(image.nearest_image)} · {times_100(image.scores.get('nearest'))}</span></div>"
        )
    return text


def legend(result: Scored) -> str:
    """Whose scores these are."""
    text = f"Scores are cosines × 100 by {escape(result.scorer.name)}."
    if result.captioner is not None:
        text += f" Captions by {escape(result.captioner.name)}."
    text += (
        " A difference is green or red where its 95 % interval (over the seeds; in the table of"
        " means, over the prompts) leaves out zero."
    )
    for model in (result.scorer, result.captioner):
        if model is not None and model.note:
            text += f" {escape(model.note)}"
    return f'<p class="quiet legend">{text}</p>'
