"""The tab "Vote": a blind choice between two images of different adapters.

Nothing that the browser gets tells the adapters apart: the images come without names and without
the parameters in their files, and the server keeps the adapters to itself. The result is shown on
request only, and hidden at the next vote, since it would tell which side has just won.
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
from eval.results.compare import win_rate_interval

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .votes import ANY_PAIR, Tally, VoterState, VoteStore, image_pairs

# Properties of events that run one after the other: two at once would each choose a pair, so that
# the page could have the token of one and the server that of the other.
ORDERED: dict[str, Any] = {**QUIET, "concurrency_id": "vote", "concurrency_limit": 1}


def _shows_errors(event: Callable[..., Update]) -> Callable[..., Update]:
    """An event of the tab whose error becomes its notice."""

    @functools.wraps(event)
    def event_or_notice(tab: Tab, *values: Any) -> Update:
        try:
            return {tab.notice: parts.notice(""), **event(tab, *values)}
        except (UserError, OSError) as error:
            text = escape(tab.catalog.without_root(error))
            return {tab.notice: parts.notice(f'<section class="broken"><b>{text}</b></section>')}

    return event_or_notice


class Tab:
    """The tab Vote: its widgets and their events.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of scores is filled.
    """

    def __init__(self, catalog: Catalog, changed: Any) -> None:
        self.catalog = catalog
        self.votes = VoteStore(catalog, random.SystemRandom())
        self.session = gr.BrowserState("", storage_key="bilora-voter", secret="bilora-voter")
        self.voter = gr.State(None)
        self.notice = parts.html("vote-notice", visible=False)
        # Before the vote: the choice of adapters.
        with gr.Column(visible=False, elem_id="vote-setup") as self.setup:
            with gr.Row():
                self.scores = gr.Dropdown([], label="Score folder", elem_id="vote-scores")
                self.pair = gr.Dropdown(
                    [("any pair", ANY_PAIR)], value=ANY_PAIR, label="Adapters", elem_id="vote-pair"
                )
            self.start = gr.Button("Start voting", variant="primary", elem_id="vote-start")
        # During the vote: two images, and three buttons.
        with gr.Column(visible=False, elem_id="vote-booth") as self.stage:
            self.images = parts.html("vote-ballot")
            with gr.Row() as self.choices:
                buttons = {}
                for name in ("left", "tie", "right"):
                    buttons[name] = gr.Button(
                        name.title(),
                        elem_id=f"vote-{name}",
                        variant="secondary" if name == "tie" else "primary",
                        min_width=80,
                    )
            self.standing = parts.html("vote-standing")
        # At any time: the result, and the file of votes.
        with gr.Row(visible=False) as self.small_buttons:
            small: dict[str, Any] = {"size": "sm", "min_width": 140}
            self.stop = gr.Button(
                "Choose other adapters", visible=False, elem_id="vote-stop", **small
            )
            show = gr.Button("Show the result so far", elem_id="vote-show", **small)
            export = gr.Button("Votes as CSV", elem_id="vote-export", **small)
        self.file = gr.DownloadButton("votes.csv", visible="hidden", elem_id="vote-file")
        self.result = parts.html("vote-result", visible=False)
        # The browser sends the token of the pair that it shows. So a second click, which arrives
        # when the next pair is chosen already, is not taken for a vote on that.
        self.token = gr.Textbox(visible=False)

        stage = [self.voter, self.session, self.setup, self.stage, self.stop, self.choices]
        stage += [self.notice, self.result, self.images, self.standing, self.token]
        setup = [self.notice, self.setup, self.small_buttons, self.scores]
        changed(self._load, [self.voter, self.scores], setup, **QUIET)
        self.scores.change(
            lambda path: gr.update(choices=self.votes.pairs(path), value=ANY_PAIR),
            [self.scores],
            [self.pair],
            **QUIET,
        )
        self.start.click(self._begin, [self.scores, self.pair, self.session], stage, **ORDERED)
        for choice, button in buttons.items():
            cast = functools.partial(self._cast, choice)
            button.click(cast, [self.token, self.voter], stage, **ORDERED)
        self.stop.click(self._end, [], stage, **ORDERED)
        show.click(self._report, [self.scores, self.pair], [self.result, self.notice], **QUIET)
        # The browser clicks on the hidden button as soon as the file is written.
        export.click(self._export, [], [self.file, self.notice], **QUIET).success(
            None, js="() => { document.getElementById('vote-file').click(); }"
        )

    def _load(self, voter: VoterState | None, chosen: str | None) -> Update:
        """Fill the list of scores; a choice stays."""
        items = []
        for item in self.catalog.scan.scores:
            if image_pairs(item.path, item.result):
                items.append(item)
        if not items:
            text = parts.empty(self.catalog, "Nothing to vote on yet", "vote")
            return {self.notice: parts.notice(text)}
        paths = [item.path for item in items]
        path = chosen if chosen in paths else paths[0]
        choices = [(item.name, item.path) for item in items]
        return {
            self.notice: parts.notice(""),
            self.setup: gr.update(visible=voter is None),
            self.small_buttons: gr.update(visible=True),
            self.scores: gr.update(choices=choices, value=path),
        }

    @_shows_errors
    def _begin(self, path: str | None, pair: str, session: str) -> Update:
        """Show the first pair of a session, or the next one of a session that goes on."""
        # The browser stores the session, so it may send anything.
        if not isinstance(session, str) or not re.fullmatch("[0-9a-f]{16}", session):
            session = secrets.token_hex(8)
        return {self.session: session, **self._voting(self.votes.open(path, pair, session))}

    @_shows_errors
    def _cast(self, choice: str, token: str, voter: VoterState | None) -> Update:
        """Store a vote and show the next pair."""
        # The voter is the server's state, to which the browser can't write.
        if voter is None or token != voter.token:
            return {self.notice: gr.skip()}
        return self._voting(self.votes.cast(voter, choice))

    def _end(self) -> Update:
        """Go back to the choice of adapters."""
        return {self.voter: None, **self._visibility(is_voting=False)}

    @_shows_errors
    def _report(self, path: str | None, pair: str) -> Update:
        """Show the result so far."""
        tallies, voters = self.votes.result(path, pair)
        return {self.result: parts.notice(table(tallies, voters))}

    @_shows_errors
    def _export(self) -> Update:
        """Write the votes to a file that Gradio serves."""
        return {self.file: str(self.votes.export(Path(self.file.GRADIO_CACHE)))}

    def _visibility(self, is_voting: bool) -> Update:
        """Show the pair or the choice of adapters, and hide the result."""
        return {
            self.setup: gr.update(visible=not is_voting),
            self.stage: gr.update(visible=is_voting),
            self.stop: gr.update(visible=is_voting),
            self.result: parts.notice(""),
        }

    def _voting(self, voter: VoterState) -> Update:
        """Show the pair of a voter."""
        return {
            self.voter: voter,
            **self._visibility(is_voting=True),
            self.choices: gr.update(visible=voter.pair is not None),
            self.images: pair_of(voter),
            self.standing: standing(voter),
            self.token: voter.token,
        }


def pair_of(voter: VoterState) -> str:
    """The pair of a voter as HTML; "" when all are done.

    Both images are in it as data, so that they and the prompt change at once: a vote before the
    second image has arrived would be about images of two pairs.
    """
    if voter.pair is None:
        return ""
    sides = ""
    for side, image in zip(("left", "right"), voter.images, strict=True):
        sides += f'<img id="vote-image-{side}" alt="{side} image" src="{image}">'
    return (
        f'<p data-ballot="{voter.token}">Which is the better image of</p>'
        f'<h2>{escape(voter.pair.prompt)}</h2><div class="ballot">{sides}</div>'
    )


def standing(voter: VoterState) -> str:
    """Progress of a voter, as HTML."""
    if voter.pair is None:
        return f"<p><b>All {voter.total} pairs voted on, thank you.</b></p>"
    progress = f"{voter.num_voted} of {voter.total} pairs voted on."
    return f"<p>{progress} Keys: 1 left, 0 tie, 2 right.</p>"


def table(tallies: Sequence[Tally], voters: int) -> str:
    """Win rates, as HTML."""
    if not tallies:
        return "<p>No votes yet.</p>"
    people = "1 voter" if voters == 1 else f"{voters} voters"
    body = ""
    for adapter, opponent, wins, ties, losses in tallies:
        percent = 100 * (wins + ties / 2) / (wins + ties + losses)
        rate = f"{percent:.0f} %"
        interval = win_rate_interval(wins, ties, losses)
        if interval is not None:
            rate += f" ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
        names = f"<b>{escape(adapter)}</b> over {escape(opponent)}"
        counts = f"{wins}, {ties}, {losses}"
        body += f"<tr><td>{names}</td><td>{counts}</td><td>{rate}</td></tr>"
    return (
        '<div class="scroll"><table class="tally"><thead><tr><th>Adapters</th>'
        f"<th>Won, tied, lost</th><th>Win rate</th></tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="quiet">Votes of {people}. A tie counts as half; in brackets is the 95 %'
        " interval.</p>"
    )
