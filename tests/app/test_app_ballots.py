"""Blind votes: sides by chance, nothing lost, and counts that scipy agrees with."""

from __future__ import annotations

import csv
import io
import math
import multiprocessing
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, ImageColor, PngImagePlugin
from scipy import stats

from app.ballots import COLUMNS, SCHEMA_VERSION, Ballot, Contestant, Vote, Votes, write_csv
from app.catalog import Catalog
from app.scored import Scored, ScoredImage, ScoredPrompt
from app.voting import ANY, Polls, Tally, draw, pairings, tallies
from bilora_diffusion.errors import UserError
from tests.app.scored_images import scores_of, write

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
    return scores_of(
        labels, [ScoredPrompt(text, general=text == "a photo") for text in texts], images
    )


def ballot(token: str, left: Contestant = LORA, right: Contestant = BILORA) -> Ballot:
    return Ballot("scores", "a ToK icon", 7, left, right, "left.png", "right.png", token)


def vote(choice: str, left: Contestant = LORA, right: Contestant = BILORA) -> Vote:
    return Vote("scores", "icon", 0, left, right, choice, "me", "2026-01-02T03:04:05+00:00")


def test_only_images_of_one_prompt_and_seed_are_paired() -> None:
    scores = result(("c", "a", "b"), prompts=2)
    del scores.images["b", "icon 1", 0]
    found = pairings("scores", scores)
    assert len(found) == 3 * 2 * 2 - 2, "general prompts are left out, and what one alone has"
    assert {(p.left.label, p.right.label) for p in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    for pair in found:
        sides = ((pair.left, pair.file_left), (pair.right, pair.file_right))
        for side, file in sides:
            assert file == f"images/{side.label}/{pair.seed}/{pair.prompt}.png"
            assert side.digest == f"digest {side.label}"
    chosen = pairings("scores", scores, ("c", "a"))
    assert {(p.left.label, p.right.label) for p in chosen} == {("a", "c")}
    assert len(chosen) == 2 * 2


def test_nothing_comes_twice_before_everything_was_seen() -> None:
    choices, seen, rng = pairings("s", result()), Counter(), random.Random(0)
    keys = []
    for _ in range(2 * len(choices)):
        drawn = draw(choices, seen, rng)
        seen[drawn.key] += 1
        keys.append(drawn.key)
    half = len(choices)
    assert len(set(keys[:half])) == len(set(keys[half:])) == half
    assert keys[:half] != keys[half:], "the order is drawn, too"


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
        assert polls.done(booth, "me") == (count, 4)
        ballot = booth.ballot
        for side, data in zip((ballot.left, ballot.right), polls.images(ballot), strict=True):
            with Image.open(io.BytesIO(data)) as shown:
                assert shown.getpixel((0, 0)) == ImageColor.getrgb(colors[side.label])
                assert not shown.info
                assert max(shown.size) > 64, "enlarged"
        booth = polls.cast(booth, "left", "me")
    (tally,), voters = polls.result("scores", ANY)
    assert (tally.wins + tally.losses, voters) == (4, 1)


def test_sides_are_balanced_and_without_memory() -> None:
    choices, rng, n = pairings("s", result()), random.Random(1), 4000
    lefts = [draw(choices, {}, rng).left.label == "LoRA" for _ in range(n)]
    again = [draw(choices, {}, random.Random(1)).left.label for _ in range(2)]
    assert again[0] == again[1], "a seed fixes the sides"
    assert len({draw(choices, {}, random.Random(1)).token for _ in range(20)}) == 20, "not these"
    # Four standard deviations of a fair coin, for how often each side comes and how often it stays.
    band = 4 * math.sqrt(n) / 2
    assert abs(sum(lefts) - n / 2) < band
    assert abs(sum(one == two for one, two in pairwise(lefts)) - n / 2) < band


@pytest.mark.parametrize(("wins", "ties", "losses"), [(7, 3, 2), (10, 0, 0), (0, 1, 4), (1, 0, 1)])
def test_rate_and_interval(wins: int, ties: int, losses: int) -> None:
    found = Tally(LORA, BILORA, wins, ties, losses)
    n, z = wins + losses, stats.norm.ppf(0.975)
    share = wins / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert found.rate == pytest.approx((wins + 0.5 * ties) / (wins + ties + losses))
    assert found.decided_rate == pytest.approx(share)
    assert found.interval is not None
    assert found.interval.low == pytest.approx(max(0.0, centre - half), abs=1e-12)
    assert found.interval.high == pytest.approx(min(1.0, centre + half), abs=1e-12)
    even = Tally(LORA, BILORA, 0, 4, 0)
    assert (even.rate, even.decided_rate, even.interval) == (0.5, None, None)


def test_a_vote_counts_the_same_from_both_sides() -> None:
    cast = [
        *(vote("left"), vote("right", BILORA, LORA), vote("tie"), vote("tie", BILORA, LORA)),
        vote("left", BILORA, LORA),
    ]
    assert tallies(cast) == [Tally(BILORA, LORA, wins=1, ties=2, losses=2)]
    assert [v.winner for v in cast] == [LORA, LORA, None, None, BILORA]


def test_weights_trained_again_are_counted_apart() -> None:
    newer = Contestant("LoRA", "cc")
    found = tallies([vote("left"), vote("left", newer, BILORA)])
    assert [(t.adapter, t.other) for t in found] == [(BILORA, LORA), (BILORA, newer)]


def test_votes_come_back_as_they_were_cast(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    assert votes.read() == []
    assert not votes.path.exists(), "reading makes nothing"
    odd = replace(ballot("1"), prompt="'); DROP TABLE votes; --", scores='"\n;')
    assert votes.add(odd, "left", "me'; --")
    assert votes.add(ballot("2"), "tie", "you")
    assert not votes.add(ballot("2"), "right", "you"), "a second click changes nothing"
    assert [v.prompt for v in votes.read()] == [odd.prompt, "a ToK icon"]
    (kept,) = votes.read(odd.scores)
    assert (kept.left, kept.right, kept.choice, kept.session) == (LORA, BILORA, "left", "me'; --")
    assert [v.choice for v in votes.read(session="you")] == ["tie"]
    assert votes.seen("scores", "you") == {("a ToK icon", 7, (BILORA, LORA)): 1}
    assert votes.seen("scores", "me'; --") == {}


def test_the_file_is_in_wal_mode_and_refuses_an_unknown_choice(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="choice"):
        votes.add(ballot("1"), "both", "me")
    assert votes.read() == []
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


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    votes.add(ballot("1"), "left", "me")
    with sqlite3.connect(votes.path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    for act in (votes.check, votes.read, lambda: votes.add(ballot("2"), "left", "me")):
        with pytest.raises(UserError, match=r"^votes.sqlite has schema version 7.*move the file"):
            act()


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    path.write_text("not a database, but long enough to look at" * 30)
    before = path.read_bytes()
    for act in (Votes(path).check, Votes(path).read):
        with pytest.raises(UserError, match=r"votes.sqlite is no file of votes"):
            act()
    assert path.read_bytes() == before


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder with one vote that its reader may not write to, outside pytest's private ones."""
    folder = Path(tempfile.mkdtemp(prefix="bilora-votes-"))
    Votes(folder / "votes.sqlite").add(ballot("1"), "left", "me")
    (folder / "votes.sqlite").chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


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


def test_a_read_only_folder_is_read_but_refused_for_votes(closed_folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    worker = fork.Process(target=in_closed_folder, args=(closed_folder, answers))
    worker.start()
    found = [answers.get(timeout=60) for _ in range(3)]
    worker.join(60)
    assert found[0] == "1 read"
    for sentence in found[1:]:
        assert sentence.startswith("votes.sqlite can't be written (")
        assert "may write to" in sentence
        assert str(closed_folder) not in sentence


def test_the_csv_file() -> None:
    odd = replace(vote("right"), prompt='a "ToK", icon\nof two lines')
    text = io.StringIO(newline="")
    write_csv([vote("tie"), odd], text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue(), newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert ",".join(COLUMNS) == (
        "time UTC,score folder,prompt,seed,adapter left,adapter right,choice,winner,session"
    )
    assert list(rows[0].values()) == [
        *("2026-01-02T03:04:05+00:00", "scores", "icon", "0", "LoRA", "Bi-LoRA", "tie", "", "me"),
    ]
    assert (rows[1]["prompt"], rows[1]["winner"]) == (odd.prompt, "Bi-LoRA")
