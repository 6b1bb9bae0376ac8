"""Blind voting: what may be shown, whose image goes to which side, and who is winning.

    polls = Polls(catalog, random.SystemRandom())
    booth = polls.open("scores", ANY, voter)
    booth = polls.cast(booth, "left")

Where votes are kept: ``ballots``. No widgets here.
"""

from __future__ import annotations

import io
import json
import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from PIL import Image

from bilora_diffusion.errors import UserError
from eval.compare import Interval, win_rate_interval

from . import parts
from .ballots import FILE, Ballot, Contestant, Vote, Votes, write_csv
from .catalog import Catalog, ScoresItem
from .scored import Scored

ANY = ""
"""The value of "any pair"."""
SHOWN_PIXELS = 384
"""Smaller images are enlarged to about this size."""


@dataclass(frozen=True)
class Tally:
    """Votes between two adapters, seen from the first.

    The rate counts a tie as half a win. The interval is of the share of wins among decided votes,
    since a tie is no coin toss: with ties the rate may lie outside it.
    """

    adapter: Contestant
    other: Contestant
    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """(wins + ties / 2) / votes."""
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)

    @property
    def decided_rate(self) -> float | None:
        """wins / (wins + losses); None while all votes are ties."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    @property
    def interval(self) -> Interval | None:
        """95 % interval of :attr:`decided_rate` by Wilson's score; None while all are ties."""
        decided = self.wins + self.losses
        return win_rate_interval(self.wins, 0, self.losses) if decided else None


def pairings(scores: str, result: Scored, labels: tuple[str, str] | None = None) -> list[Ballot]:
    """All that can be voted on in a score folder, general prompts left out; no side is drawn yet.

    Args:
        scores: the folder's name.
        labels: of the two adapters to compare; None for any two.
    """
    digests = {entry.label: entry.digest for entry in result.result.subjects}
    images: dict[tuple[str, int], list[tuple[Contestant, str]]] = {}
    for (label, text, seed), image in result.images.items():
        if not result.prompt(text).general and label in (labels or digests):
            side = Contestant(label, digests[label]), image.file
            images.setdefault((text, seed), []).append(side)
    return [
        Ballot(scores, text, seed, one, two, file_one, file_two)
        for (text, seed), sides in images.items()
        for (one, file_one), (two, file_two) in combinations(sorted(sides), 2)
    ]


def draw(choices: Sequence[Ballot], seen: Mapping[object, int], rng: random.Random) -> Ballot:
    """One of the pairs that were voted on least, its sides by the toss of a coin.

    Args:
        choices: at least one.
        seen: :attr:`Ballot.key` -> votes of this voter.
    """
    fewest = min(seen.get(ballot.key, 0) for ballot in choices)
    ballot = rng.choice([one for one in choices if seen.get(one.key, 0) == fewest])
    sides = [(ballot.left, ballot.file_left), (ballot.right, ballot.file_right)]
    if rng.random() < 0.5:
        sides.reverse()
    (left, one), (right, two) = sides
    token = secrets.token_hex(8)
    return replace(ballot, left=left, file_left=one, right=right, file_right=two, token=token)


def tallies(votes: Iterable[Vote]) -> list[Tally]:
    """The votes of each two adapters, by their labels."""
    counts: dict[tuple[Contestant, Contestant], Counter[str]] = {}
    for vote in votes:
        one, two = sorted((vote.left, vote.right))
        outcome = "ties" if vote.winner is None else "wins" if vote.winner == one else "losses"
        counts.setdefault((one, two), Counter())[outcome] += 1
    return [Tally(*pair, c["wins"], c["ties"], c["losses"]) for pair, c in sorted(counts.items())]


@dataclass(frozen=True)
class Booth:
    """What one voter's page is at: the adapters to compare (None: any two) and the ballot shown."""

    voter: str
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
        return [item for item in self._catalog.now.scores if pairings(item.path, item.result)]

    def pairs(self, path: str | None) -> list[tuple[str, str]]:
        """Names and values of the pairs of adapters of a score folder, "any pair" first."""
        labels = combinations(self._item(path).result.labels, 2)
        two = [(f"{a} and {b}", json.dumps([a, b])) for a, b in labels]
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
        return self._draw(voter, self._item(path).path, _labels(pair))

    def cast(self, booth: Booth, choice: str) -> Booth:
        """Keep a vote and draw the next ballot.

        Args:
            choice: "left", "right" or "tie".

        Raises:
            UserError: the vote can't be written, or there is nothing more to vote on.
        """
        self.votes.add(booth.ballot, choice, booth.voter)
        return self._draw(booth.voter, booth.scores, booth.labels)

    def images(self, ballot: Ballot) -> tuple[bytes, bytes]:
        """The images of both sides as PNG files, with nothing in them but pixels.

        Raises:
            UserError: a file lies outside the root, or can't be read.
        """
        item = self._item(ballot.scores)
        files = (ballot.file_left, ballot.file_right)
        left, right = (_pixels(self._catalog.resolve(item.file(file))) for file in files)
        return left, right

    def done(self, booth: Booth) -> tuple[int, int]:
        """How many of the pairings the voter has voted on, and how many there are."""
        keys = {ballot.key for ballot in self._choices(booth.scores, booth.labels)}
        return len(keys & self.votes.seen(booth.scores, booth.voter).keys()), len(keys)

    def result(self, path: str | None, pair: str) -> tuple[list[Tally], int]:
        """The counts of a score folder's votes, and by how many voters; of its present weights.

        Raises:
            UserError: votes can't be read.
        """
        choices = self._choices(self._item(path).path, _labels(pair))
        present = {side for ballot in choices for side in (ballot.left, ballot.right)}
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
        for item in self._catalog.now.scores:
            if item.path == path:
                return item
        raise UserError(f"there is no score folder {path!r} any more: choose another")

    def _choices(self, path: str, labels: tuple[str, str] | None) -> Sequence[Ballot]:
        return pairings(path, self._item(path).result, labels)

    def _draw(self, voter: str, path: str, labels: tuple[str, str] | None) -> Booth:
        choices = self._choices(path, labels)
        seen = self.votes.seen(path, voter)
        while choices:
            ballot = draw(choices, seen, self._rng)
            try:
                self.images(ballot)
                return Booth(voter, path, labels, ballot)
            except UserError:  # a missing image does not end the vote on the others
                choices = [one for one in choices if one.key != ballot.key]
        raise UserError(
            f"no two images of {path} can be read: choose others, or run python -m eval.clip_scores"
        )


def _labels(pair: str) -> tuple[str, str] | None:
    if pair == ANY:
        return None
    one, two = json.loads(pair)
    return one, two


def _pixels(path: Path) -> bytes:
    image = parts.read(path)
    if image is None:
        raise UserError(f"{path.name} can't be read: make the result again")
    factor = max(1, SHOWN_PIXELS // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    image.info = {}  # the text in the file names its adapter
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
