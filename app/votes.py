"""Blind votes: ballots, their sides, and the count. No widgets.

    polls = Polls(catalog, random.SystemRandom())
    booth = polls.open("scores", ANY_PAIR, session)
    booth = polls.cast(booth, "left")

Votes are rows of one SQLite file below the root. Its journal keeps it whole through a crash, and
several voters, threads and processes may write at once. Votes of earlier versions are not read.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import secrets
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from bilora_diffusion.core.errors import UserError

from . import parts
from .catalog import Catalog, ResultItem
from .scored import Scored

FILE = "votes.db"
BUSY_SECONDS = 5.0
"""Seconds to wait for another program that holds the file."""
QUERY_SECONDS = 10.0
"""Seconds until a query is ended; those of this module take milliseconds."""
MAX_VALUE_BYTES = 1_000_000
QUERY_STEPS = 100_000  # of SQLite's machine between two looks at the clock
ANY_PAIR = ""
"""The value of "any pair"."""
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Beginnings of a text that a spreadsheet computes, also in full width and after blanks."""
COLUMNS = ("time UTC", "score folder", "prompt", "seed", "adapter left", "adapter right")
COLUMNS += ("choice", "winner", "voter")
"""Columns of the CSV file: those of a :class:`Vote`, with a number for the session."""


class Side(NamedTuple):
    """An adapter's image: file relative to the score folder. Weights trained again are another."""

    label: str
    digest: str
    file: str


@dataclass(frozen=True)
class Ballot:
    """Two adapters' images of one prompt and seed of a score folder."""

    scores: str
    prompt: str
    seed: int
    left: Side
    right: Side

    @property
    def pair(self) -> str:
        """Identifies it, whatever the sides."""
        sides = sorted((side.label, side.digest) for side in (self.left, self.right))
        return json.dumps([self.scores, self.prompt, self.seed, sides])


class Vote(NamedTuple):
    """A row of the table; adapters are called by their labels, and no winner is a tie."""

    time: str
    scores: str
    prompt: str
    seed: int
    left: str
    right: str
    choice: str
    winner: str
    session: str
    pair: str


Tally = tuple[str, str, int, int, int]
"""Two adapters, and how often the first won, neither, and the other."""


def tallies(votes: Iterable[Vote]) -> list[Tally]:
    """The votes of each two adapters, by their labels."""
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        counts[tuple(sorted((vote.left, vote.right)))][vote.winner] += 1
    return [(a, b, c[a], c[""], c[b]) for (a, b), c in sorted(counts.items())]


def ballots(scores: str, result: Scored, labels: Sequence[str] | None = None) -> list[Ballot]:
    """All ballots of a score folder, or of two adapters, general prompts left out; no side is drawn
    yet.
    """
    digests = {entry.label: entry.digest for entry in result.result.subjects}
    images: dict[tuple[str, int], list[Side]] = defaultdict(list)
    for (label, text, seed), image in result.images.items():
        if not result.prompt(text).general and label in (labels or digests):
            images[text, seed].append(Side(label, digests[label], image.file))
    return [
        Ballot(scores, text, seed, *pair)
        for (text, seed), sides in images.items()
        for pair in combinations(sorted(sides), 2)
    ]


@dataclass(frozen=True)
class Booth:
    """State of one voter's page.

    Args:
        labels: of the adapters to compare; None for any two.
        num_voted, total: pairs voted on in this session, and all; without a ballot these are equal.
        images: of both sides, as ``data:`` addresses with nothing in them but pixels.
        token: names the ballot to the browser.
    """

    session: str
    scores: str
    labels: Sequence[str] | None
    num_voted: int
    total: int
    ballot: Ballot | None = None
    images: Sequence[str | None] = ()
    token: str = ""


class Polls:
    """Votes on the score folders of a root; ``rng`` draws pairs and sides."""

    def __init__(self, catalog: Catalog, rng: random.Random) -> None:
        self._catalog, self._rng = catalog, rng

    def pairs(self, path: str | None) -> list[tuple[str, str]]:
        """Names and values of the pairs of adapters of a score folder, "any pair" first."""
        labels = combinations(self._item(path).result.labels, 2)
        return [("any pair", ANY_PAIR), *((f"{a} and {b}", json.dumps([a, b])) for a, b in labels)]

    def open(self, path: str | None, pair: str, session: str) -> Booth:
        """The first ballot of a session, or the next of one that goes on; ``pair`` is a value from
        :meth:`pairs`.
        """
        with self._file() as file:
            file.execute("DELETE FROM votes WHERE FALSE")  # fails where nothing can be written
        return self._booth(session, self._item(path).path, _labels(pair))

    def cast(self, booth: Booth, choice: str) -> Booth:
        """Keep a vote ("left", "right" or "tie") and draw the next ballot; of two votes of one
        session on a pair, the first stays.
        """
        if (ballot := booth.ballot) is not None:
            left, right, cast_at = ballot.left.label, ballot.right.label, datetime.now(UTC)
            winner = {"left": left, "right": right}.get(choice, "")
            about = (
                cast_at.isoformat(timespec="seconds"),
                ballot.scores,
                ballot.prompt,
                ballot.seed,
            )
            vote = Vote(*about, left, right, choice, winner, booth.session, ballot.pair)
            with self._file() as file:
                marks = ", ".join("?" * len(vote))
                file.execute(f"INSERT OR IGNORE INTO votes VALUES ({marks})", vote)
        return self._booth(booth.session, booth.scores, booth.labels)

    def votes(self, scores: str | None = None, session: str | None = None) -> list[Vote]:
        """Votes in the order they were cast, of one score folder or session where given."""
        if not self._catalog.resolve(FILE).exists():
            return []
        condition = "(?1 IS NULL OR scores = ?1) AND (?2 IS NULL OR session = ?2)"
        with self._file() as file:
            query = f"SELECT {', '.join(Vote._fields)} FROM votes WHERE {condition} ORDER BY rowid"
            return [Vote(*row) for row in file.execute(query, (scores, session))]

    @contextlib.contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        path = self._catalog.resolve(FILE)
        columns = f"{', '.join(Vote._fields)}, UNIQUE (session, pair)"
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as file, file:
                _limit_queries(file)
                file.execute(f"CREATE TABLE IF NOT EXISTS votes ({columns})")
                _require_table(file)
                yield file
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{FILE} can't be used ({error}): give the viewer a root folder that you may"
                " write to, with free space, close other programs that use the file, and move it"
                " away if it has no votes"
            ) from error

    def result(self, path: str | None, pair: str) -> tuple[list[Tally], int]:
        """Counts of the votes on a score folder's present weights, and the number of voters."""
        item = self._item(path)
        pairs = ballots(item.path, item.result, _labels(pair))
        present = {ballot.pair for ballot in pairs}
        votes = [vote for vote in self.votes(item.path) if vote.pair in present]
        return tallies(votes), len({vote.session for vote in votes})

    def export(self, folder: Path) -> Path:
        """Write all votes of this root as ``votes.csv`` into a new folder below ``folder``.

        Voters are numbered by their first vote: whoever knows a session can vote as its voter.
        A text that a spreadsheet would compute as a formula gets an apostrophe before it.
        """
        numbers: dict[str, int] = {}
        rows: list[tuple[str | int, ...]] = []
        for vote in self.votes():
            number = numbers.setdefault(vote.session, len(numbers) + 1)
            rows.append((*vote[: len(COLUMNS) - 1], number))
        path = folder / secrets.token_hex(8) / "votes.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(map(_inert, row) for row in rows)])
        return path

    def _item(self, path: str | None) -> ResultItem:
        items = {item.path: item for item in self._catalog.scan.scores}
        if path not in items:
            raise UserError(f"there is no score folder {path!r} any more: choose another")
        return items[path]

    def _booth(self, session: str, path: str, labels: Sequence[str] | None) -> Booth:
        item = self._item(path)
        choices = ballots(path, item.result, labels)
        voted = {vote.pair for vote in self.votes(path, session)}
        remaining = [choice for choice in choices if choice.pair not in voted]
        booth = Booth(session, path, labels, len(choices) - len(remaining), len(choices))
        for choice in self._rng.sample(remaining, len(remaining)):
            left, right = self._rng.sample([choice.left, choice.right], 2)
            images = [
                parts.address_below(self._catalog, item.file(side.file)) for side in (left, right)
            ]
            if None not in images:  # a missing image does not end the vote on the others
                ballot = replace(choice, left=left, right=right)
                return replace(booth, ballot=ballot, images=images, token=secrets.token_hex(8))
        if booth.num_voted == 0:
            raise UserError(f"no two images of {path} can be read: choose other adapters")
        return booth


def _limit_queries(file: sqlite3.Connection) -> None:
    """End a connection's queries after QUERY_SECONDS, and refuse values above MAX_VALUE_BYTES.

    The file may be a stranger's: a view or a trigger can be endless, a computed column huge.
    """
    end = time.monotonic() + QUERY_SECONDS
    file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    file.set_progress_handler(lambda: time.monotonic() > end, QUERY_STEPS)


def _require_table(file: sqlite3.Connection) -> None:
    """Refuse a view or a virtual table in place of the votes."""
    tables = file.execute(
        "SELECT 1 FROM sqlite_master WHERE name = 'votes' COLLATE NOCASE"
        " AND type = 'table' AND sql LIKE 'CREATE TABLE%'"
    )
    if tables.fetchone() is None:
        raise sqlite3.DatabaseError("it has a view or a virtual table in place of its votes")


def _labels(pair: str) -> Sequence[str] | None:
    return None if pair == ANY_PAIR else json.loads(pair)


def _inert(cell: str | int) -> str | int:
    if isinstance(cell, str) and (cell[:1].isspace() or cell.startswith(FORMULA)):
        return f"'{cell}"
    return cell
