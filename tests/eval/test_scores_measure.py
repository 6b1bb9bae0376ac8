"""What is measured on images, with a scorer that sees nothing but the mean color."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.sources import open_images
from bilora_diffusion.mini import heldout_dir
from eval.scores.adapters import Adapter
from eval.scores.captioners import Captioner
from eval.scores.measure import cosine, look, measure, truth_pictures
from eval.scores.models import ModelEntry
from eval.scores.plan import Plan
from eval.scores.prompts import Prompt
from eval.scores.scorers import Scorer
from eval.scores.store import Job, Sampling

COLORS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}


class ColorScorer(Scorer):
    """Embeds an image as its mean color, and a text as the color that it names."""

    def __init__(self) -> None:
        super().__init__(ENTRY, self._mean, self._named, lambda text: len(text.split()) > 3)
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


ENTRY = ModelEntry("color", "test", "color")
CAPTIONER = Captioner(ENTRY, strongest)


class Colors:
    """Images in the color that (label, prompt, seed) has; one of one color by default."""

    def __init__(self, colors: dict[tuple[str, str, int], str]) -> None:
        self.colors = colors

    def open(self, job: Job) -> Image.Image:
        key = (job.adapter.label, job.prompt.text, job.seed)
        return Image.new("RGB", (8, 8), COLORS[self.colors.get(key, "red")])


def adapter(label: str, kind: str = "run", digest: str | None = None) -> Adapter:
    digest = ("" if kind == "base" else label) if digest is None else digest
    return Adapter(label, kind, label, None, digest, None, "mini", label)


def planned(
    adapters: list[Adapter], prompts: list[Prompt], base: str = "mini", seeds: int = 1
) -> Plan:
    return Plan(
        adapters=adapters,
        control=0,
        prompts=prompts,
        prompt_set="colors",
        seeds=list(range(seeds)),
        sampling=Sampling(base, 8, 1, 1.0),
        scorer="color",
        captioner="color",
        training={},
        notes=[],
    )


RED, GENERAL = Prompt("a red one"), Prompt("any red one at all", general=True)


def test_each_score_is_the_cosine_that_it_says() -> None:
    plan = planned([adapter("a"), adapter("base", "base")], [RED, GENERAL], seeds=2)
    store = Colors({("a", RED.text, 1): "green", ("a", GENERAL.text, 0): "blue"})
    found = measure(plan, store, ColorScorer(), CAPTIONER, progress=False)
    rows = {(row.adapter, row.prompt, row.seed): row for row in found.images}
    assert len(rows) == 8
    far = float(np.dot(COLORS["red"], COLORS["green"]) / np.square(COLORS["red"]).sum())
    assert rows[0, 0, 0].i2t == pytest.approx(1)
    assert rows[0, 0, 1].i2t == pytest.approx(far, abs=1e-6)
    assert rows[0, 0, 1].caption == "green thing"
    assert rows[0, 0, 1].t2t == pytest.approx(far, abs=1e-6)
    assert rows[0, 0, 0].drift is None
    assert rows[0, 1, 0].drift == pytest.approx(far, abs=1e-6)
    assert rows[0, 1, 1].drift == pytest.approx(1)
    assert rows[0, 1, 0].i2t is rows[0, 1, 0].t2t is rows[1, 1, 0].drift is None
    assert found.diversity["a"] == {RED.text: pytest.approx(1 - far, abs=1e-6)}
    assert found.diversity["base"] == {RED.text: pytest.approx(0, abs=1e-6)}
    assert [entry.truncated for entry in found.prompts] == [False, True]
    assert rows[0, 0, 1].file.startswith("images/a/seed-1/")


def test_memorization_names_the_nearest_training_picture(tmp_path: Path) -> None:
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    plan = planned([adapter("a"), adapter("b")], [RED])
    plan.training[0] = open_images(str(tmp_path))
    store = Colors({("a", RED.text, 0): "blue"})
    ours, theirs = measure(plan, store, ColorScorer(), None, progress=False).images
    assert ours.nearest == pytest.approx(1)
    assert Path(ours.nearest_image or "").name == "blue.png"
    assert theirs.nearest is theirs.nearest_image is None
    assert ours.caption is ours.t2t is None


def test_the_miniatures_icons_are_no_truth_for_another_model(tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.new("RGB", (8, 8), COLORS["red"]).save(own)
    prompts = [
        Prompt("a red rabbit", reference=heldout_dir() / "1f407.png"),
        Prompt("a red own", reference=own),
        RED,
    ]
    assert list(truth_pictures(planned([adapter("a")], prompts))) == [0, 1]
    assert list(truth_pictures(planned([adapter("a")], prompts, base="some/model"))) == [1]
    found = measure(
        planned([adapter("a")], prompts), Colors({}), ColorScorer(), None, progress=False
    )
    assert [entry.reference for entry in found.prompts] == ["1f407.png", "own.png", None]
    assert found.images[1].truth == pytest.approx(1)
    assert found.images[2].truth is None
    own.write_bytes(b"no picture")
    with pytest.raises(UserError, match="can't be read"):
        truth_pictures(planned([adapter("a")], prompts))


def test_equal_images_are_embedded_once_and_score_the_same() -> None:
    plan = planned([adapter("a"), adapter("b")], [RED, Prompt("a blue one")], seeds=2)
    scorer = ColorScorer()
    seen = look(plan.jobs().values(), Colors({}), scorer, None, progress=False)
    assert len(seen) == 8
    assert scorer.embedded == 1
    assert len({id(image.vector) for image in seen.values()}) == 1


def test_adapters_with_equal_weights_share_their_images() -> None:
    plan = planned([adapter("a"), adapter("copy", "file", "a"), adapter("base", "base")], [RED])
    files = [job.file for job in plan.jobs().values()]
    assert files[0] == files[1] != files[2]
    assert plan.first(plan.adapters[1]) == 0
    assert plan.references() == {}


def test_the_base_models_general_images_are_made_even_when_it_is_no_column() -> None:
    plan = planned([adapter("a")], [RED, GENERAL])
    ((key, job),) = plan.references().items()
    assert key == (1, 0)
    assert job.adapter.kind == "base"
    assert job.prompt.text == GENERAL.text


def test_a_cosine_stays_within_one() -> None:
    vector = normalize(torch.full((7,), 0.1), dim=0) * (1 + 1e-6)
    assert cosine(vector, vector) == 1.0
    assert cosine(vector, -vector) == -1.0
