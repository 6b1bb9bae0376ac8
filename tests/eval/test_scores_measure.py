"""Scores of images by a scorer that sees nothing but the mean color, and the paper's table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.mini import heldout_dir
from eval.clip_scores.captioners import Captioner
from eval.clip_scores.images import Job, Sampling, Store, jobs
from eval.clip_scores.measure import ImageJudge, truth_pictures
from eval.clip_scores.models import ModelEntry, Scorer
from eval.clip_scores.prompts import Prompt
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
        self.embedded: list[Image.Image | str] = []

    def _mean(self, images: Sequence[Image.Image]) -> Tensor:
        self.embedded += images
        return torch.tensor(np.stack([np.asarray(i, np.float32).mean((0, 1)) for i in images]))

    def _named(self, texts: Sequence[str]) -> Tensor:
        self.embedded += texts
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
    **more: Any,
) -> list[Row]:
    """The rows of all subjects."""
    usual = {"scorer": ColorScorer(), "captioner": None, "truths": {}, "training": {}}
    originals = jobs(BASE, [prompt for prompt in prompts if prompt.general], range(seeds))
    judge = ImageJudge(Colors(colors), originals=originals, progress=False, **usual | more)
    return [row for one in subjects for row in judge.rows(one, jobs(one, prompts, range(seeds)))]


def test_each_score_is_the_cosine_that_it_says(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    colors = {("a", RED.text, 1): "green", ("a", GENERAL.text, 0): "blue"}
    more = {"captioner": Captioner(ENTRY, strongest), "training": {"a": open_images(str(tmp_path))}}
    rows = measured([RED, GENERAL], colors, subject("a"), BASE, seeds=2, **more)
    values = {(r.subject, r.metric, r.item, r.seed): r.value for r in rows}
    near, far = pytest.approx(1, abs=1e-6), pytest.approx(FAR, abs=1e-6)
    expected = {
        (label, metric, RED.text, seed): near
        for label, metrics in (("a", ("i2t", "t2t", "nearest")), ("base model", ("i2t", "t2t")))
        for metric in metrics
        for seed in (0, 1)
    }
    expected |= {("a", "i2t", RED.text, 1): far, ("a", "t2t", RED.text, 1): far}
    expected |= {("a", "drift", GENERAL.text, 0): far, ("a", "drift", GENERAL.text, 1): near}
    images = {key for key in values if key[1] == "image"}
    assert {key: value for key, value in values.items() if key not in images} == expected
    assert len(images) == 2 * 2 * 2
    notes = {(r.subject, r.metric, r.seed): r.note for r in rows if r.item == RED.text}
    assert notes["a", "t2t", 1] == "green thing"
    assert Path(notes["a", "nearest", 1]).name == "green.png"
    assert notes["a", "image", 1] == "images/a-aaaaaaaa/seed-1/001-a-red-one.png"


def test_the_miniatures_icons_are_no_truth_for_another_model(tmp_path):
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
