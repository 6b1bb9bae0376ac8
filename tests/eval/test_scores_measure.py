"""Prompt sets, and scores of images by a scorer that sees nothing but the mean color."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.mini import heldout_dir, train_dir
from eval.clip_scores.captioners import Captioner
from eval.clip_scores.images import Sampling, Store, jobs
from eval.clip_scores.measure import ImageJudge, truth_pictures
from eval.clip_scores.models import ImageEmbedder, ModelEntry, Scorer
from eval.clip_scores.prompts import Prompt, read
from eval.subjects import Subject

COLORS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
FAR = float(np.dot(COLORS["red"], COLORS["green"]) / np.square(COLORS["red"]).sum())
ENTRY = ModelEntry("color", "test", "color")
RED, GENERAL = Prompt("a red one"), Prompt("any red one at all", general=True)
BASE = Subject("base model", "base model", "base")


class ColorScorer(Scorer):
    """Embeds an image as its mean color, and a text as the color that it names."""

    def __init__(self):
        super().__init__(ENTRY, self._mean, self._embed_names, lambda text: False)

    def _mean(self, images):
        return torch.tensor(np.stack([np.asarray(i, np.float32).mean((0, 1)) for i in images]))

    def _embed_names(self, texts):
        colors = [next(c for word, c in COLORS.items() if word in text) for text in texts]
        return torch.tensor(colors, dtype=torch.float32)


def strongest_index(images):
    """Place of the strongest color."""
    return [int(np.asarray(image).mean((0, 1)).argmax()) for image in images]


def strongest(images):
    """A caption that names the strongest color."""
    return [f"{list(COLORS)[index]} thing" for index in strongest_index(images)]


class Colors(Store):
    """Images in the color that (subject, prompt, seed) has; one of one color by default."""

    def __init__(self, colors):
        super().__init__(Path("images"), Sampling("mini", 8, 1, 1.0))
        self.colors = colors

    def open(self, job):
        key = (job.subject.label, job.prompt.text, job.seed)
        return Image.new("RGB", (8, 8), COLORS[self.colors.get(key, "red")])


def subject(label):
    return Subject(label, label, method=label, digest=label * 8)


def measured(prompts, colors, *subjects, seeds=1, **options):
    """The rows of all subjects."""
    usual = {"scorer": ColorScorer(), "captioner": None, "truths": {}, "training": {}}
    originals = jobs(BASE, [prompt for prompt in prompts if prompt.general], range(seeds))
    judge = ImageJudge(Colors(colors), originals=originals, **usual | options)
    return [
        row
        for adapter in subjects
        for row in judge.rows(adapter, jobs(adapter, prompts, range(seeds)))
    ]


def test_each_score_is_the_cosine_that_it_says(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    colors = {("a", RED.text, 1): "green", ("a", GENERAL.text, 0): "blue"}
    options = {
        "captioner": Captioner(ENTRY, strongest),
        "training": {"a": open_images(str(tmp_path))},
    }
    rows = measured([RED, GENERAL], colors, subject("a"), BASE, seeds=2, **options)
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


def test_an_image_model_compares_with_the_same_pictures(tmp_path):
    for name in ("green", "blue"):
        Image.new("RGB", (8, 8), COLORS[name]).save(tmp_path / f"{name}.png")
    options = {
        "truths": {RED.text: Image.new("RGB", (8, 8), COLORS["red"])},
        "training": {"a": open_images(str(tmp_path))},
        "image_model": ImageEmbedder(ENTRY, lambda images: torch.eye(3)[strongest_index(images)]),
    }
    rows = measured([RED, GENERAL], {("a", RED.text, 0): "blue"}, subject("a"), BASE, **options)
    values = {(r.subject, r.metric): (r.value, r.note) for r in rows if "dino" in r.metric}
    # It sees the strongest of three colors alone, the scorer all of an image's mean color.
    assert values == {
        ("a", "dino_truth"): (0, ""),
        ("a", "dino_nearest"): (1, "blue.png"),
        ("base model", "dino_truth"): (1, ""),
    }
    clip = {(r.subject, r.metric): r.value for r in rows}
    assert clip["a", "truth"] == pytest.approx(FAR, abs=1e-6)


def test_the_miniatures_icons_are_no_truth_for_another_model(tmp_path):
    own_picture = tmp_path / "own.png"
    Image.new("RGB", (8, 8), COLORS["red"]).save(own_picture)
    rabbit = Prompt("a red rabbit", reference=heldout_dir() / "1f407.png")
    prompts = [rabbit, Prompt("a red own", reference=own_picture), RED]
    assert list(truth_pictures(prompts, "mini")) == ["a red rabbit", "a red own"]
    truths = truth_pictures(prompts, "some/model")
    rows = measured(prompts, {}, subject("a"), truths=truths)
    (row,) = [row for row in rows if row.metric == "truth"]
    assert (row.item, row.value) == ("a red own", pytest.approx(1))
    own_picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r'own\.png.*"a red own"'):
        truth_pictures(prompts, "mini")


PAPER = (
    *("Fluffy Rabbit", "Curly Cloud", "Roaring Lion"),
    *("Dripping Water Drop", "Hopping Frog", "Smiling Sun"),
)


def labels(folder):
    """Label -> file name of the miniature's icons."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["label"]: row["file_name"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def icons():
    return read("3d_icon")


def test_the_icons_are_200_of_one_form_and_were_not_trained_on(icons):
    assert len({prompt.text for prompt in icons}) == len(icons) == 200
    for prompt in icons:
        assert prompt.text == f"a TOK icon of a {prompt.instance}, in the style of TOK"
        assert str(prompt.instance)[0].isupper() or str(prompt.instance)[0].isdigit()
        assert not prompt.general
    assert tuple(prompt.instance for prompt in icons[:6]) == PAPER
    instances = {str(prompt.instance).lower() for prompt in icons}
    assert len(instances) == 200
    assert instances.isdisjoint(labels(train_dir()))
    references = {p.reference.name for p in icons if p.reference is not None}
    assert references == set(labels(heldout_dir()).values())
    general = read("general")
    assert len({prompt.text for prompt in general}) == len(general) == 24
    assert all(p.general and p.reference is None and "tok" not in p.text.lower() for p in general)


def test_captions_of_held_out_images_are_prompts_with_their_pictures(tmp_path, monkeypatch):
    rows = labels(heldout_dir())
    prompts = read("mini-duotone-heldout")
    assert [prompt.instance for prompt in prompts] == list(rows)
    assert truth_pictures(prompts[:1], "mini")[prompts[0].text].getpixel((0, 0)) == (255, 240, 200)
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Image.new("RGB", (8, 8), COLORS["red"]).save("own/dog.png")
    Path("own/dog.txt").write_text("a red dog")
    assert read("own") == [Prompt("a red dog", reference=tmp_path / "own" / "dog.png")]
    Path("own/dog.txt").write_text("")
    with pytest.raises(UserError, match=r"dog\.png of own has no caption"):
        read("own")


def test_a_csv_has_columns(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "owl.png")
    file = tmp_path / "my.csv"
    file.write_text(
        "id,prompt,instance,reference\n"
        '1,"an owl,\nat night",Night Owl,pictures/owl.png\n'
        "2,a photo of a cat,,\n",
        encoding="utf-8",
    )
    owl, cat = read(file)
    assert owl == Prompt("an owl,\nat night", "Night Owl", tmp_path / "pictures" / "owl.png")
    assert cat == Prompt("a photo of a cat", "cat")


REFUSED = {
    "twice.txt": (b"a cat\n\na dog\na cat\n", ["line 1", "line 4", '"a cat"']),
    "gone.csv": (b"prompt,reference\na cat,cat.png\n", ["line 2", '"cat.png"']),
    "3d_icons": (None, ['"3d_icons"', 'did you mean "3d_icon"']),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_set_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = REFUSED[name]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_held_out_pictures_have_an_image_to_text_score_themselves():
    arguments = {"captioner": None, "training": {}, "originals": []}
    green = Image.new("RGB", (8, 8), COLORS["green"])
    # Two pictures: one that its prompt describes, and one that it does not.
    truths = {RED.text: green, "a green one": green}
    judge = ImageJudge(Colors({}), ColorScorer(), truths=truths, **arguments)
    assert judge.truth_i2t() == pytest.approx((FAR + 1) / 2, abs=1e-6)
    assert ImageJudge(Colors({}), ColorScorer(), truths={}, **arguments).truth_i2t() is None
