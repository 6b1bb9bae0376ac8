"""What is measured on images, with a scorer that sees nothing but the mean color."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.mini import heldout_dir
from eval.clip_scores.captioners import Captioner
from eval.clip_scores.images import Job, Sampling, Store, jobs
from eval.clip_scores.measure import Judge, cosine, nearest, pairwise_diversity, truth_pictures
from eval.clip_scores.models import ModelEntry
from eval.clip_scores.prompts import Prompt
from eval.clip_scores.scorers import Scorer
from eval.subjects import Subject
from eval.table import Row

COLORS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
FAR = float(np.dot(COLORS["red"], COLORS["green"]) / np.square(COLORS["red"]).sum())
ENTRY = ModelEntry("color", "test", "color")
RED, GENERAL = Prompt("a red one"), Prompt("any red one at all", general=True)
BASE = Subject("base model", "base model", "base")


class ColorScorer(Scorer):
    """Embeds an image as its mean color, and a text as the color that it names."""

    def __init__(self) -> None:
        super().__init__(ENTRY, self._mean, self._named, lambda text: False)
        self.embedded = 0

    def _mean(self, images: Sequence[Image.Image]) -> Tensor:
        self.embedded += len(images)
        return torch.tensor(np.stack([np.asarray(i, np.float32).mean((0, 1)) for i in images]))

    def _named(self, texts: Sequence[str]) -> Tensor:
        named = [next(c for word, c in COLORS.items() if word in text) for text in texts]
        return torch.tensor(named, dtype=torch.float32)


def strongest(images: Sequence[Image.Image]) -> list[str]:
    """A caption that names the strongest color."""
    return [f"{list(COLORS)[np.asarray(i).mean((0, 1)).argmax()]} thing" for i in images]


class Colors(Store):
    """Images in the color that (subject, prompt, seed) has; one of one color by default."""

    def __init__(self, colors: dict[tuple[str, str, int], str]) -> None:
        super().__init__(Path("images"), Sampling("mini", 8, 1, 1.0))
        self.colors = colors

    def open(self, job: Job) -> Image.Image:
        key = (job.subject.label, job.prompt.text, job.seed)
        return Image.new("RGB", (8, 8), COLORS[self.colors.get(key, "red")])


def subject(label: str) -> Subject:
    return Subject(label, label, method=label, digest=label * 8)


def measured(
    prompts: Sequence[Prompt],
    colors: dict[tuple[str, str, int], str],
    *subjects: Subject,
    seeds: int = 1,
    scorer: Scorer | None = None,
    captioner: Captioner | None = None,
    **more: Any,
) -> list[Row]:
    """The rows of all subjects."""
    scorer = scorer or ColorScorer()
    known = {"truths": {}, "training": {}} | more
    originals = jobs(BASE, [prompt for prompt in prompts if prompt.general], range(seeds))
    judge = Judge(Colors(colors), scorer, captioner, originals=originals, progress=False, **known)
    return [row for one in subjects for row in judge.rows(one, jobs(one, prompts, range(seeds)))]


def test_each_score_is_the_cosine_that_it_says() -> None:
    colors = {("a", RED.text, 1): "green", ("a", GENERAL.text, 0): "blue"}
    captioner = Captioner(ENTRY, strongest)
    rows = measured([RED, GENERAL], colors, subject("a"), BASE, seeds=2, captioner=captioner)
    values = {(r.subject, r.metric, r.item, r.seed): r.value for r in rows}
    near = pytest.approx(1, abs=1e-6)
    far = pytest.approx(FAR, abs=1e-6)
    expected = {
        (label, metric, RED.text, seed): near
        for label in ("a", "base model")
        for metric in ("i2t", "t2t")
        for seed in (0, 1)
    }
    expected |= {("a", "i2t", RED.text, 1): far, ("a", "t2t", RED.text, 1): far}
    expected |= {("a", "drift", GENERAL.text, 0): far, ("a", "drift", GENERAL.text, 1): near}
    expected |= {("a", "diversity", RED.text, None): pytest.approx(1 - FAR, abs=1e-6)}
    expected |= {("base model", "diversity", RED.text, None): pytest.approx(0, abs=1e-6)}
    images = {key for key in values if key[1] == "image"}
    assert {key: value for key, value in values.items() if key not in images} == expected
    assert len(images) == 2 * 2 * 2
    notes = {(r.subject, r.metric, r.seed): r.note for r in rows if r.item == RED.text}
    assert notes["a", "t2t", 1] == "green thing"
    assert notes["a", "image", 1] == "images/a-aaaaaaaa/seed-1/001-a-red-one.png"


def test_memorization_names_the_nearest_training_picture(tmp_path: Path) -> None:
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    training = {"a": open_images(str(tmp_path))}
    rows = measured(
        [RED], {("a", RED.text, 0): "blue"}, subject("a"), subject("b"), training=training
    )
    (row,) = [row for row in rows if row.metric == "nearest"]
    assert (row.subject, row.value) == ("a", pytest.approx(1))
    assert Path(row.note).name == "blue.png"


def test_the_miniatures_icons_are_no_truth_for_another_model(tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.new("RGB", (8, 8), COLORS["red"]).save(own)
    rabbit = Prompt("a red rabbit", reference=heldout_dir() / "1f407.png")
    prompts = [rabbit, Prompt("a red own", reference=own), RED]
    assert list(truth_pictures(prompts, "mini")) == ["a red rabbit", "a red own"]
    truths = truth_pictures(prompts, "some/model")
    rows = measured(prompts, {}, subject("a"), truths=truths)
    (row,) = [row for row in rows if row.metric == "truth"]
    assert (row.item, row.value) == ("a red own", pytest.approx(1))
    own.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r'own\.png.*"a red own"'):
        truth_pictures(prompts, "mini")


def test_equal_images_are_embedded_once_and_score_the_same() -> None:
    scorer = ColorScorer()
    prompts = [RED, Prompt("a blue one"), GENERAL]
    rows = measured(prompts, {}, subject("a"), subject("b"), seeds=2, scorer=scorer)
    assert scorer.embedded == 1
    assert len({row.value for row in rows if row.metric == "i2t"}) == 2


def test_a_cosine_stays_within_one() -> None:
    vector = torch.full((7,), 7**-0.5) * (1 + 1e-6)
    assert cosine(vector, vector) == 1.0
    assert cosine(vector, -vector) == -1.0


def random(rows: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def plain(a: Tensor, b: Tensor) -> float:
    """A cosine by a loop."""
    x, y = a.tolist(), b.tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99))
def test_nearest_and_diversity_are_those_of_a_loop(n: int, m: int, seed: int) -> None:
    images, train = random(n, seed=seed), random(m, seed=seed + 1000)
    likeness, index = nearest(images, train)
    for row in range(n):
        cosines = [plain(images[row], picture) for picture in train]
        assert index[row] == max(range(m), key=cosines.__getitem__)
        assert float(likeness[row]) == pytest.approx(max(cosines), abs=1e-12)
        alone, _ = nearest(images[row : row + 1], train)
        assert float(alone) == pytest.approx(float(likeness[row]), abs=1e-12)
    pairs = [plain(train[a], train[b]) for a in range(m) for b in range(a)]
    assert pairwise_diversity(train) == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-12)


def test_copies_are_found_and_diversity_has_its_marks() -> None:
    train = random(5)
    likeness, index = nearest(train[[3, 0]] * 7, train)
    assert index.tolist() == [3, 0]
    torch.testing.assert_close(likeness, torch.ones(2, dtype=torch.float64))
    picture = torch.tensor([[1.0, 2.0]])
    assert nearest(picture, torch.cat([-picture, picture, picture]))[1].tolist() == [1]
    assert pairwise_diversity(random(1).repeat(4, 1)) == pytest.approx(0, abs=1e-12)
    assert pairwise_diversity(torch.eye(5)) == pytest.approx(1, abs=1e-12)
    assert pairwise_diversity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(2)
