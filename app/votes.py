"""Blind votes: pairs of images, their sides, and the count. No widgets.

    votes = VoteStore(catalog, random.SystemRandom())
    voter = votes.open("scores", ANY_PAIR, session)
    voter = votes.cast(voter, "left")

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
# Seconds to wait for another program that holds the file.
BUSY_SECONDS = 5.0
# Seconds until a query is ended; those of this module take milliseconds.
QUERY_SECONDS = 10.0
# Largest value that is read: the file may come from a stranger
MAX_VALUE_BYTES = 1_000_000
# Steps of SQLite's machine from one look at the clock to the next.
QUERY_STEPS = 100_000
# Value of the choice "any pair".
ANY_PAIR = ""
# Beginnings of a text that a spreadsheet takes for a formula; the last four have full width.
FORMULA_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# Columns of the CSV file: fields of `Vote`, with a number in place of the session.
COLUMNS = ("time UTC", "score folder", "prompt", "seed", "adapter left", "adapter right")
COLUMNS += ("choice", "winner", "voter")


class Side(NamedTuple):
    """An adapter's image."""

    label: str
    # Hash of its weights: with other weights it is another adapter
    digest: str
    # File relative to the score folder
    file: str


@dataclass(frozen=True)
class ImagePair:
    """Two adapters' images of one prompt and seed of a score folder."""

    scores: str
    prompt: str
    seed: int
    left: Side
    right: Side

    @property
    def key(self) -> str:
        """Key of the pair, the same when the sides are swapped."""
        sides = sorted((side.label, side.digest) for side in (self.left, self.right))
        return json.dumps([self.scores, self.prompt, self.seed, sides])


class Vote(NamedTuple):
    """A row of the table, whose columns are these fields."""

    time: str
    # Path of the score folder
    scores: str
    prompt: str
    seed: int
    # Labels of the adapters
    left: str
    right: str
    # "left", "right" or "tie"
    choice: str
    # Label of the better adapter; "" for a tie
    winner: str
    # Name of the voter's browser
    session: str
    # `ImagePair.key`
    pair: str


# Labels of two adapters; how often the first one won, neither did, and the second one won.
Tally = tuple[str, str, int, int, int]


def tallies(votes: Iterable[Vote]) -> list[Tally]:
    """Count the votes on each two adapters, sorted by their labels."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        first, second = sorted((vote.left, vote.right))
        counts[first, second][vote.winner] += 1
    rows = []
    for (first, second), wins in sorted(counts.items()):
        rows.append((first, second, wins[first], wins[""], wins[second]))
    return rows


def image_pairs(
    scores: str, result: Scored, labels: Sequence[str] | None = None
) -> list[ImagePair]:
    """All pairs of images of the same prompt and seed, in a fixed order and with fixed sides.

    General prompts, which ask for nothing that was trained, are left out.

    Args:
        scores: path of the score folder.
        result: its scores.
        labels: labels of the two adapters; None for all adapters.
    """
    digests = {entry.label: entry.digest for entry in result.result.subjects}
    sides_by_image: dict[tuple[str, int], list[Side]] = defaultdict(list)
    for (label, text, seed), image in result.images.items():
        if not result.prompt(text).general and label in (labels or digests):
            sides_by_image[text, seed].append(Side(label, digests[label], image.file))
    pairs = []
    for (text, seed), sides in sides_by_image.items():
        for left, right in combinations(sorted(sides), 2):
            pairs.append(ImagePair(scores, text, seed, left, right))
    return pairs


@dataclass(frozen=True)
class VoterState:
    """State of one voter's page."""

    # Name of the voter's browser
    session: str
    # Path of the score folder
    scores: str
    # Labels of the two adapters to compare; None for any two
    labels: Sequence[str] | None
    # Pairs that the session has voted on, and all
    num_voted: int
    total: int
    # The pair to vote on, with random sides; None when all are done
    pair: ImagePair | None = None
    # Images of both sides, as ``data:`` addresses with nothing in them but pixels
    images: Sequence[str | None] = ()
    # Random name of the pair for the browser
    token: str = ""


class VoteStore:
    """Votes on the score folders of a root.

    Args:
        catalog: folders of the viewer.
        rng: chooses pairs and sides.
    """

    def __init__(self, catalog: Catalog, rng: random.Random) -> None:
        self._catalog = catalog
        self._rng = rng

    def pairs(self, path: str | None) -> list[tuple[str, str]]:
        """Names and values of the pairs of adapters of a score folder, "any pair" first."""
        choices = [("any pair", ANY_PAIR)]
        for first, second in combinations(self._item(path).result.labels, 2):
            choices.append((f"{first} and {second}", json.dumps([first, second])))
        return choices

    def open(self, path: str | None, pair: str, session: str) -> VoterState:
        """Begin a session, or go on with it.

        Args:
            path: path of the score folder.
            pair: a value of `pairs`.
            session: name of the voter's browser.

        Raises:
            UserError: the file of votes can't be written, or no images can be read.
        """
        with self._file() as file:
            file.execute("DELETE FROM votes WHERE FALSE")  # fails if nothing can be written
        return self._next_state(session, self._item(path).path, _labels(pair))

    def cast(self, voter: VoterState, choice: str) -> VoterState:
        """Store a vote and choose the next pair; a second vote on a pair changes nothing.

        Args:
            voter: state of the page on which the choice was made.
            choice: "left", "right" or "tie".

        Raises:
            UserError: the file of votes can't be written.
        """
        pair = voter.pair
        if pair is not None:
            left = pair.left.label
            right = pair.right.label
            vote = Vote(
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                scores=pair.scores,
                prompt=pair.prompt,
                seed=pair.seed,
                left=left,
                right=right,
                choice=choice,
                winner={"left": left, "right": right}.get(choice, ""),
                session=voter.session,
                pair=pair.key,
            )
            with self._file() as file:
                marks = ", ".join("?" * len(vote))
                file.execute(f"INSERT OR IGNORE INTO votes VALUES ({marks})", vote)
        return self._next_state(voter.session, voter.scores, voter.labels)

    def votes(self, scores: str | None = None, session: str | None = None) -> list[Vote]:
        """Read votes in the order in which they were cast.

        Args:
            scores: path of their score folder; None for all folders.
            session: their session; None for all sessions.
        """
        if not self._catalog.resolve(FILE).exists():
            return []
        condition = "(?1 IS NULL OR scores = ?1) AND (?2 IS NULL OR session = ?2)"
        with self._file() as file:
            query = f"SELECT {', '.join(Vote._fields)} FROM votes WHERE {condition} ORDER BY rowid"
            return [Vote(*row) for row in file.execute(query, (scores, session))]

    @contextlib.contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Within the context the file of votes is open; its changes are written at the end."""
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
        """Counts of the votes on a score folder, and the number of voters.

        Votes on weights that have since been trained again do not count.
        """
        item = self._item(path)
        keys = {pair.key for pair in image_pairs(item.path, item.result, _labels(pair))}
        votes = [vote for vote in self.votes(item.path) if vote.pair in keys]
        voters = {vote.session for vote in votes}
        return tallies(votes), len(voters)

    def export(self, folder: Path) -> Path:
        """Write all votes of this root as ``votes.csv`` into a new folder below `folder`.

        A voter is given by a number, since a session's name is enough to vote as its voter. A text
        that a spreadsheet would take for a formula gets an apostrophe before it.
        """
        voter_numbers: dict[str, int] = {}
        path = folder / secrets.token_hex(8) / "votes.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for vote in self.votes():
                number = voter_numbers.setdefault(vote.session, len(voter_numbers) + 1)
                cells = [_inert(cell) for cell in vote[: len(COLUMNS) - 1]]
                writer.writerow([*cells, number])
        return path

    def _item(self, path: str | None) -> ResultItem:
        """The score folder of a path."""
        for item in self._catalog.scan.scores:
            if item.path == path:
                return item
        raise UserError(f"there is no score folder {path!r} any more: choose another")

    def _next_state(self, session: str, path: str, labels: Sequence[str] | None) -> VoterState:
        """State of a voter with a pair that the session has not voted on, if there is one."""
        item = self._item(path)
        pairs = image_pairs(path, item.result, labels)
        voted_keys = {vote.pair for vote in self.votes(path, session)}
        remaining = [pair for pair in pairs if pair.key not in voted_keys]
        state = VoterState(
            session, path, labels, num_voted=len(pairs) - len(remaining), total=len(pairs)
        )
        # In random order, up to the first pair with two readable images: a missing image does not
        # end the vote on the others.
        for pair in self._rng.sample(remaining, len(remaining)):
            left, right = self._rng.sample([pair.left, pair.right], 2)
            images = [
                parts.address_below(self._catalog, item.file(left.file)),
                parts.address_below(self._catalog, item.file(right.file)),
            ]
            if None not in images:
                pair = replace(pair, left=left, right=right)
                return replace(state, pair=pair, images=images, token=secrets.token_hex(8))
        if state.num_voted == 0:
            raise UserError(f"no two images of {path} can be read: choose other adapters")
        return state


def _limit_queries(file: sqlite3.Connection) -> None:
    """End a connection's queries after `QUERY_SECONDS`, and refuse values of `MAX_VALUE_BYTES`.

    The file may come from a stranger: a view or a trigger in it can be endless, a computed column
    huge.
    """
    end = time.monotonic() + QUERY_SECONDS
    file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    # A true answer ends the query.
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
    """Labels of a value of `VoteStore.pairs`."""
    if pair == ANY_PAIR:
        return None
    return json.loads(pair)


def _inert(cell: str | int) -> str | int:
    """A cell that no spreadsheet computes; some skip blanks before a formula."""
    if isinstance(cell, str) and (cell[:1].isspace() or cell.startswith(FORMULA_SIGNS)):
        return f"'{cell}"
    return cell
