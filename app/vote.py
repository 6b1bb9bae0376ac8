"""The tab "Vote": a choice of the better one of two images, blind to the adapters that made them.

Nothing that the browser gets tells the sides apart: the images come without names and without the
parameters in their files, and the adapters of a ballot stay on the server. The result is shown
on request only and put away at the next vote, since it would tell which side has just won.
"""

from __future__ import annotations

import functools
import random
import re
import secrets
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from eval.compare import win_rate_interval

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .votes import ANY_PAIR, Booth, Polls, Tally, ballots

ORDERED: dict[str, Any] = {**QUIET, "concurrency_id": "vote", "concurrency_limit": 1}


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog, changed: Any) -> None:
        self.catalog, self.polls = catalog, Polls(catalog, random.SystemRandom())
        self.voter = gr.BrowserState("", storage_key="bilora-voter", secret="bilora-voter")
        self.booth = gr.State(None)
        self.notice = parts.html("vote-notice", visible=False)
        with gr.Column(visible=False, elem_id="vote-setup") as self.setup:
            with gr.Row():
                self.scores = gr.Dropdown([], label="Score folder", elem_id="vote-scores")
                first = [("any pair", ANY_PAIR)]
                self.pair = gr.Dropdown(
                    first, value=ANY_PAIR, label="Adapters", elem_id="vote-pair"
                )
            self.start = gr.Button("Start voting", variant="primary", elem_id="vote-start")
        with gr.Column(visible=False, elem_id="vote-booth") as self.stage:
            self.ballot = parts.html("vote-ballot")
            with gr.Row() as self.choices:
                looks: dict[str, Any] = {"left": "primary", "tie": "secondary", "right": "primary"}
                buttons = {
                    name: gr.Button(
                        name.title(), elem_id=f"vote-{name}", variant=look, min_width=80
                    )
                    for name, look in looks.items()
                }
            self.standing = parts.html("vote-standing")
        with gr.Row(visible=False) as self.ballot_area:
            small: dict[str, Any] = {"size": "sm", "min_width": 140}
            hidden: dict[str, Any] = {"visible": False, "elem_id": "vote-stop", **small}
            self.stop = gr.Button("Choose other adapters", **hidden)
            show = gr.Button("Show the result so far", elem_id="vote-show", **small)
            export = gr.Button("Votes as CSV", elem_id="vote-export", **small)
        self.file = gr.DownloadButton("votes.csv", visible="hidden", elem_id="vote-file")
        self.result = parts.html("vote-result", visible=False)
        # The browser sends the token of the ballot that it shows, so that a second click on it that
        # is still on its way when the next one is drawn is not taken for a vote on the next. One
        # after the other: two at once would each draw a ballot, and leave the page with the token
        # of one and the server with the other.
        self.token = gr.Textbox(visible=False)

        stage = [self.booth, self.voter, self.setup, self.stage, self.stop, self.choices]
        stage += [self.notice, self.result, self.ballot, self.standing, self.token]
        setup = [self.notice, self.setup, self.ballot_area, self.scores]
        changed(self._load, [self.booth, self.scores], setup, **QUIET)
        self.scores.change(
            lambda path: gr.update(choices=self.polls.pairs(path), value=ANY_PAIR),
            *([self.scores], [self.pair]),
            **QUIET,
        )
        self.start.click(self._begin, [self.scores, self.pair, self.voter], stage, **ORDERED)
        for choice, button in buttons.items():
            cast = functools.partial(self._cast, choice)
            button.click(cast, [self.token, self.booth], stage, **ORDERED)
        self.stop.click(lambda: {self.booth: None, **self._stage(False)}, [], stage, **ORDERED)
        show.click(self._report, [self.scores, self.pair], [self.result, self.notice], **QUIET)
        export.click(self._export, [], [self.file, self.notice], **QUIET).success(
            None, js="() => { document.getElementById('vote-file').click(); }"
        )

    def _load(self, booth: Booth | None, chosen: str | None) -> Update:
        scores = self.catalog.scan.scores
        items = [item for item in scores if ballots(item.path, item.result)]
        if not items:
            text = parts.empty(self.catalog, "Nothing to vote on yet", "vote")
            return {self.notice: parts.notice(text)}
        paths = [item.path for item in items]
        return {
            self.notice: parts.notice(""),
            self.setup: gr.update(visible=booth is None),
            self.ballot_area: gr.update(visible=True),
            self.scores: gr.update(
                choices=[(item.name, item.path) for item in items],
                value=chosen if chosen in paths else paths[0],
            ),
        }

    def _begin(self, path: str | None, pair: str, voter: str) -> Update:
        # The browser keeps the voter's name, so what it sends may be anything.
        is_known = isinstance(voter, str) and re.fullmatch("[0-9a-f]{16}", voter)
        voter = voter if is_known else secrets.token_hex(8)
        return self._or_notice(
            lambda: {self.voter: voter, **self._voting(self.polls.open(path, pair, voter))}
        )

    def _cast(self, choice: str, token: str, booth: Booth | None) -> Update:
        # Whose vote it is says the booth, which the browser can't write to.
        if booth is None or token != booth.token:
            return {self.notice: gr.skip()}
        return self._or_notice(lambda: self._voting(self.polls.cast(booth, choice)))

    def _report(self, path: str | None, pair: str) -> Update:
        result = self.polls.result
        return self._or_notice(lambda: {self.result: parts.notice(table(*result(path, pair)))})

    def _export(self) -> Update:
        folder = Path(self.file.GRADIO_CACHE)
        return self._or_notice(lambda: {self.file: str(self.polls.export(folder))})

    def _or_notice(self, act: Callable[[], Update]) -> Update:
        try:
            return {self.notice: parts.notice(""), **act()}
        except (UserError, OSError) as error:
            text = escape(self.catalog.plain(error))
            return {self.notice: parts.notice(f'<section class="broken"><b>{text}</b></section>')}

    def _stage(self, voting: bool) -> Update:
        return {
            self.setup: gr.update(visible=not voting),
            **{part: gr.update(visible=voting) for part in (self.stage, self.stop)},
            self.result: parts.notice(""),
        }

    def _voting(self, booth: Booth) -> Update:
        return {
            self.booth: booth,
            **self._stage(True),
            self.choices: gr.update(visible=booth.ballot is not None),
            self.ballot: ballot(booth),
            self.standing: standing(booth),
            self.token: booth.token,
        }


def ballot(booth: Booth) -> str:
    """A ballot as HTML; "" when all are done. The images are in it, so that both sides and the
    prompt change at once: a vote while one was still on its way would be about two ballots.
    """
    if booth.ballot is None:
        return ""
    sides = "".join(
        f'<img id="vote-image-{side}" alt="{side} image" src="{image}">'
        for side, image in zip(("left", "right"), booth.images, strict=True)
    )
    return (
        f'<p data-ballot="{booth.token}">Which is the better image of</p>'
        f'<h2>{escape(booth.ballot.prompt)}</h2><div class="ballot">{sides}</div>'
    )


def standing(booth: Booth) -> str:
    """Progress of a voter, as HTML."""
    if booth.ballot is None:
        return f"<p><b>All {booth.total} pairs voted on, thank you.</b></p>"
    progress = f"{booth.num_voted} of {booth.total} pairs voted on."
    return f"<p>{progress} Keys: 1 left, 0 tie, 2 right.</p>"


def table(rows: Sequence[Tally], voters: int) -> str:
    """Win rates, as HTML."""
    if not rows:
        return "<p>No votes yet.</p>"
    people = "1 voter" if voters == 1 else f"{voters} voters"
    body = ""
    for adapter, opponent, *won in rows:
        rate = f"{100 * (won[0] + won[1] / 2) / sum(won):.0f} %"
        if (interval := win_rate_interval(*won)) is not None:
            rate += f" ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
        names = f"<b>{escape(adapter)}</b> over {escape(opponent)}"
        counts = ", ".join(map(str, won))
        body += f"<tr><td>{names}</td><td>{counts}</td><td>{rate}</td></tr>"
    return (
        '<div class="scroll"><table class="tally"><thead><tr><th>Adapters</th>'
        f"<th>Won, tied, lost</th><th>Win rate</th></tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="quiet">Votes of {people}. A tie counts as half; in brackets is the 95 %'
        " interval.</p>"
    )
