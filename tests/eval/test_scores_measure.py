"""Prompt sets, and scores of images from a scorer that sees only their mean color."""

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
from eval.clip_scores.images import Store, jobs
from eval.clip_scores.measure import ImageJudge, truth_pictures
from eval.clip_scores.models import ImageEmbedder, ModelEntry, Scorer
from eval.clip_scores.prompts import Prompt, read
from eval.clip_scores.sampling import Sampling
from eval.subjects import Subject

COLORS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
# The cosine of two different colors
OTHER_COLOR = float(np.dot(COLORS["red"], COLORS["green"]) / np.square(COLORS["red"]).sum())
ENTRY = ModelEntry("color", "test", "color")
RED = Prompt("a red one")
GENERAL = Prompt("any red one at all", general=True)
BASE = Subject("base model", "base model", "base")


def picture(color):
    """Return a picture of one color."""
    return Image.new("RGB", (8, 8), COLORS[color])


def mean_colors(images):
    """Return the mean color of each image, (images, 3)."""
    return torch.tensor(np.stack([np.asarray(image).mean((0, 1)) for image in images])).float()


def named_colors(texts):
    """Return the color that each text names, (texts, 3)."""
    colors = []
    for text in texts:
        colors += [color for name, color in COLORS.items() if name in text.split()]
    return torch.tensor(colors, dtype=torch.float32)


def color_scorer():
    return Scorer(ENTRY, mean_colors, named_colors, lambda text: False)


def captions_by_color(images):
    """Return captions that name the strongest color of each image."""
    names = list(COLORS)
    return [f"{names[index]} thing" for index in mean_colors(images).argmax(dim=1)]


class ColorStore(Store):
    """Images in the color of (subject, prompt, seed), which is red by default."""

    def __init__(self, colors):
        super().__init__(Path("images"), Sampling("mini", 8, 1, 1.0))
        self.colors = colors

    def open(self, job):
        return picture(self.colors.get((job.subject.label, job.prompt.text, job.seed), "red"))


ADAPTER = Subject("a", "a", method="a", digest="aaaaaaaa")


def measure(prompts, colors, subjects, seeds=(0,), **options):
    """Return the rows of all subjects from the color scorer; ``options`` go to `ImageJudge`."""
    parts = {
        "scorer": color_scorer(),
        "captioner": None,
        "truths": {},
        "training": {},
        **options,
    }
    general = [prompt for prompt in prompts if prompt.general]
    judge = ImageJudge(ColorStore(colors), originals=jobs(BASE, general, seeds), **parts)
    rows = []
    for subject in subjects:
        rows += judge.rows(subject, jobs(subject, prompts, seeds))
    return rows


def test_each_score_is_the_cosine_that_its_name_promises(tmp_path):
    for color in COLORS:
        picture(color).save(tmp_path / f"{color}.png")
    colors = {("a", RED.text, 1): "green", ("a", GENERAL.text, 0): "blue"}
    options = {
        "captioner": Captioner(ENTRY, captions_by_color),
        "training": {"a": open_images(str(tmp_path))},
    }
    rows = measure([RED, GENERAL], colors, [ADAPTER, BASE], seeds=(0, 1), **options)
    values, notes, image_count = {}, {}, 0
    for row in rows:
        notes[row.subject, row.metric, row.item, row.seed] = row.note
        if row.metric == "image":
            image_count += 1
        else:
            values[row.subject, row.metric, row.item, row.seed] = row.value
    same_color = pytest.approx(1, abs=1e-6)
    other_color = pytest.approx(OTHER_COLOR, abs=1e-6)
    # The base model has no training images and no drift from itself.
    assert values == {
        ("a", "i2t", RED.text, 0): same_color,
        ("a", "i2t", RED.text, 1): other_color,
        ("a", "t2t", RED.text, 0): same_color,
        ("a", "t2t", RED.text, 1): other_color,
        ("a", "nearest", RED.text, 0): same_color,
        ("a", "nearest", RED.text, 1): same_color,
        ("a", "drift", GENERAL.text, 0): other_color,
        ("a", "drift", GENERAL.text, 1): same_color,
        ("base model", "i2t", RED.text, 0): same_color,
        ("base model", "i2t", RED.text, 1): same_color,
        ("base model", "t2t", RED.text, 0): same_color,
        ("base model", "t2t", RED.text, 1): same_color,
    }
    assert image_count == 2 * 2 * 2  # subjects, prompts, seeds
    assert notes["a", "t2t", RED.text, 1] == "green thing"
    assert Path(notes["a", "nearest", RED.text, 1]).name == "green.png"
    file = "images/a-aaaaaaaa/seed-1/001-a-red-one.png"
    assert notes["a", "image", RED.text, 1] == file


def strongest_colors(images):
    """Embed images as an image model that sees only which of three colors is the strongest."""
    return torch.eye(3)[mean_colors(images).argmax(dim=1)]


def test_an_image_model_compares_images_with_the_scorers_pictures(tmp_path):
    for color in ("green", "blue"):
        picture(color).save(tmp_path / f"{color}.png")
    colors = {("a", RED.text, 0): "blue"}
    rows = measure(
        [RED, GENERAL],
        colors,
        [ADAPTER, BASE],
        truths={RED.text: picture("red")},
        training={"a": open_images(str(tmp_path))},
        image_model=ImageEmbedder(ENTRY, strongest_colors),
    )
    values = {(row.subject, row.metric): (row.value, row.note) for row in rows}
    dino_values = {key: value for key, value in values.items() if "dino" in key[1]}
    assert dino_values == {
        ("a", "dino_truth"): (0, ""),
        ("a", "dino_nearest"): (1, "blue.png"),
        ("base model", "dino_truth"): (1, ""),
    }
    # The scorer sees the whole mean color.
    assert values["a", "truth"][0] == pytest.approx(OTHER_COLOR, abs=1e-6)


def test_the_miniatures_icons_are_not_ground_truth_for_another_model(tmp_path):
    own_picture = tmp_path / "own.png"
    picture("red").save(own_picture)
    rabbit = Prompt("a red rabbit", reference=heldout_dir() / "1f407.png")
    prompts = [rabbit, Prompt("a red own", reference=own_picture), RED]
    assert list(truth_pictures(prompts, "mini")) == ["a red rabbit", "a red own"]
    truths = truth_pictures(prompts, "some/model")
    rows = measure(prompts, {}, [ADAPTER], truths=truths)
    (row,) = [row for row in rows if row.metric == "truth"]
    assert (row.item, row.value) == ("a red own", pytest.approx(1))
    own_picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r'own\.png.*"a red own"'):
        truth_pictures(prompts, "mini")


# The prompts of the paper's Table 4
PAPER = [
    "Fluffy Rabbit",
    "Curly Cloud",
    "Roaring Lion",
    "Dripping Water Drop",
    "Hopping Frog",
    "Smiling Sun",
]


def files_by_label(folder):
    """Return label -> file name of the miniature's icons."""
    files = {}
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        files[row["label"]] = row["file_name"]
    return files


def test_the_200_icon_prompts_have_one_form_and_name_no_training_icon():
    icons = read("3d_icon")
    assert [icon.instance for icon in icons[:6]] == PAPER
    instances, references = set(), set()
    for icon in icons:
        assert icon.text == f"a TOK icon of a {icon.instance}, in the style of TOK"
        assert icon.instance[0].isupper() or icon.instance[0].isdigit()
        assert not icon.general
        instances.add(icon.instance.lower())
        if icon.reference is not None:
            references.add(icon.reference.name)
    assert len(instances) == len(icons) == 200
    assert instances.isdisjoint(files_by_label(train_dir()))
    assert references == set(files_by_label(heldout_dir()).values())


def test_the_24_general_prompts_lack_the_trigger_word():
    general = read("general")
    assert len({prompt.text for prompt in general}) == len(general) == 24
    for prompt in general:
        assert prompt.general
        assert prompt.reference is None
        assert "tok" not in prompt.text.lower()


def test_captions_of_held_out_images_become_prompts_with_their_pictures(tmp_path, monkeypatch):
    prompts = read("mini-duotone-heldout")
    assert [prompt.instance for prompt in prompts] == list(files_by_label(heldout_dir()))
    # The duotone's light color is the icons' background.
    truths = truth_pictures(prompts[:1], "mini")
    assert truths[prompts[0].text].getpixel((0, 0)) == (255, 240, 200)
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    picture("red").save("own/dog.png")
    Path("own/dog.txt").write_text("a red dog")
    assert read("own") == [Prompt("a red dog", reference=tmp_path / "own" / "dog.png")]
    Path("own/dog.txt").write_text("")
    with pytest.raises(UserError, match=r"dog\.png of own has no caption"):
        read("own")


def test_a_csv_has_columns_for_prompt_instance_and_reference(tmp_path):
    owl_picture = tmp_path / "pictures" / "owl.png"
    owl_picture.parent.mkdir()
    picture("red").save(owl_picture)
    file = tmp_path / "my.csv"
    file.write_text(
        "id,prompt,instance,reference\n"
        '1,"an owl,\nat night",Night Owl,pictures/owl.png\n'
        "2,a photo of a cat,,\n",
        encoding="utf-8",
    )
    owl, cat = read(file)
    assert owl == Prompt("an owl,\nat night", "Night Owl", owl_picture)
    assert cat == Prompt("a photo of a cat", "cat")


REFUSED = {
    "twice.txt": (b"a cat\n\na dog\na cat\n", ["line 1", "line 4", '"a cat"']),
    "gone.csv": (b"prompt,reference\na cat,cat.png\n", ["line 2", '"cat.png"']),
    "3d_icons": (None, ['"3d_icons"', 'did you mean "3d_icon"']),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_prompt_set_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = REFUSED[name]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(name)
    for word in words:
        assert word in str(caught.value)


def test_the_held_out_pictures_have_their_own_image_to_text_score():
    arguments = {"captioner": None, "training": {}, "originals": []}
    # The second prompt describes its picture, but the first one does not.
    truths = {RED.text: picture("green"), "a green one": picture("green")}
    judge = ImageJudge(ColorStore({}), color_scorer(), truths=truths, **arguments)
    assert judge.truth_i2t() == pytest.approx((OTHER_COLOR + 1) / 2, abs=1e-6)
    assert ImageJudge(ColorStore({}), color_scorer(), truths={}, **arguments).truth_i2t() is None
