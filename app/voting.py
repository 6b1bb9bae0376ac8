"""Blind voting: what may be shown, whose image goes to which side, and who is winning.

    ballot = draw(pairings("scores", result), votes.seen("scores", voter), random.Random())
    tallies(votes.read("scores"))

Where votes are kept: ``ballots``. No widgets here.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.stats import binomtest

from eval.compare import LEVEL, Interval

from .scored import Scored

CHOICES = ("left", "right", "tie")


@dataclass(frozen=True, order=True)
class Contestant:
    """An adapter as votes know it: trained again under the same label, it is another one.

    Args:
        label: what tables show.
        digest: of the weights; "" for the base model.
    """

    label: str
    digest: str


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
class Ballot:
    """A pairing with its sides drawn.

    Args:
        token: random; names the ballot to the browser, and lets it be cast once.
    """

    token: str
    scores: str
    prompt: str
    seed: int
    left: Contestant
    right: Contestant
    file_left: str
    file_right: str


@dataclass(frozen=True)
class Vote:
    """A row of the table; ``time`` is UTC, ISO 8601."""

    time: str
    scores: str
    prompt: str
    seed: int
    left: Contestant
    right: Contestant
    choice: str
    session: str

    @property
    def winner(self) -> Contestant | None:
        """The adapter that was chosen; None for a tie."""
        return {"left": self.left, "right": self.right}.get(self.choice)


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
        if not self.wins + self.losses:
            return None
        test = binomtest(self.wins, self.wins + self.losses)
        found = test.proportion_ci(confidence_level=LEVEL, method="wilson")
        return Interval(float(found.low), float(found.high))


def pairings(scores: str, result: Scored, labels: tuple[str, str] | None = None) -> list[Pairing]:
    """All that can be voted on in a score folder, general prompts left out.

    Args:
        scores: the folder's name.
        labels: of the two adapters to compare; None for any two.
    """
    images: dict[tuple[int, int], dict[int, str]] = {}
    for row in result.images:
        if not result.prompts[row.prompt].general:
            images.setdefault((row.prompt, row.seed), {})[row.adapter] = row.file
    found = []
    for (prompt, seed), files in images.items():
        sides = sorted(
            (Contestant(result.adapters[at].label, result.adapters[at].digest), file)
            for at, file in files.items()
            if labels is None or result.adapters[at].label in labels
        )
        for (one, file_one), (two, file_two) in combinations(sides, 2):
            text = result.prompts[prompt].text
            found.append(Pairing(scores, text, seed, (one, two), (file_one, file_two)))
    return found


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
