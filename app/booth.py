"""The work behind the tab "Vote": draws ballots from the score folders, keeps and counts votes.

No widgets here.
"""

from __future__ import annotations

import io
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from bilora_diffusion.errors import UserError

from .ballots import FILE, Votes, write_csv
from .catalog import Catalog, ScoresItem
from .voting import Ballot, Pairing, Tally, draw, pairings, tallies

ANY = ""
"""The value of "any pair"."""
SHOWN_PIXELS = 384
"""Smaller images are enlarged to about this size."""


@dataclass(frozen=True)
class Booth:
    """What one voter's page is at: the adapters to compare (None: any two) and the ballot shown."""

    scores: str
    labels: tuple[str, str] | None
    ballot: Ballot


class Polls:
    """Votes on the score folders of a root.

    Args:
        catalog: where the score folders are.
        rng: of pairs and sides.
    """

    def __init__(self, catalog: Catalog, rng: random.Random) -> None:
        self._catalog, self._rng = catalog, rng

    @property
    def votes(self) -> Votes:
        """The votes of this root.

        Raises:
            UserError: their file is a link out of the root.
        """
        return Votes(self._catalog.resolve(FILE))

    def items(self) -> list[ScoresItem]:
        """Score folders in which there is something to vote on."""
        return [item for item in self._catalog.scores() if pairings(item.path, item.result)]

    def pairs(self, path: str | None) -> list[tuple[str, str]]:
        """Names and values of the pairs of adapters of a score folder, "any pair" first."""
        labels = [entry.label for entry in self._item(path).result.adapters]
        two = [(f"{a} and {b}", json.dumps([a, b])) for a, b in combinations(labels, 2)]
        return [("any pair", ANY), *two]

    def open(self, path: str | None, pair: str, voter: str) -> Booth:
        """The first ballot of a voter.

        Args:
            path: of the score folder.
            pair: a value from :meth:`pairs`.

        Raises:
            UserError: votes can't be written, or there is nothing to vote on.
        """
        self.votes.check()
        return self._draw(self._item(path).path, _labels(pair), voter)

    def cast(self, booth: Booth, choice: str, voter: str) -> Booth:
        """Keep a vote and draw the next ballot.

        Args:
            choice: "left", "right" or "tie".

        Raises:
            UserError: the vote can't be written, or there is nothing more to vote on.
        """
        self.votes.add(booth.ballot, choice, voter)
        return self._draw(booth.scores, booth.labels, voter)

    def images(self, ballot: Ballot) -> tuple[bytes, bytes]:
        """The images of both sides as PNG files, with nothing in them but pixels.

        Raises:
            UserError: a file lies outside the root.
            OSError: a file can't be read.
        """
        item = self._item(ballot.scores)
        files = (ballot.file_left, ballot.file_right)
        left, right = (_pixels(self._catalog.resolve(item.file(file))) for file in files)
        return left, right

    def done(self, booth: Booth, voter: str) -> tuple[int, int]:
        """How many of the pairings the voter has voted on, and how many there are."""
        keys = {pairing.key for pairing in self._choices(booth.scores, booth.labels)}
        return len(keys & self.votes.seen(booth.scores, voter).keys()), len(keys)

    def result(self, path: str | None, pair: str) -> tuple[list[Tally], int]:
        """The counts of a score folder's votes, and by how many voters; of its present weights.

        Raises:
            UserError: votes can't be read.
        """
        choices = self._choices(self._item(path).path, _labels(pair))
        present = {contestant for pairing in choices for contestant in pairing.adapters}
        votes = self.votes.read(self._item(path).path)
        counted = [vote for vote in votes if {vote.left, vote.right} <= present]
        return tallies(counted), len({vote.session for vote in counted})

    def export(self, folder: Path) -> Path:
        """Write all votes of this root as ``votes.csv`` into a new folder below ``folder``.

        Raises:
            UserError: votes can't be read.
        """
        votes = self.votes.read()
        path = folder / secrets.token_hex(8) / "votes.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            write_csv(votes, file)
        return path

    def _item(self, path: str | None) -> ScoresItem:
        for item in self._catalog.scores():
            if item.path == path:
                return item
        raise UserError(f"there is no score folder {path!r} any more: choose another")

    def _choices(self, path: str, labels: tuple[str, str] | None) -> Sequence[Pairing]:
        return pairings(path, self._item(path).result, labels)

    def _draw(self, path: str, labels: tuple[str, str] | None, voter: str) -> Booth:
        choices = self._choices(path, labels)
        seen = self.votes.seen(path, voter)
        while choices:
            ballot = draw(choices, seen, self._rng)
            try:
                self.images(ballot)
                return Booth(path, labels, ballot)
            except (UserError, OSError):  # a missing image does not end the vote on the others
                gone = {ballot.file_left, ballot.file_right}
                choices = [pairing for pairing in choices if set(pairing.files) != gone]
        raise UserError(
            f"no two images of {path} can be read: choose others, or run python -m eval.clip_scores"
        )


def _labels(pair: str) -> tuple[str, str] | None:
    if pair == ANY:
        return None
    one, two = json.loads(pair)
    return one, two


def _pixels(path: Path) -> bytes:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = max(1, SHOWN_PIXELS // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    image.info = {}  # the text in the file names its adapter
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
