"""The votes of the blind comparison: where they are kept, and their CSV file. No widgets here.

    votes = Votes(Path("demo/votes.sqlite"))
    votes.add(ballot, "left", voter)
    votes.read("scores"), votes.seen("scores", voter)

One SQLite file, one row a vote. It is in WAL mode, so several voters, threads and processes may
write at once; as SQLite says, not on a network drive that several machines write to.
"""

from __future__ import annotations

import csv
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from bilora_diffusion.errors import UserError

FILE = "votes.sqlite"
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
COLUMNS = (
    *("time UTC", "score folder", "prompt", "seed", "adapter left", "adapter right"),
    *("choice", "winner", "session"),
)
"""Of the CSV file."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""

_TABLE = """
CREATE TABLE votes (
    ballot TEXT PRIMARY KEY,
    time TEXT NOT NULL,
    scores TEXT NOT NULL,
    prompt TEXT NOT NULL,
    seed INTEGER NOT NULL,
    label_left TEXT NOT NULL,
    digest_left TEXT NOT NULL,
    label_right TEXT NOT NULL,
    digest_right TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')),
    session TEXT NOT NULL
) STRICT
"""


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
class Pair:
    """Two adapters' images of one prompt and seed, by their sides.

    Args:
        scores: the score folder.
        prompt, seed: what both images were made from.
    """

    scores: str
    prompt: str
    seed: int
    left: Contestant
    right: Contestant

    @property
    def key(self) -> tuple[str, int, tuple[Contestant, ...]]:
        """Identifies it within its score folder, whatever the sides."""
        return self.prompt, self.seed, tuple(sorted((self.left, self.right)))


@dataclass(frozen=True)
class Ballot(Pair):
    """A pair that can be voted on.

    Args:
        file_left, file_right: the images, relative to the score folder.
        token: random; names the ballot to the browser, and lets it be cast once.
    """

    file_left: str
    file_right: str
    token: str = ""


@dataclass(frozen=True)
class Vote(Pair):
    """A row of the table; ``time`` is UTC, ISO 8601."""

    choice: str
    session: str
    time: str

    @property
    def winner(self) -> Contestant | None:
        """The adapter that was chosen; None for a tie."""
        return {"left": self.left, "right": self.right}.get(self.choice)


def write_csv(votes: Iterable[Vote], file: TextIO) -> None:
    """Write :data:`COLUMNS` and a row a vote; open ``file`` with ``newline=""``.

    A text that a spreadsheet would compute as a formula gets an apostrophe before it.
    """
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for vote in votes:
        about = (vote.time, vote.scores, vote.prompt, vote.seed)
        sides = (vote.left.label, vote.right.label)
        winner = "" if vote.winner is None else vote.winner.label
        writer.writerow(map(_inert, (*about, *sides, vote.choice, winner, vote.session)))


def _inert(cell: str | int) -> str | int:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


class Votes:
    """The votes in a file, which the first vote makes.

    Every call opens the file anew, so one object serves all threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def add(self, ballot: Ballot, choice: str, session: str) -> bool:
        """Keep a vote.

        Returns:
            False where this ballot was cast before, by a second click; nothing then changes.

        Raises:
            UserError: the file can't be written, is damaged, or is of another version.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = (ballot.token, now, ballot.scores, ballot.prompt, ballot.seed)
        row = (*about, *astuple(ballot.left), *astuple(ballot.right), choice, session)
        with self._errors("written"), closing(self._writable()) as connection, connection:
            marks = ", ".join("?" * len(row))
            done = connection.execute(
                f"INSERT INTO votes VALUES ({marks}) ON CONFLICT (ballot) DO NOTHING", row
            )
            return done.rowcount == 1

    def check(self) -> None:
        """Make the file where it is missing, and see that votes can be written to it.

        Raises:
            UserError: as :meth:`add`.
        """
        with self._errors("written"), closing(self._writable()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()

    def read(self, scores: str | None = None, session: str | None = None) -> list[Vote]:
        """Votes in the order they were cast, of one score folder or voter where given.

        Raises:
            UserError: the file can't be read, is damaged, or is of another version.
        """
        if not self.path.exists():
            return []
        with self._errors("read"), closing(self._readable()) as connection:
            rows = connection.execute(
                "SELECT scores, prompt, seed, label_left, digest_left, label_right, digest_right,"
                " choice, session, time FROM votes WHERE (?1 IS NULL OR scores = ?1)"
                " AND (?2 IS NULL OR session = ?2) ORDER BY rowid",
                (scores, session),
            ).fetchall()
        return [
            Vote(of, prompt, seed, Contestant(*left), Contestant(*right), choice, voter, time)
            for of, prompt, seed, *sides, choice, voter, time in rows
            for left, right in [(sides[:2], sides[2:])]
        ]

    def seen(self, scores: str, session: str) -> Counter[object]:
        """:attr:`Pair.key` -> how often a voter voted on it.

        Raises:
            UserError: as :meth:`read`.
        """
        return Counter(vote.key for vote in self.read(scores, session))

    def _writable(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS)
        try:
            _use_wal(connection)
            connection.execute("BEGIN IMMEDIATE")  # of several that make the table, one does
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.commit()
            self._require_version(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _readable(self) -> sqlite3.Connection:
        # A file in WAL mode can't be opened in a folder without write access, except as one that
        # nobody writes to; it is whole then, since the last writer left no log beside it.
        log = self.path.with_name(self.path.name + "-wal")
        for options in ("mode=ro", *(() if log.exists() else ("immutable=1",))):
            connection = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?{options}", uri=True, timeout=BUSY_SECONDS
            )
            try:
                self._require_version(connection)
                return connection
            except BaseException as error:
                connection.close()
                if not isinstance(error, sqlite3.OperationalError):
                    raise
        raise UserError(f"{self.path.name} can't be read: check its rights and those of its folder")

    def _require_version(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path.name} has schema version {version}, but this viewer keeps votes in"
                f" {SCHEMA_VERSION}: move the file away, or use the version that wrote it"
            )

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:  # a mistake in the code, not in the file
            raise
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self.path.name} can't be {done} ({error}): give the viewer a root folder that"
                " you may write to, with free space"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path.name} is no file of votes ({error}): move it away"
            ) from error


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode; SQLite does not wait by itself for others that do so just now."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
