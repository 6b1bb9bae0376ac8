"""Blind voting: what may be shown, whose image goes to which side, and who is winning.

    polls = Polls(catalog, random.SystemRandom())
    booth = polls.open("scores", ANY, voter)
    booth = polls.cast(booth, "left", voter)

Where votes are kept: ``ballots``. No widgets here.
"""

from __future__ import annotations

import io
import json
import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from bilora_diffusion.errors import UserError
from eval.compare import Interval, win_rate_interval

from .ballots import FILE, Ballot, Contestant, Vote, Votes, write_csv
from .catalog import Catalog, ScoresItem
from .scored import Scored

ANY = ""
"""The value of "any pair"."""
SHOWN_PIXELS = 384
"""Smaller images are enlarged to about this size."""


@dataclass(frozen=True)
class Pairing:
    """What can be voted on: one prompt and seed from two adapters, in the order of their labels.

    Args:
        scores: the score folder.
        prompt, seed: what both images were made from.
        adapters: the two, sorted.
        files: their images, relative to the score folder.
    """

    scores: str
    prompt: str
    seed: int
    adapters: tuple[Contestant, Contestant]
    files: tuple[str, str]

    @property
    def key(self) -> tuple[str, int, tuple[Contestant, Contestant]]:
        """Identifies it within its score folder."""
        return self.prompt, self.seed, self.adapters


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


def pairings(scores: str, result: Scored, labels: tuple[str, str] | None = None) -> list[Pairing]:
    """All that can be voted on in a score folder, general prompts left out.

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
        Pairing(scores, text, seed, (one, two), (file_one, file_two))
        for (text, seed), sides in images.items()
        for (one, file_one), (two, file_two) in combinations(sorted(sides), 2)
    ]


def draw(choices: Sequence[Pairing], seen: Mapping[object, int], rng: random.Random) -> Ballot:
    """One of the pairings that were voted on least, its sides by the toss of a coin.

    Args:
        choices: at least one.
        seen: :attr:`Pairing.key` -> votes of this voter.
    """
    fewest = min(seen.get(pairing.key, 0) for pairing in choices)
    chosen = rng.choice([p for p in choices if seen.get(p.key, 0) == fewest])
    sides = list(zip(chosen.adapters, chosen.files, strict=True))
    if rng.random() < 0.5:
        sides.reverse()
    (left, file_left), (right, file_right) = sides
    about = (chosen.scores, chosen.prompt, chosen.seed)
    return Ballot(secrets.token_hex(8), *about, left, right, file_left, file_right)


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
